"""What is minimized, equation (17), and what is reported, bits per dimension."""

import math

from torch import Tensor

from rnode.dynamics import State


def log_normal(z: Tensor) -> Tensor:
    """log q(z) of the standard normal, in nats: z (B, d) → (B,)."""
    return -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))


def objective(state: State, lambda_k: float, lambda_j: float) -> Tensor:
    """Equation (17), in nats per dimension: the mean over samples and dimensions of −log q(z(T)) − l + λ_K E + λ_J n."""
    z, l, E, n = state
    return (-log_normal(z) - l + lambda_k * E + lambda_j * n).mean() / z.shape[1]


def bits_per_dim(log_prob: Tensor, log_det: Tensor, d: int) -> Tensor:
    """−log₂ p(x) / d of the data before its transforms: log p(y) in nats and the transforms' log|det dy/dx|, each (B,)."""
    return -(log_prob + log_det) / (d * math.log(2))
