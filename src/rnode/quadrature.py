"""Where l, E and n are sampled along the path of z, and with which weights, when they are had by quadrature.

None of the three feeds back into z, so only z needs an ODE solver: its steps are laid between the nodes of a quadrature, and
each node costs one vector-Jacobian product where the whole system takes one for every evaluation of f.
"""

import functools

import numpy as np
from scipy.special import roots_jacobi


@functools.cache
def simpson(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Simpson's rule on [0, 1] over an even number of equal steps: nodes and weights, each (steps + 1,). Fourth order."""
    if steps % 2:
        raise ValueError(f"Simpson's rule takes an even number of steps, not {steps}")
    weights = np.ones(steps + 1)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return np.linspace(0, 1, steps + 1), weights / (3 * steps)


@functools.cache
def radau(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Radau's quadrature on [0, 1], with 0 the first node: nodes and weights, each (nodes,).

    Exact for polynomials of degree 2·nodes − 2, the most for a rule that samples where the path begins (Abramowitz and
    Stegun 25.4.31): the other nodes are those of Gauss's rule for the weight 1 + x on [−1, 1].
    """
    if nodes == 1:
        return np.zeros(1), np.ones(1)
    x, weights = roots_jacobi(nodes - 1, 0, 1)
    weights = weights / (1 + x)
    return (np.concatenate([[-1], x]) + 1) / 2, np.concatenate([[2 - weights.sum()], weights]) / 2
