"""Densities in closed form: Gaussians and mixtures of Gaussians of a table, of images and of z.

They are baselines, and bases of flows: before training, of the data, and after it, of z.
"""

import itertools
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from scipy.stats import skew
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from rnode.bases import Gaussian, Mixture
from rnode.data.datamodule import DataModule
from rnode.data.mixtures import MIN_ROWS, TOLERANCE, Parameters, fit_mixture
from rnode.errors import require
from rnode.evaluation import standard_error, weighted_mean
from rnode.flow import Flow
from rnode.loss import bits_per_dim
from rnode.radial import Radial, fit_t
from rnode.transforms import Batch, TableTransform, Transform

SIZES = (4, 16, 64, 256, 1024)  # components
SHRINKAGES = (0.0, 1.0)  # of their covariances
FITS = 16  # of a mixture, whose densities are averaged
TOLERANCE_OF_FITS = 1e-3  # of which more are then made in the same time
ROWS_PER_COLUMN = 50  # for a component and column: more are not used, and fewer need averages
HEAVY_TAILS = 10.0  # degrees of freedom of a t distribution below which a radial layer is tried
ROWS_PER_COMPONENT = 20  # for a component
COMPONENTS = 2048  # of all fits together, at most
COVARIANCES = 1_000_000  # numbers in those of a mixture, at most
NUMBERS = 20_000_000  # in the samples of a Gaussian, and in rows less the means of a mixture
ROWS = 50_000  # that fits use, at most
MAX_ROWS = 200_000  # that fits of many components use if no row has to be solved for z
TAILS = (1.0, 3.0, 10.0)  # standard deviations of the Gaussians that give a mixture broad tails
MAX_DIMENSIONS = 4096  # beyond, a covariance would cost minutes
SKEWNESS = 0.5  # skewness from which the logarithm of a positive column is tried
NOISE_OF_C = 0.1  # labels are unit vectors, whose covariance would be singular


class Candidate(NamedTuple):
    """A density in closed form of a table."""

    label: str  # of the transform
    shrinkage: float
    transform: TableTransform
    base: Mixture
    log_prob: Tensor  # of validation rows in the units of the table, (N,)
    weights: Tensor  # of these rows, (N,)

    @property
    def name(self) -> str:
        return f"{self.label}, {name_of(self.base)}" + (", shrunk" if self.shrinkage else "")

    @property
    def nats(self) -> float:
        """Mean −log p of the validation rows."""
        return -float(weighted_mean(self.log_prob, self.weights))

    def is_behind(self, other: "Candidate", errors: float) -> bool:
        """Whether another candidate is better by more than so many paired standard errors."""
        behind = other.log_prob - self.log_prob
        mean = weighted_mean(behind, self.weights)
        return bool(mean > errors * standard_error(behind, self.weights))

    def is_gaussian_as(self, other: "Candidate") -> bool:
        """Whether this is one Gaussian, after the same transform as another candidate."""
        return size_of(self.base) == 1 and self.transform is other.transform


