"""The training loss, equation (17), and the reported figure, bits per dimension."""

import math

from torch import Tensor

from rnode.dynamics import State


def log_normal(z: Tensor) -> Tensor:
    """log q(z) of the standard normal, in nats: z (B, d) → (B,)."""
    return -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))


def objective(
    state: State,
    lambda_k: float,
    lambda_j: float,
    log_q: Tensor | None = None,
    weights: Tensor | float = 1.0,
) -> Tensor:
    """Equation (17): the mean over samples and dimensions of −log q(z(T)) − l + λ_K E + λ_J n.

    Args:
        state: a flow's result, with z (B, d) and l, E, n (B,).
        lambda_k: λ_K, weight of the kinetic energy.
        lambda_j: λ_J, weight of the Jacobian's squared Frobenius norm.
        log_q: log q(z(T)) (B,); None: that of the standard normal.
        weights: of the samples (B,), by which their terms are multiplied. If their mean over the
            training data is 1, the gradient of a batch is unbiased.

    Returns:
        The loss (), in nats per dimension.
    """
    z, l, E, n = state
    log_q = log_normal(z) if log_q is None else log_q
    return (weights * (-log_q - l + lambda_k * E + lambda_j * n)).mean() / z.shape[1]


def bits_per_dim(log_prob: Tensor, log_det: Tensor, d: int) -> Tensor:
    """−log₂ p(x) / d of x before its transforms, from log p(y) and log|det dy/dx| in nats, (B,)."""
    return -(log_prob + log_det) / (d * math.log(2))
