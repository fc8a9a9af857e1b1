"""What turns data into y, which a flow models: dequantization, logit, standardization, whitening.

Each transform has an inverse and a log-determinant.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnode.errors import InputError, require
from rnode.quantiles import Quantiles
from rnode.radial import Radial
from rnode.seeding import NOISE, sample_generators

VARIANCE_FLOOR = 1e-6  # share of the largest variance; directions with less are not scaled up

Rows = tuple[Tensor, Tensor, Tensor]  # data x (B, *shape), their indices (B,) and c (B, k)


class Batch(NamedTuple):
    """Transformed data: y (B, *shape), log|det dy/dx| (B,), index of each in its split (B,), and
    the numbers c (B, k) on which each is conditioned."""

    y: Tensor
    log_det: Tensor
    index: Tensor
    c: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(part.to(device) for part in self))


class Transform(ABC):
    """From data x to what the flow models, y."""

    discrete: bool  # whether x holds whole numbers, so that log p(y) bounds a discrete likelihood

    @abstractmethod
    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """x, noise in [0, 1) (B, *shape) → y (B, *shape) and log|det dy/dx| (B,)."""

    @abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """y (B, *shape) → x (B, *shape)."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Plain containers of what was fitted to the data."""

    def __call__(
        self,
        x: Tensor,
        index: Tensor,
        c: Tensor,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Batch:
        """Transform x (B, *shape) with `noise` (B, *shape), by default uniform on [0, 1)."""
        if noise is None:
            noise = torch.rand(x.shape, generator=generator, device=x.device)
        return Batch(*self.forward(x, noise.to(x.device)), index, c)

    def noise(self, x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Sample uniform noise for x (B, *shape), from one generator for each sample."""
        return torch.stack([torch.rand(x.shape[1:], generator=g) for g in generators])

    def for_evaluation(self, x: Tensor, index: Tensor, c: Tensor, seed: int) -> Batch:
        """Transform x (B, *shape) with the noise that belongs to each sample and `seed`."""
        return self(x, index, c, self.noise(x, sample_generators(index, seed, NOISE)))


class Dequantize:
    """u = (x + noise) / levels: grey levels x in {0, …, levels − 1} to u in [0, 1).

    With uniform noise, E[log p(u)] − d log(levels) is a lower bound on the discrete log p(x).
    """

    def __init__(self, levels: int = 256):
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


class ImageTransform(Transform):
    """Images of grey levels: dequantization, then the logit."""

    discrete = True

    def __init__(self, levels: int, alpha: float):
        self.dequantize = Dequantize(levels)
        self.logit = Logit(alpha)

    @property
    def levels(self) -> int:
        return self.dequantize.levels

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        u, log_det_u = self.dequantize(x, noise)
        y, log_det_y = self.logit(u)
        return y, log_det_u + log_det_y

    def inverse(self, y: Tensor) -> Tensor:
        """y (B, *shape) → images in [0, 1], (B, *shape)."""
        return self.logit.inverse(y).clamp(0, 1)

    def state(self) -> dict[str, Any]:
        """The arguments of this transform."""
        return {"levels": self.levels, "alpha": self.logit.alpha}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "ImageTransform":
        return cls(**state)


class Column(NamedTuple):
    """How a column of a table becomes a coordinate of y.

    Multiples of a `unit`, counted from `origin`, are dequantized. Then a positive column may have
    its logarithm taken, and one between two bounds its logit. The result is standardized by `mean`
    and `std`.
    """

    name: str
    unit: float = 0.0  # 1 for whole numbers, 0 for a continuous column
    origin: float = 0.0
    log: bool = False
    bounds: tuple[float, float] | None = None
    mean: float = 0.0
    std: float = 1.0

    @property
    def integer(self) -> bool:
        """Whether it holds whole numbers."""
        return self.unit == 1 and self.origin % 1 == 0

    @property
    def given_bounds(self) -> tuple[float, float] | None:
        """The bounds of x, which are those of x + noise but for the unit."""
        return self.bounds and (self.bounds[0], round(self.bounds[1] - self.unit, 9))

    def require_inside(self, x: Tensor) -> None:
        """Raise InputError unless this column takes the values x (N,)."""
        wrong = x[~self(x, torch.full_like(x, 0.5))[0].isfinite()]
        right = "positive, as its logarithm is modelled" if self.log else "finite"
        if self.given_bounds:
            right = "between {:g} and {:g}".format(*self.given_bounds)
        if self.integer and len(wrong) == 0:
            wrong = x[x != x.round()]
            right = "a whole number"
        for value in wrong[:1].tolist():
            raise InputError(f"{self.name}={value:g}: must be {right}")

    def __call__(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """x, noise (B,) → y (B,) and log|dy/dx| (B,)."""
        u = x + self.unit * noise
        log_det = torch.full_like(u, -math.log(self.std))
        if self.log:
            u = u.log()
            log_det = log_det - u
        elif self.bounds is not None:
            low, high = self.bounds
            log_s, log_1_s = ((u - low) / (high - low)).log(), ((high - u) / (high - low)).log()
            u = log_s - log_1_s
            log_det = log_det - log_s - log_1_s - math.log(high - low)
        return (u - self.mean) / self.std, log_det

    def inverse(self, y: Tensor) -> Tensor:
        """y (B,) → x (B,)."""
        u = y * self.std + self.mean
        if self.log:
            u = u.exp()
        elif self.bounds is not None:
            u = self.bounds[0] + (self.bounds[1] - self.bounds[0]) * u.sigmoid()
        return self.origin + ((u - self.origin) / self.unit).floor() * self.unit if self.unit else u


class TableTransform(Transform):
    """Rows of a table x (B, d), in float64.

    Each column is transformed and standardized, and made normal if there are `quantiles`. Then
    `whitening` (d, d), if there is one, makes the columns uncorrelated, and a radial layer may
    follow. log p(x) is in the table's own units.
    """

    def __init__(
        self,
        columns: Sequence[Column],
        whitening: Tensor | None = None,
        radial: Radial | None = None,
        quantiles: Quantiles | None = None,
    ):
        self.columns = tuple(columns)
        self.whitening = whitening
        self.radial = radial
        self.quantiles = quantiles
        self.log_det_whitening = 0.0 if whitening is None else float(whitening.slogdet()[1])
        self.discrete = any(column.unit for column in columns)

    @property
    def names(self) -> list[str]:
        return [column.name for column in self.columns]

    def fit(self, x: Tensor, quantiles: bool = False) -> "TableTransform":
        """Return the same transform with the standardization and whitening of x (N, d).

        With `quantiles` each column is also made normal.
        """
        require(len(x) > 1, "the training split has 1 row, which is too few")
        self.require_inside(x)
        noise = torch.full_like(x, 0.5)
        if quantiles:
            noise.uniform_(generator=torch.Generator().manual_seed(0))
        columns = []
        for column, values, u in zip(self.columns, x.T, noise.T, strict=True):
            y, _ = column._replace(mean=0.0, std=1.0)(values, u)
            std = float(y.std(correction=0)) if y.min() < y.max() else 1.0
            require(math.isfinite(std), f"{column.name}: its values are too far apart to be scaled")
            columns.append(column._replace(mean=float(y.mean()), std=std))
        y, _ = TableTransform(columns).standardize(x, noise)
        layer = Quantiles.fit(y) if quantiles else None
        y = y if layer is None else layer.forward(y)[0]
        variances, directions = torch.linalg.eigh(torch.cov(y.T).reshape(2 * x.shape[1:]))
        require(bool(variances.max() > 0), "no column varies in the training split")
        floor = VARIANCE_FLOOR * variances.max()
        whitening = directions / variances.clamp(min=floor).sqrt()
        return TableTransform(columns, whitening, quantiles=layer)

    def standardize(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """x, noise (B, d) → standardized columns (B, d) and log|dy/dx| of each, (B, d)."""
        parts = zip(self.columns, x.double().T, noise.double().T, strict=True)
        parts = (column(values, u) for column, values, u in parts)
        columns, log_slopes = zip(*parts, strict=True)
        return torch.stack(columns, 1), torch.stack(log_slopes, 1)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        noise = noise.clamp(min=torch.finfo(noise.dtype).tiny)  # the logarithm of 0 is infinite
        y, log_slopes = self.standardize(x, noise)
        log_det = log_slopes.sum(1) + self.log_det_whitening
        if self.quantiles is not None:
            y, log_det_quantiles = self.quantiles.forward(y)
            log_det = log_det + log_det_quantiles
        y = y if self.whitening is None else y @ self.whitening
        if self.radial is not None:
            y, log_det_radial = self.radial.forward(y)
            log_det = log_det + log_det_radial
        return y.float(), log_det.float()

    def require_inside(self, x: Tensor) -> None:
        """Raise InputError unless each column of x (N, d) takes its values."""
        for column, values in zip(self.columns, x.T, strict=True):
            column.require_inside(values)

    def inverse(self, y: Tensor) -> Tensor:
        """y (B, d) → x (B, d), float64."""
        y = y.double().cpu()
        y = y if self.radial is None else self.radial.inverse(y)
        y = y if self.whitening is None else torch.linalg.solve(self.whitening, y, left=False)
        y = y if self.quantiles is None else self.quantiles.inverse(y)
        parts = zip(self.columns, y.T, strict=True)
        return torch.stack([column.inverse(values) for column, values in parts], dim=1)

    def state(self) -> dict[str, Any]:
        """Plain containers, from which `from_state` makes this transform."""
        columns = {column.name: column._asdict() for column in self.columns}
        layers = {"radial": self.radial, "quantiles": self.quantiles}
        states = {name: layer and layer.state() for name, layer in layers.items()}
        return {"columns": columns, "whitening": self.whitening} | states

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "TableTransform":
        columns = [Column(**column) for column in state["columns"].values()]
        radial, quantiles = state.get("radial"), state.get("quantiles")
        return cls(
            columns,
            state["whitening"],
            radial and Radial(**radial),
            quantiles and Quantiles(**quantiles),
        )
