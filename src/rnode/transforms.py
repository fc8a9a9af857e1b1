"""From grey levels to real numbers and back: dequantization and the logit, each with its log-determinant.

(The third transform of the flow, the squeeze, is torch's `pixel_unshuffle`: a permutation, log-determinant zero.)
"""

import math

import torch
from torch import Tensor

from rnode.errors import is_int, is_number, require


class Dequantize:
    """u = (x + noise) / levels: whole grey levels x in {0, …, levels − 1} to u in [0, 1).

    With noise uniform on [0, 1), E[log p(u)] − d log(levels) is a lower bound on the discrete log-likelihood of x.
    """

    def __init__(self, levels: int = 256):
        require(is_int(levels, at_least=2), "dataset.levels", levels, "a whole number of grey levels, 2 or more")
        self.levels = levels

    def __call__(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """x, noise (B, *shape) → u (B, *shape) and log|det du/dx| (B,)."""
        u = (x + noise) / self.levels
        # x + noise may round up to the next level; the largest float below 1 keeps u inside [0, 1).
        u = u.clamp(max=1 - torch.finfo(u.dtype).eps / 2)
        return u, u.new_full(u.shape[:1], -u[0].numel() * math.log(self.levels))

    def inverse(self, u: Tensor) -> Tensor:
        """u (B, *shape) → grey levels (B, *shape), uint8."""
        return (u * self.levels).floor().clamp(0, self.levels - 1).to(torch.uint8)


class Logit:
    """y = logit(α + (1 − 2α) u): [0, 1] to the real line; α keeps the ends finite (0.05 for CIFAR10, 1e-5 for MNIST)."""

    def __init__(self, alpha: float):
        require(is_number(alpha) and 0 < alpha < 0.5, "dataset.alpha", alpha, "a number between 0 and 0.5, both excluded")
        self.alpha = alpha

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u (B, *shape) → y (B, *shape) and log|det dy/du| (B,)."""
        s = self.alpha + (1 - 2 * self.alpha) * u
        log_s, log_1_s = s.log(), (1 - s).log()
        log_det = math.log(1 - 2 * self.alpha) - log_s - log_1_s
        return log_s - log_1_s, log_det.flatten(1).sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        """y (B, *shape) → u (B, *shape), outside [0, 1] by at most α/(1 − 2α)."""
        return (y.sigmoid() - self.alpha) / (1 - 2 * self.alpha)
