"""Mixtures of Gaussians by expectation maximization.

The log-density of a Gaussian is linear in e eᵀ, where e = (1, x), so each of the two steps is one
matrix product for all components. The rows are in blocks: parameters are updated after each of
them, with the latest sums of all (Neal and Hinton, 1998), which takes several times fewer passes.

The products are computed in float32. Rows far from the origin stay in float64: in float32, the
rounding error of their squares would exceed the variance of a narrow component.
"""

import math
import time

import torch
import torch.nn.functional as F
from sklearn.cluster import kmeans_plusplus
from torch import Tensor

BLOCKS = 10  # of rows
PASSES = 100  # over all rows, at most
TOLERANCE = 2e-4  # nats, see `fit_mixture`
RIDGE = 1e-4  # added to the variances of a component; those of all rows are about 1
ROW_FLOOR = 1e-3  # rows that a component has at least: of fewer, sums are errors of rounding
FAR = 5.0  # standard deviations of a column; the square times float32's epsilon is far below RIDGE
LEAST_LOG = -80.0  # of the share of a component in a row: exp is slow where it underflows
MIN_ROWS = 5_000  # of a fit, and of the choice of its centres, if the table has so many
ROWS_PER_CENTRE = 10  # of the choice of the centres, if this makes more
NUMBERS = 500_000  # that a processor's cache holds

Parameters = tuple[Tensor, Tensor, Tensor]  # weights (J,), means (J, d), covariances (J, d, d)


def fit_mixture(
    x: Tensor,
    size: int,
    seed: int,
    end: float = math.inf,
    shrinkage: float = 0.0,
    start: Parameters | None = None,
    tolerance: float = TOLERANCE,
) -> Parameters:
    """Fit `size` Gaussians with full covariances to rows x (N, d), float64.

    A fit that is cut off by the time is a mixture as well.

    Args:
        x: the rows.
        size: number J of components.
        seed: of the order of the rows, and of the centres.
        end: value of time.monotonic() at which the fit ends.
        shrinkage: of the covariances, see `maximize`.
        start: the mixture at which the fit begins; None: the centres of k-means++.
        tolerance: nats of a row and column by which a pass must raise the likelihood to go on.
    """
    n, d = x.shape
    x = x[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
    blocks = [chunks(block, size) for block in x.split(math.ceil(n / BLOCKS))]
    sums = x.new_zeros(len(blocks), size, (1 + d) ** 2)
    if start is None:
        some = x[: max(MIN_ROWS, ROWS_PER_CENTRE * size)].numpy()
        centres, _ = kmeans_plusplus(some, size, random_state=seed, n_local_trials=1)
        for block, total in zip(blocks, sums, strict=True):
            for y in block:
                nearest = torch.cdist(y, torch.from_numpy(centres).to(y)).argmin(1)
                total.index_add_(0, nearest, statistics(y).double())
    else:
        for block, total in zip(blocks, sums, strict=True):
            expect(block, start, total)
    before, all_sums = -math.inf, sums.sum(0)
    for _ in range(PASSES):
        log_likelihood = 0.0
        for block, total in zip(blocks, sums, strict=True):
            if time.monotonic() > end:
                return maximize(all_sums, shrinkage)
            all_sums -= total
            log_likelihood += expect(block, maximize(all_sums + total, shrinkage), total)
            all_sums += total
        log_likelihood /= n * d
        if log_likelihood < before + tolerance:
            break
        before = log_likelihood
    return maximize(all_sums, shrinkage)


def chunks(x: Tensor, size: int) -> list[Tensor]:
    """Return rows x (N, d) in parts: a cache holds their statistics and `size` densities of each.

    This makes a pass over rows of three columns five times as fast for 256 components. Rows that
    are FAR from the origin stay in float64.
    """
    rows = math.ceil(NUMBERS / ((1 + x.shape[1]) ** 2 + size))
    far = (x.abs() > FAR).any(1)
    parts = [part for part in (x[~far].float(), x[far]) if len(part)]
    return [chunk for part in parts for chunk in part.split(rows)]


def statistics(x: Tensor) -> Tensor:
    """x (N, d) → e eᵀ of e = (1, x), (N, (1 + d)²)."""
    e = F.pad(x, (1, 0), value=1.0)
    return (e[:, :, None] * e[:, None, :]).flatten(1)


def expect(block: list[Tensor], mixture: Parameters, sums: Tensor) -> float:
    """Return log p(x) of all rows, and set `sums` of the statistics for each component."""
    factors = factors_of_statistics(*mixture).T
    factors_in = {dtype: factors.to(dtype) for dtype in (torch.float32, torch.float64)}
    sums.zero_()
    log_likelihood = 0.0
    for moments in map(statistics, block):
        log_joint = moments @ factors_in[moments.dtype]
        largest = log_joint.amax(1, keepdim=True)
        # logsumexp and then exp would take twice as long
        joint = log_joint.sub_(largest).clamp_(min=LEAST_LOG).exp_()
        total = joint.sum(1, keepdim=True)
        joint /= total
        # A product is up to nine times as fast if the smaller of the two matrices comes first.
        small = joint.shape[1] < moments.shape[1]
        sums += joint.T @ moments if small else (moments.T @ joint).T
        log_likelihood += float((largest + total.log()).sum())
    return log_likelihood


def factors_of_statistics(weights: Tensor, means: Tensor, covariances: Tensor) -> Tensor:
    """Return the factors of the statistics in log p(x, j), (J, (1 + d)²)."""
    factors = torch.linalg.cholesky(covariances)
    precisions = torch.cholesky_inverse(factors)
    slopes = (precisions @ means[:, :, None]).squeeze(2)
    log_det = factors.diagonal(dim1=1, dim2=2).log().sum(1)
    squares = means.shape[1] * math.log(2 * math.pi) + (means * slopes).sum(1)
    constants = weights.log() - log_det - squares / 2
    factors_of_e = F.pad(-precisions / 2, (1, 0, 1, 0))
    factors_of_e[:, 0] = torch.cat([constants[:, None], slopes], dim=1)
    return factors_of_e.flatten(1)


def maximize(sums: Tensor, shrinkage: float = 0.0) -> Parameters:
    """Sums of the statistics for each component (J, (1 + d)²) → the likeliest mixture.

    A component counts as if shrinkage · d more rows had the mean covariance of all components, as
    in regularized discriminant analysis (Friedman, 1989).
    """
    d = math.isqrt(sums.shape[1]) - 1
    rows = sums[:, 0].clamp(min=ROW_FLOOR)
    moments = (sums / rows[:, None]).unflatten(1, (1 + d, 1 + d))
    means = moments[:, 0, 1:]
    covariances = moments[:, 1:, 1:] - means[:, :, None] * means[:, None, :]
    share = (rows / (rows + shrinkage * d))[:, None, None]
    weights = rows / rows.sum()
    pooled = torch.einsum("j,jkl->kl", weights, covariances)
    covariances = share * covariances + (1 - share) * pooled + RIDGE * torch.eye(d).to(sums)
    return weights, means, covariances
