"""Quadrature rules for the integrals l, E and n along the path of z.

The integrals do not feed back into z, so only z needs an ODE solver, whose steps lead from node to
node of the rule. Each node costs one vector-Jacobian product; the whole system costs one for every
evaluation of f. Each function returns nodes on [0, 1] and their weights.
"""

import numpy as np
from scipy.special import roots_jacobi


def simpson(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Simpson's rule with an even number of equal steps, fourth order: steps + 1 nodes."""
    weights = np.ones(steps + 1)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return np.linspace(0, 1, steps + 1), weights / (3 * steps)


def radau(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Radau's rule, whose first node is 0 (Abramowitz and Stegun 25.4.31).

    It is exact for polynomials of degree 2·nodes − 2, the most for a rule that has the first node.
    The other nodes are those of Gauss's rule for the weight 1 + x on [−1, 1].
    """
    if nodes == 1:
        return np.zeros(1), np.ones(1)
    x, weights = roots_jacobi(nodes - 1, 0, 1)
    weights = weights / (1 + x)
    first = 2 - weights.sum()
    return (np.concatenate([[-1], x]) + 1) / 2, np.concatenate([[first], weights]) / 2