@torch.no_grad()
def fit_candidates(
    data: DataModule, kind: str, rows: int, seed: int, seconds: float
) -> list[Candidate]:
    """Fit Gaussians and mixtures to transforms of a table.

    Args:
        data: the table, whose splits have been read.
        kind: `gaussian`, `mixture` or `auto`, which tries both.
        rows: number of validation rows that compare the candidates.
        seed: of the dequantization noise and of the mixtures.
        seconds: after so many seconds the fits end.

    Returns:
        The candidates, the best first; see `ranked`.
    """
    end = time.monotonic() + seconds
    x, *_ = rows_of_training(data, ROWS)
    weights = data.splits.weights_of("val")[:rows]
    transforms = transforms_of(data, x)
    batches = {
        name: (
            training_batch(data, transform, seed, ROWS),
            transform.for_evaluation(*data.fetch("val", range(rows)), seed),
        )
        for name, transform in transforms.items()
    }
    candidates: list[Candidate] = []

    def sizes() -> Iterator[int]:
        yield from {"gaussian": (1,), "mixture": SIZES, "auto": (1, *SIZES)}[kind]
        if kind != "gaussian":
            size = size_of(ranked(candidates)[0].base)
            yield 2 * size  # beside the best of SIZES
            yield max(2, size // 2)

    names = list(transforms)
    for size in sizes():
        for shrinkage, name in itertools.product(SHRINKAGES, names):
            train, val = batches[name]
            if candidates and time.monotonic() > end:
                return ranked(candidates)
            large = candidates and too_large(size, train)
            if large or shrinkage not in shrinkages_of(size, train):
                continue
            try:
                base = fit_base(for_fit(train, size), size, seed, end, shrinkage)
            except (ValueError, torch.linalg.LinAlgError):  # too few rows, or they do not vary
                continue
            log_prob = log_prob_of(val, base)
            candidates.append(Candidate(name, shrinkage, transforms[name], base, log_prob, weights))
        require(bool(candidates), f"base={kind}: no mixture can be fitted to so few or such rows")
        names = promising(names, ranked(candidates), size)
    return ranked(candidates)


def promising(names: list[str], best_first: list[Candidate], size: int) -> list[str]:
    """Return the transforms after which larger mixtures are tried, the best first.

    Those of which no candidate comes near the best are given up; four Gaussians tell too little.
    """
    ranks = [each.label for each in best_first]
    names = sorted((name for name in names if name in ranks), key=ranks.index)
    if size <= SIZES[0]:
        return names
    leaders = {name: best_first[ranks.index(name)] for name in names}
    return [name for name in names if not leaders[name].is_behind(best_first[0], errors=2)]


def for_fit(batch: Batch, size: int, least: int = MIN_ROWS) -> Batch:
    """Return as many rows as a mixture of `size` Gaussians needs, and no fewer than `least`."""
    enough = max(least, ROWS_PER_COLUMN * size * columns_of(batch))
    if enough >= len(batch.y):
        return batch
    chosen = torch.arange(enough) * len(batch.y) // enough
    return Batch(*(part[chosen] for part in batch))


def log_prob_of(batch: Batch, base: Mixture) -> Tensor:
    """log p of the samples before their transform, (N,); by parts, which fit into memory."""
    rows = math.ceil(NUMBERS / base.means.numel())
    pairs = zip(batch.y.double().split(rows), batch.c.split(rows), strict=True)
    return torch.cat([base.log_prob(y, c) for y, c in pairs]) + batch.log_det


def columns_of(batch: Batch) -> int:
    """The number of columns that a base is fitted to: those of y and c."""
    return batch.y.shape[1] + batch.c.shape[1]


def too_large(size: int, batch: Batch) -> bool:
    """Whether rows are too few, or have too many columns, for so many Gaussians."""
    return len(batch.y) < size * ROWS_PER_COMPONENT or size * columns_of(batch) ** 2 > COVARIANCES


def few_rows(size: int, batch: Batch) -> bool:
    """Whether a mixture of so many Gaussians would fit the noise of the rows."""
    return size > 1 and len(batch.y) < ROWS_PER_COLUMN * size * columns_of(batch)


def shrinkages_of(size: int, batch: Batch) -> tuple[float, ...]:
    """Return the shrinkages that are tried for so many Gaussians."""
    return SHRINKAGES if few_rows(size, batch) else SHRINKAGES[:1]


def fits_of(size: int, batch: Batch) -> int:
    """Return the number of mixtures of so many Gaussians whose densities are averaged."""
    most = min(COMPONENTS, COVARIANCES // columns_of(batch) ** 2) // size
    return max(1, min(FITS, most)) if few_rows(size, batch) else 1


def ranked(candidates: list[Candidate]) -> list[Candidate]:
    """Return candidates by their validation likelihood, but the simplest of the best ones first.

    That is the best radial one if it is behind the same columns without a radial layer by less than
    two paired standard errors: without heavy tails, a single outlier that is not among the
    validation rows can cost more than all other rows. And it is the smallest mixture after the
    chosen transform that is behind by less than half an error: of larger ones, some are ahead by
    chance.
    """
    candidates = sorted(candidates, key=lambda candidate: candidate.nats)
    first = candidates[0]
    columns = first.transform.columns if first.transform.quantiles is None else ()
    same = [each for each in candidates if each.transform.columns == columns]
    radial = next((each for each in same if each.transform.radial is not None), first)
    if not radial.is_behind(first, errors=2):
        first = radial
    tied = [
        each
        for each in candidates
        if each.transform is first.transform and not each.is_behind(first, errors=0.5)
    ]
    first = min(tied, key=lambda candidate: size_of(candidate.base))
    return [first, *(each for each in candidates if each is not first)]


def transforms_of(data: DataModule, x: Tensor) -> dict[str, TableTransform]:
    """Return the transform of rows x (N, d), that with more logarithms, and each made radial.

    A radial layer needs tails heavier than a normal's. The first has normal columns, by quantiles.
    """
    plain: Any = data.transform
    columns = list(plain.columns)
    if data.arguments.get("log") is None:  # else the user has chosen
        rows = torch.cat([part for part in data.splits.parts if isinstance(part, Tensor)])
        for i, column in enumerate(columns):
            positive = bool((rows[:, i] + column.unit / 2 > 0).all())  # in every split
            if positive and not column.bounds and skew(rows[:, i]) > SKEWNESS:
                columns[i] = column._replace(log=True)
    transforms = {"as it is": plain}
    if columns != list(plain.columns):
        transforms["logarithms"] = TableTransform(columns).fit(x)
    if 1 < x.shape[1] < len(x) / 2:
        for name, transform in list(transforms.items()):
            y, _ = transform.forward(x, torch.full_like(x, 0.5))
            *t, nu = fit_t(y.double())
            if nu < HEAVY_TAILS:
                radial = Radial.fit(y.double(), *t)
                layers = (transform.whitening, radial)
                transforms[f"{name}, radial"] = TableTransform(transform.columns, *layers)
    transforms = {"quantiles": TableTransform(columns).fit(x, quantiles=True)} | transforms
    # The last is the most robust: if there is time for one fit alone, it is the one.
    return dict(reversed(transforms.items()))


def fit_base(
    batch: Batch,
    size: int,
    seed: int,
    end: float = math.inf,
    shrinkage: float = 0.0,
    start: Mixture | None = None,
    fits: int = 1,
) -> Mixture:
    """Fit a mixture of `size` Gaussians to y (N, *shape), given c.

    Of more than one, Gaussians of all rows are further components, each of which counts as one row:
    a row that is far from all others would otherwise cost more than these. For the arguments that
    are not here see `fit_mixture`.

    Args:
        fits: the density is the mean of so many mixtures, from different centres, or of as many as
            the time allows (Ormoneit and Tresp, 1998).
    """
    k = batch.c.shape[1]
    gaussian = fit_linear(batch.c.double(), batch.y.flatten(1).double())
    if size == 1:
        return gaussian
    generator = torch.Generator().manual_seed(seed)
    c = batch.c + NOISE_OF_C * torch.randn(batch.c.shape, generator=generator)
    joint = torch.cat([c, batch.y.flatten(1)], dim=1).double()
    tolerance = TOLERANCE if fits == 1 else TOLERANCE_OF_FITS
    begin = start and without_tails(start)
    mixtures: list[Parameters] = []
    while len(mixtures) < fits:
        fit = fit_mixture(joint, size, seed + len(mixtures), end, shrinkage, begin, tolerance)
        if mixtures and time.monotonic() > end:  # it was cut off
            break
        mixtures.append(fit)
        begin = None
    weights, means, covariances = map(torch.cat, zip(*mixtures, strict=True))
    scales = torch.tensor(TAILS, dtype=torch.float64)
    rows = torch.cat([len(joint) / len(mixtures) * weights, torch.ones_like(scales)])
    tails = scales[:, None, None] * gaussian.factors
    return Mixture(
        rows / rows.sum(),
        torch.cat([means, gaussian.means.expand(len(scales), -1)]),
        torch.cat([covariances, tails @ tails.mT]),
        k,
    )


def without_tails(base: Mixture) -> Parameters:
    """Return a mixture as it was fitted, before the Gaussians of all rows were added."""
    fitted = slice(size_of(base))
    weights, factors = base.log_weights[fitted].double().exp(), base.factors[fitted].double()
    return weights / weights.sum(), base.means[fitted].double(), factors @ factors.mT


def size_of(base: Mixture) -> int:
    """The number of components but for those of the tails."""
    return max(1, len(base.means) - len(TAILS))


def name_of(base: Mixture) -> str:
    size = size_of(base)
    return "a Gaussian" if size == 1 else f"{size} Gaussians"


def fit_linear(c: Tensor, y: Tensor) -> Gaussian:
    """Fit a Gaussian of (c, y) in which y is linear in c, but for noise of a shrunk covariance.

    Ledoit and Wolf (2004) shrink it, so that few samples are enough.
    """
    k = c.shape[1]
    weights = torch.linalg.lstsq(F.pad(c, (1, 0), value=1.0), y).solution
    noise = y - F.pad(c, (1, 0), value=1.0) @ weights
    covariance, _ = ledoit_wolf(noise.numpy(), assume_centered=True)
    slopes = weights[1:]
    of_c = torch.cov(c.T).reshape(k, k) + NOISE_OF_C**2 * torch.eye(k)
    above = torch.cat([of_c, of_c @ slopes], dim=1)
    below = torch.cat([slopes.T @ of_c, slopes.T @ of_c @ slopes + torch.from_numpy(covariance)], 1)
    return Gaussian(torch.cat([c.mean(0), y.mean(0)]), torch.cat([above, below]), k)


@torch.no_grad()
def fit_z(
    data: DataModule, flow: Flow, rows: int, seed: int, seconds: float
) -> tuple[Mixture, Tensor]:
    """Fit mixtures to z of a trained flow.

    A network smooths what mixtures resolve, and mixtures need many components where a flow bends.
    The fit of a base that is a mixture goes on, since it may have been cut off, and larger ones
    follow. Where rows are few, each is the mean of FITS mixtures. It must be better by a paired
    standard error: the best of several on a hundred rows would often be so by chance.

    If the fields are still zero, z is y: training rows are then not solved, and more are used.

    Args:
        data: the table on which the flow was trained.
        flow: the flow, which is then in evaluation mode.
        rows: number of validation rows that compare the mixtures.
        seed: of the dequantization noise and of the mixtures.
        seconds: after so many seconds the fits end.

    Returns:
        The best base, which may be the flow's own, and log p of the validation rows with it,
        (rows,).
    """
    end = time.monotonic() + seconds

    def to_z(batch: Batch) -> Batch:
        device = next(flow.parameters()).device
        states = [
            flow.solve(batch.y[part].to(device), batch.c[part].to(device)).state
            for part in torch.arange(len(batch.y)).split(data.eval_batch_size)
        ]
        z, l, *_ = (torch.cat(parts).cpu() for parts in zip(*states, strict=True))
        return batch._replace(y=z, log_det=batch.log_det + l)

    transform: Any = data.transform
    flow.eval()
    val_y = transform.for_evaluation(*data.fetch("val", range(rows)), seed)
    val = to_z(val_y)
    if torch.allclose(val.y, val_y.y.to(val.y), atol=1e-6):  # as before training, but for rounding
        train = training_batch(data, transform, seed, MAX_ROWS)
    else:
        flow.train()  # its grid is exact enough for a fit, and several times faster
        train = to_z(training_batch(data, transform, seed, ROWS))
        flow.eval()
    weights = data.splits.weights_of("val")[:rows]

    def candidate(base: Mixture, shrinkage: float) -> Candidate:
        return Candidate("z", shrinkage, transform, base, log_prob_of(val, base), weights)

    best = candidate(flow.base.cpu(), SHRINKAGES[0])
    own = chosen = size_of(best.base)
    failures = 0

    def sizes() -> Iterator[int]:
        yield own
        for size in SIZES:
            if size > own and failures < 2:
                yield size
        size, spent = chosen, 0.0
        # While the last is the best, and time is left for another as long. SIZES have been tried.
        while size == chosen and 2 * size not in SIZES and time.monotonic() + spent < end:
            begin = time.monotonic()
            size *= 2
            yield size
            spent = time.monotonic() - begin

    for size in sizes():
        if time.monotonic() > end:
            break
        if too_large(size, train):
            continue
        failures += size > own
        start = best.base if size == own else None
        fits = fits_of(size, train)
        # The shrinkage of the best base comes first.
        for shrinkage in sorted(shrinkages_of(size, train), key=best.shrinkage.__ne__):
            base = fit_base(for_fit(train, size, ROWS), size, seed, end, shrinkage, start, fits)
            other = candidate(base, shrinkage)
            if best.is_behind(other, errors=1):
                best = other
                chosen = size
                failures = 0
                break
    return best.base, best.log_prob


@torch.no_grad()
def fit_gaussian(data: DataModule, flow: Flow, seed: int) -> Gaussian:
    """Fit the Gaussian of z of a flow whose fields are zero."""
    require(flow.d <= MAX_DIMENSIONS, f"base=gaussian: needs at most {MAX_DIMENSIONS} dimensions")
    batch = training_batch(data, data.transform, seed, NUMBERS // flow.d)
    return fit_base(batch._replace(y=flow.as_z(batch.y)), 1, seed)


@torch.no_grad()
def gaussian_bits(data: DataModule, rows: int, seed: int) -> float | None:
    """Return bits/dim of the first `rows` of the validation data under a Gaussian of all data.

    None: they are too large, or do not vary.
    """
    d = math.prod(data.shape)
    if d > MAX_DIMENSIONS or rows == 0:
        return None
    try:
        base = fit_base(training_batch(data, data.transform, seed, NUMBERS // d), 1, seed)
    except torch.linalg.LinAlgError:
        return None
    batch = data.transform.for_evaluation(*data.fetch("val", range(rows)), seed)
    log_prob = base.log_prob(batch.y.flatten(1).double(), batch.c)
    bits = bits_per_dim(log_prob, batch.log_det, d)
    return float(weighted_mean(bits, data.splits.weights_of("val")[:rows]))


def training_batch(data: DataModule, transform: Transform, seed: int, most: int) -> Batch:
    """Return at most so many training samples, transformed with uniform noise."""
    generator = torch.Generator().manual_seed(seed)
    return transform(*rows_of_training(data, most), generator=generator)


def rows_of_training(data: DataModule, most: int) -> tuple[Tensor, Tensor, Tensor]:
    return data.fetch("train", data.splits.represent(most))
