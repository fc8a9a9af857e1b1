"""Dequantization and the logit transform, each with its inverse and its log-determinant."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rnode.errors import require
from rnode.seeding import NOISE, sample_generators


class Batch(NamedTuple):
    """Transformed data: y (B, *shape), log|det dy/dx| (B,), index of each in its split (B,)."""

    y: Tensor
    log_det: Tensor
    index: Tensor


class Dequantize:
    """u = (x + noise) / levels: grey levels x in {0, …, levels − 1} to u in [0, 1).

    With uniform noise, E[log p(u)] − d log(levels) is a lower bound on the discrete log p(x).
    """

    def __init__(self, levels: int = 256):
        require(levels >= 2, f"levels={levels}: must be at least 2")
        self.levels = levels

    def __call__(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """x, noise (B, *shape) → u (B, *shape) and log|det du/dx| (B,)."""
        u = (x + noise) / self.levels
        # x + noise may round up to the next level; the largest float below 1 keeps u inside [0, 1).
        u = u.clamp(max=1 - torch.finfo(u.dtype).eps / 2)
        return u, u.new_full(u.shape[:1], -math.prod(u.shape[1:]) * math.log(self.levels))

    def inverse(self, u: Tensor) -> Tensor:
        """u (B, *shape) → grey levels (B, *shape), uint8."""
        return (u * self.levels).floor().clamp(0, self.levels - 1).to(torch.uint8)


class Logit:
    """y = logit(α + (1 − 2α) u): [0, 1] to the real line; α in (0, 0.5) keeps the ends finite."""

    def __init__(self, alpha: float):
        require(0 < alpha < 0.5, f"alpha={alpha}: must be between 0 and 0.5, both excluded")
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


class Transform:
    """Data x to what the flow models, y: dequantization, then the logit.

    Vectors, without `levels` and `alpha`, stay as they are.
    """

    def __init__(self, levels: int | None = None, alpha: float | None = None):
        both = f"levels={levels} and alpha={alpha}"
        require((levels is None) == (alpha is None), f"{both}: images need both, vectors neither")
        self.dequantize = None if levels is None else Dequantize(levels)
        self.logit = None if alpha is None else Logit(alpha)

    @property
    def discrete(self) -> bool:
        """Whether x are grey levels, of which log p(y) bounds a discrete likelihood."""
        return self.dequantize is not None

    def __call__(self, x: Tensor, index: Tensor, noise: Tensor | None = None) -> Batch:
        """Transform x (B, *shape) with `noise` (B, *shape), uniform on [0, 1) if None."""
        if self.dequantize is None or self.logit is None:
            return Batch(x, x.new_zeros(len(x)), index)
        noise = torch.rand(x.shape, device=x.device) if noise is None else noise.to(x.device)
        u, log_det_u = self.dequantize(x, noise)
        y, log_det_y = self.logit(u)
        return Batch(y, log_det_u + log_det_y, index)

    def for_evaluation(self, x: Tensor, index: Tensor, seed: int) -> Batch:
        """Transform data with the noise that belongs to each sample and `seed`."""
        return self(x, index, self.noise(x, sample_generators(index, seed, NOISE)))

    def noise(self, x: Tensor, generators: Sequence[torch.Generator]) -> Tensor | None:
        """Sample uniform noise for x (B, *shape), one generator per sample; None for vectors."""
        if not self.discrete:
            return None
        return torch.stack([torch.rand(x.shape[1:], generator=g) for g in generators])

    def inverse(self, y: Tensor) -> Tensor:
        """y (B, *shape) → images in [0, 1], or vectors unchanged, (B, *shape)."""
        return y if self.logit is None else self.logit.inverse(y).clamp(0, 1)
