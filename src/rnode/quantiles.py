"""Piecewise linear maps between quantiles of data and those of a known distribution."""

from typing import Any

import torch
from torch import Tensor

KNOTS = 500  # of a column, at most
ROWS_OF_A_KNOT = 10
TAIL_SHARE = 0.01  # share of the rows at either end that have one knot
SMALLEST_GAP = 1e-6  # between knots: repeated values have one


class Quantiles:
    """Makes each column of a table normal.

    Args:
        knots: quantiles of the columns, and of a normal, (2, d, K), both increasing.
    """

    def __init__(self, knots: Tensor):
        self.knots = knots

    @classmethod
    def fit(cls, y: Tensor) -> "Quantiles":
        """Fit the knots to y (N, d).

        The outer hundredths have one: beyond the last knot, the slope of a few rows would go on.
        """
        count = max(2, min(KNOTS, len(y) // ROWS_OF_A_KNOT))
        shares = (torch.arange(count, dtype=y.dtype) + 0.5) / count
        kept = (shares > TAIL_SHARE) & (shares < 1 - TAIL_SHARE)
        kept[[0, -1]] = True
        shares = shares[kept]
        normal = torch.special.ndtri(shares)
        knots = [quantile_knots(column, shares, normal) for column in y.T]
        return cls(torch.stack([extended(each, len(shares)) for each in knots], dim=1))

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y (B, d) → (B, d) and log|det|, (B,)."""
        normal, slopes = interpolate(y.T, *self.knots)
        return normal.T, slopes.log().sum(0)

    def inverse(self, y: Tensor) -> Tensor:
        """y (B, d) → (B, d)."""
        return interpolate(y.T, *self.knots.flip(0))[0].T

    def state(self) -> dict[str, Any]:
        """The arguments of this layer."""
        return dict(vars(self))


def quantile_knots(x: Tensor, shares: Tensor, targets: Tensor) -> Tensor:
    """Return the quantiles of x (N,) at `shares` (K,) over `targets` (K,): (2, at most K).

    If x does not vary, they are those of the identity.
    """
    quantiles = x.quantile(shares)
    kept = quantiles.diff(prepend=quantiles[:1] - 1) > SMALLEST_GAP
    if kept.sum() < 2:
        return x.new_tensor([[0.0, 1.0], [0.0, 1.0]])
    return torch.stack([quantiles, targets])[:, kept]


def extended(knots: Tensor, count: int) -> Tensor:
    """Return `count` knots (2, count) with which interpolation is the same."""
    more = torch.arange(1, 1 + count - knots.shape[1]).to(knots)
    return torch.cat([knots, knots[:, -1:] + knots.diff()[:, -1:] * more], dim=1)


def interpolate(x: Tensor, knots: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Linear interpolation and extrapolation.

    Args:
        x: (…, B).
        knots: (…, K), increasing.
        values: those at the knots, (…, K).

    Returns:
        Values and slopes, (…, B) each.
    """
    slopes = values.diff() / knots.diff()
    left = (torch.searchsorted(knots, x.contiguous()) - 1).clamp(0, slopes.shape[-1] - 1)
    slope = slopes.gather(-1, left)
    return values.gather(-1, left) + slope * (x - knots.gather(-1, left)), slope
