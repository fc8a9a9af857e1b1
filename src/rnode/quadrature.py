"""Quadrature rules for the integrals l, E and n along the path of z.

The integrals do not feed back into z, so only z needs an ODE solver. Its steps are laid between the
nodes of a quadrature rule. Each node costs one vector-Jacobian product; solving the whole system
costs one for every evaluation of f.
"""

import functools

import numpy as np
from scipy.special import roots_jacobi


@functools.cache
def simpson(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Simpson's rule on [0, 1] with an even number of equal steps. Fourth order.

    Returns:
        Nodes and weights, each (steps + 1,).
    """
    if steps % 2:
        raise ValueError(f"steps={steps}: must be even for Simpson's rule")
    weights = np.ones(steps + 1)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return np.linspace(0, 1, steps + 1), weights / (3 * steps)


@functools.cache
def radau(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Radau's rule on [0, 1] with 0 as its first node.

    Exact for polynomials of degree 2·nodes − 2, the highest degree for a rule that samples the
    start of the path (Abramowitz and Stegun 25.4.31). The other nodes are those of Gauss's rule
    for the weight 1 + x on [−1, 1].

    Returns:
        Nodes and weights, each (nodes,).
    """
    if nodes == 1:
        return np.zeros(1), np.ones(1)
    x, weights = roots_jacobi(nodes - 1, 0, 1)
    weights = weights / (1 + x)
    first = 2 - weights.sum()
    return (np.concatenate([[-1], x]) + 1) / 2, np.concatenate([[first], weights]) / 2
