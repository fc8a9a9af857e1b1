"""A radial layer, which turns an elliptical density into a nearly normal one.

Lyu and Simoncelli (2009): a density that depends on x through ‖L⁻¹(x − m)‖ alone becomes normal if
this radius is mapped to the one that a normal vector would have.
"""

from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import digamma
from scipy.stats import chi
from torch import Tensor

from rnode.quantiles import interpolate, quantile_knots

KNOTS = 20  # quantiles of the radius
ITERATIONS = 100  # of expectation maximization
SMALLEST_RADIUS = 1e-30
RIDGE = 1e-6  # variance that a constant column has at least
LARGEST_NU = 200.0  # degrees of freedom beyond which a t distribution is normal


class Radial:
    """x → h(‖y‖) y / ‖y‖ with y = L⁻¹(x − m).

    With u = log‖y‖, log h is linear between knots in u and beyond them.

    Args:
        mean: m (d,).
        factor: L (d, d), lower triangular.
        knots: u and log h(u) at the knots, (2, KNOTS), both increasing.
    """

    def __init__(self, mean: Tensor, factor: Tensor, knots: Tensor):
        self.mean = mean
        self.factor = factor
        self.knots = knots

    @classmethod
    def fit(cls, x: Tensor, mean: Tensor, factor: Tensor) -> "Radial":
        """Fit the knots to x (N, d), float64, by quantiles; see `fit_t` for the other arguments."""
        y = torch.linalg.solve_triangular(factor, (x - mean).T, upper=False)
        shares = (torch.arange(KNOTS, dtype=x.dtype) + 0.5) / KNOTS
        target = torch.from_numpy(np.log(chi(x.shape[1]).ppf(shares.numpy())))
        return cls(mean, factor, quantile_knots(log_norm(y.T), shares, target))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, d) → (B, d) and log|det|, (B,)."""
        y = torch.linalg.solve_triangular(self.factor, (x - self.mean).T, upper=False).T
        u = log_norm(y)
        log_h, slope = interpolate(u, *self.knots)
        d = x.shape[1]
        log_det = d * (log_h - u) + slope.log() - self.factor.diagonal().log().sum()
        return y * (log_h - u).exp()[:, None], log_det

    def inverse(self, z: Tensor) -> Tensor:
        """z (B, d) → x (B, d)."""
        log_h = log_norm(z)
        u, _ = interpolate(log_h, *self.knots.flip(0))
        return z * (u - log_h).exp()[:, None] @ self.factor.T + self.mean

    def state(self) -> dict[str, Any]:
        """The arguments of this layer."""
        return dict(vars(self))


def log_norm(x: Tensor) -> Tensor:
    """log‖x‖ of x (B, d), finite at 0: (B,)."""
    return x.norm(dim=1).clamp(min=SMALLEST_RADIUS).log()


def fit_t(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Fit a multivariate t distribution to standardized x (N, d) by expectation maximization.

    Returns:
        Its location (d,), the Cholesky factor (d, d) of its scale matrix, and ν, its degrees of
        freedom.
    """
    n, d = x.shape
    mean, covariance, nu = x.mean(0), torch.cov(x.T).reshape(d, d), 5.0
    ridge = RIDGE * torch.eye(d, dtype=x.dtype)
    for _ in range(ITERATIONS):
        before = mean
        factor = torch.linalg.cholesky(covariance + ridge)
        y = torch.linalg.solve_triangular(factor, (x - mean).T, upper=False)
        w = (nu + d) / (nu + y.square().sum(0))
        mean = (w[:, None] * x).sum(0) / w.sum()
        covariance = (w[:, None] * (x - mean)).T @ (x - mean) / n
        rest = 1 + float((w.log() - w).mean()) + digamma((nu + d) / 2) - np.log((nu + d) / 2)

        def slope(nu: float, rest: float = rest) -> float:  # of the expected log-likelihood
            return np.log(nu / 2) - digamma(nu / 2) + rest

        nu = LARGEST_NU if slope(LARGEST_NU) > 0 else brentq(slope, 1e-2, LARGEST_NU)
        if (mean - before).abs().max() < 1e-5:
            break
    return mean, factor, nu
