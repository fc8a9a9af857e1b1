"""A density from Python, an estimator of scikit-learn: fit it or load it, then score and sample."""

import contextlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils.validation import check_array, check_is_fitted
from torch import Tensor

from rnode.app.build import apply_overrides, build, config_of
from rnode.app.fitting import train_table, undisturbed
from rnode.data.conditions import as_array
from rnode.data.tables import as_frame, numbers, read_table
from rnode.errors import InputError, require
from rnode.evaluation import GRID_SAMPLES, Rows, agreeing_grid, solve_and_measure
from rnode.seeding import NOISE, sample_generators
from rnode.training.callbacks import IMAGES, POINTS
from rnode.training.checkpoint import load_checkpoint
from rnode.training.plots import plot_corner, plot_grids
from rnode.training.results import METRICS
from rnode.training.run_folder import checkpoint_of
from rnode.transforms import TableTransform

DIGITS = 12  # of samples of rounded columns, which hide the rounding of their multiples
WEIGHT = "sample_weight"  # the column of weights that are given as an array
Values = Mapping[str, Any]  # of the conditions by name: one value for all samples, or one for each


def load(path: str | Path, trust: Collection[str] = (), cfg: DictConfig | None = None) -> "Density":
    """Load the density that a checkpoint holds, on the CPU; its data are not read.

    Args:
        path: a checkpoint of a run, or the folder of a run, for its best.ckpt.
        trust: your own packages, whose classes the checkpoint may name.
        cfg: of a command, whose values replace those of the run unless they are null.

    Raises:
        InputError: if the file is not a whole checkpoint, or names a class of another package.
    """
    path = checkpoint_of(path) if Path(path).is_dir() else Path(path)
    checkpoint = load_checkpoint(path)
    config = config_of(checkpoint, str(path), trust)
    if cfg is not None:
        apply_overrides(config, cfg)
    data, flow = build(config, checkpoint)
    options = OmegaConf.to_container(config.dataset)
    density = Density(**{name: options[name] for name in Density().get_params() if name in options})
    density.data_, density.flow_ = data, flow.requires_grad_().eval()
    density.validation_bits_ = checkpoint["validation_bits"]
    metrics = path.parent / METRICS
    density.history_ = (
        pl.read_csv(metrics, infer_schema_length=None) if metrics.exists() else pl.DataFrame()
    )
    return density


def from_checkpoint(cfg: DictConfig) -> "Density":
    """Load the density of `cfg.ckpt_path`, changed as the command line asks, on `cfg.device`."""
    density = load(cfg.ckpt_path, cfg.trust, cfg)
    density.seed = cfg.seed
    torch.backends.cudnn.allow_tf32 = False  # an adaptive method would chase its error
    accelerator = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    density.flow_.to(accelerator if cfg.device == "auto" else cfg.device)
    return density


def fit(X: Any, *, sample_weight: Any = None, **parameters: Any) -> "Density":
    """Return `Density(**parameters).fit(X, sample_weight=sample_weight)`."""
    return Density(**parameters).fit(X, sample_weight=sample_weight)


@dataclass(eq=False, repr=False)
class Density(DensityMixin, BaseEstimator):
    """p(x) or p(x | c) of a flow, in the data's own units: an estimator of scikit-learn.

    Rows X are a DataFrame (of polars or pandas), a dictionary of columns, or an array (N, d) of the
    columns in their order. A loaded density may also be one of images: X are then whole numbers
    (N, C, H, W) or, with one channel, (N, H, W). Where a method has a `context`, it gives the
    values of the conditions by their names, one for all rows or one for each; None: X has them.

    A fitted one has `flow_`, the Flow of the transformed data; `data_`, the DataModule with the
    transform; `validation_bits_`, bits/dim of the validation split, ascending; and `history_`, a
    DataFrame of polars with what the run has measured. Samples set `agreement_`, the method by
    which they were computed, in words.

    Args:
        columns: columns to model; None: all numeric ones.
        context: columns to condition on.
        max_time: time after which training stops, as [DD:]HH:MM:SS.
        integer: columns of whole numbers, which are dequantized.
        log: positive columns whose logarithm is modelled.
        logit: columns between two bounds whose logit is modelled, {name: [low, high]}.
        missing: "stop" at a missing value (also None), or "drop" its row.
        split_column: column with the values train, val and test.
        validation: share or number of the rows that choose the best weights.
        test: share or number of the rows on which these are tested.
        folder: new or empty folder that keeps the run; None: nothing is written.
        overrides: further options of `rnode train`, such as "model.hidden=128".
        seed: seed of training; with the number of a row, also of its noise and probes.
        verbose: whether training prints its progress.
    """

    columns: Sequence[str] | None = None
    context: Sequence[str] | None = None
    max_time: str | None = None
    integer: Sequence[str] | None = None
    log: Sequence[str] | None = None
    logit: Mapping[str, Sequence[float]] | None = None
    missing: str | None = None
    split_column: str | None = None
    validation: float | None = None
    test: float | None = None
    folder: str | Path | None = None
    overrides: Sequence[str] = ()
    seed: int = 0
    verbose: bool = False

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        text = super().__repr__(N_CHAR_MAX)
        if not hasattr(self, "flow_"):
            return text
        size = "×".join(map(str, self.flow_.shape))
        facts = [f"images of {size}" if self.columns_ is None else f"{size} columns"]
        if self.data_.hashes:
            facts.append(f"{len(self.data_.hashes['train'])} training rows")
        if len(self.validation_bits_):
            nats = math.log(2) * self.flow_.d * float(self.validation_bits_.mean())
            facts.append(f"{nats:.4f} nats in validation")
        if "val/seconds_total" in self.history_.columns:
            facts.append(f"{self.history_['val/seconds_total'].max():.1f} seconds")
        return f"{text}: {', '.join(facts)}"

    @property
    def columns_(self) -> list[str] | None:
        """The names of the modelled columns of a table; None for images."""
        transform = self.data_.transform
        return transform.names if isinstance(transform, TableTransform) else None

    @property
    def n_features_in_(self) -> int:
        """The number of modelled numbers and of conditions."""
        return self.flow_.d + len(self.data_.conditions.columns)

    @property
    def device(self) -> torch.device:
        return next(self.flow_.parameters()).device

    def fit(
        self, X: Any, y: None = None, sample_weight: Any = None, context: Values | None = None
    ) -> "Density":
        """Train as `rnode train dataset=table` does, and keep the best weights.

        Args:
            X: rows as above, or the path of a file. They hold the columns of the context too.
            y: ignored.
            sample_weight: weights of the rows (N,), 0 or more, or the name of a column of X.
            context: columns that are added to X; unless the parameter names some, all of them are
                what the density is conditioned on.

        Raises:
            InputError: if an argument is invalid.
        """
        options = self.get_params()
        options["weight"] = sample_weight if isinstance(sample_weight, str) else None
        with undisturbed(self.verbose), contextlib.ExitStack() as stack:
            rows = Path(X) if isinstance(X, str | Path) else to_frame(X, least=4)
            columns = {} if context is None else as_frame(context, where="context").to_dict()
            options["context"] = self.context or list(columns) or None
            if sample_weight is not None and options["weight"] is None:
                columns[WEIGHT] = sample_weight
                options["weight"] = WEIGHT
            if columns:
                rows = read_table(rows.expanduser()) if isinstance(rows, Path) else rows
                shared = [name for name in columns if name in rows.columns]
                require(not shared, f"X: has a column {', '.join(shared)} already; rename it")
                rows = as_frame(rows.to_dict() | columns, where="X")
            folder = Path(self.folder or stack.enter_context(TemporaryDirectory())).absolute()
            train_table(rows, folder, **options)
            fitted = vars(load(folder))
        vars(self).update({name: value for name, value in fitted.items() if name.endswith("_")})
        return self

    def score_samples(self, X: Any, context: Values | None = None) -> np.ndarray:
        """log p(x | c) of each row in nats, (N,). For whole numbers it is a lower bound."""
        return self.evaluate(X, context)["log_prob"]

    log_prob = score_samples

    def score(
        self, X: Any, y: None = None, sample_weight: Any = None, context: Values | None = None
    ) -> float:
        """Mean of log p(x | c) of the rows in nats, with weights (N,) if they are given."""
        return float(np.average(self.score_samples(X, context), weights=sample_weight))

    def bits_per_dim(self, X: Any, context: Values | None = None) -> np.ndarray:
        """−log₂ p(x | c) / d of each row, (N,)."""
        return self.evaluate(X, context)["bits_per_dim"]

    def rank(self, X: Any, context: Values | None = None) -> np.ndarray:
        """The share of the validation samples that are more likely than each row, (N,).

        1 is most unusual. It is NaN if the run had not validated before it wrote the checkpoint.
        """
        return self.evaluate(X, context)["rank"]

    @torch.no_grad()
    def evaluate(
        self, X: Any, context: Values | None = None, progress: Callable = iter
    ) -> dict[str, np.ndarray]:
        """Return log_prob in nats, its standard_error due to the probes, bits_per_dim and rank.

        Each is an array (N,); `progress` wraps the iterator of batches.
        """
        check_is_fitted(self)
        seeds = [self.seed] if self.flow_.exact else [self.seed, self.seed + 1]
        parts = [torch.empty(len(seeds), 0)]
        for rows in progress(self.batches(X, context)):
            batch = self.data_.transform.for_evaluation(*rows, self.seed).to(self.device)
            measures = [solve_and_measure(self.flow_, batch, seed)[1] for seed in seeds]
            parts.append(torch.stack([m.bits_per_dim.cpu() for m in measures]))
        draws = torch.cat(parts, dim=1).double()  # a row for each seed of the probes
        bits = draws.mean(0)
        nats = self.flow_.d * np.log(2)
        more_likely = torch.searchsorted(self.validation_bits_.double(), bits)
        return {
            "log_prob": (-nats * bits).numpy(),
            "standard_error": (nats * (draws[0] - bits).abs()).numpy(),
            "bits_per_dim": bits.numpy(),
            "rank": (more_likely / len(self.validation_bits_)).numpy(),
        }

    def contributions(self, X: Any, context: Values | None = None) -> np.ndarray:
        """Return why rows of a table are unusual: the gradient of log p(x | c) by column, (N, d).

        It is per standard deviation of a column, or of its logarithm or logit where these are
        modelled. The likelihood of an unusual row rises most along its largest numbers.
        """
        check_is_fitted(self)
        transform = self.data_.transform
        require(self.columns_ is not None, "contributions: need a table; these data are images")
        parts = [np.empty((0, self.flow_.d))]
        for x, index, c in self.batches(X, context):
            x = x.detach().requires_grad_()
            noise = transform.noise(x, sample_generators(index, self.seed, NOISE))
            batch = transform(x, index, c, noise).to(self.device)
            bits = solve_and_measure(self.flow_, batch, self.seed)[1].bits_per_dim
            (gradient,) = torch.autograd.grad(-self.flow_.d * math.log(2) * bits.sum(), x)
            _, log_slopes = transform.standardize(x.detach(), noise)
            parts.append((gradient / log_slopes.exp()).numpy())
        return np.concatenate(parts)

    @torch.no_grad()
    def sample(
        self, n: int = 1, context: Values | None = None, seed: int | None = None, temperature=1.0
    ) -> Any:
        """Sample `n` rows: uint8 images (n, C, H, W), or a polars DataFrame of the columns.

        They are new ones in every call unless a `seed` is given.
        """
        check_is_fitted(self)
        require(n >= 0, f"n={n}: must be 0 or more")
        c = self.encode_context({} if context is None else context, n).to(self.device)
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        z = self.sample_z(c, seed, temperature)
        batches = torch.arange(n).split(self.data_.eval_batch_size)

        def invert(i: Tensor) -> Tensor:
            return self.flow_.inverse(z[i], c[i]).cpu()

        def values() -> Tensor:
            return self.data_.transform.inverse(invert(batches[0][:GRID_SAMPLES]))

        with agreeing_grid(self.flow_, values, n) as self.agreement_:
            return self.decode(torch.cat([invert(i) for i in batches]))

    def plot(
        self, X: Any = None, n: int | None = None, context: Values | None = None, seed: int = 0
    ) -> Figure:
        """Plot `n` samples, or X and as many samples: pairs of columns, or grids of images."""
        check_is_fitted(self)
        if X is None:
            n = (IMAGES if self.columns_ is None else POINTS) if n is None else n
            return self.draw({"samples": self.sample(n, context, seed)})
        x, table = self.encode(X)
        samples = self.sample(len(x), table if context is None else context, seed)
        return self.draw({"data": x, "samples": samples})

    def draw(self, panels: Mapping[str, Any]) -> Figure:
        """Draw rows or images; `panels` holds them by their titles."""
        x = {title: torch.tensor(np.asarray(rows)) for title, rows in panels.items()}
        if self.columns_ is None:
            top = self.data_.transform.levels - 1
            return plot_grids({title: images / top for title, images in x.items()})
        return plot_corner(x, self.columns_)

    def sample_z(self, c: Tensor, seed: int, temperature: float) -> Tensor:
        """Sample z (n, d) for c (n, k) from the base, equal on all devices."""
        return self.flow_.base.sample(c, temperature, torch.Generator().manual_seed(seed))

    def batches(self, X: Any, context: Values | None) -> list[Rows]:
        """Return the rows as x (B, *shape), their numbers (B,) and c (B, k)."""
        x, table = self.encode(X)
        c = self.encode_context(table if context is None else context, len(x))
        parts = [part.split(self.data_.eval_batch_size) for part in (x, torch.arange(len(x)), c)]
        return list(zip(*parts, strict=True)) if len(x) else []

    def encode(self, X: Any) -> tuple[Tensor, Values | pl.DataFrame]:
        """Return rows as x (N, *shape), and the table that may hold their conditions."""
        transform, shape = self.data_.transform, tuple(self.data_.shape)
        if self.columns_ is None:
            x = torch.from_numpy(as_array(X))
            x = x[:, None] if x.dim() == 3 else x
            top = transform.levels - 1
            grey = x.shape[1:] == shape and bool((x.long().clamp(0, top) == x).all())
            right = f"(N, *{shape}) of whole numbers from 0 to {top}"
            require(grey, f"X: is {tuple(x.shape)} of {x.dtype}; must be {right}")
            return x, {}
        frame = to_frame(X, self.columns_)
        missing = [name for name in self.columns_ if name not in frame.columns]
        require(not missing, f"X: lacks {', '.join(missing)}; the columns are {self.columns_}")
        x = torch.from_numpy(numbers(frame, self.columns_, "X").to_numpy(writable=True))
        for row, column in (~x.isfinite()).nonzero()[:1].tolist():
            value = frame[self.columns_[column]][row]
            raise InputError(f"X: {self.columns_[column]} is {value} in row {row}, not a number")
        transform.require_inside(x)
        return x, frame

    def encode_context(self, context: Any, n: int) -> Tensor:
        """Return what `n` samples are conditioned on, c (n, k), from a dictionary or a table."""
        if not isinstance(context, Mapping):
            frame = as_frame(context)
            known = [name for name in self.data_.conditions.columns if name in frame.columns]
            context = {name: frame[name].to_numpy() for name in known}
        return self.data_.conditions.encode(context, n)

    def decode(self, y: Tensor) -> Any:
        """Return what the flow models, y (N, *shape), as `sample` does."""
        x = self.data_.transform.inverse(y)
        if self.columns_ is None:
            return self.data_.transform.dequantize.inverse(x).numpy()
        columns = self.data_.transform.columns
        types = {column.name: pl.Int64 if column.integer else pl.Float64 for column in columns}
        rounded = [column.name for column in columns if column.unit]
        frame = pl.DataFrame(x.numpy(), types, orient="row")
        return frame.with_columns(pl.col(rounded).round_sig_figs(DIGITS))


def to_frame(X: Any, names: Sequence[str] | None = None, least: int = 0) -> pl.DataFrame:
    """Return rows as a DataFrame, an array with scikit-learn's checks and the columns `names`."""
    if issparse(X) or not any(hasattr(X, name) for name in ("columns", "items", "to_pydict")):
        X = X if issparse(X) else as_array(X)  # check_array refuses a sparse one
        X = check_array(X, dtype=None, ensure_all_finite=False, ensure_min_samples=least)
        if names is not None and X.shape[1] != len(names):
            expected = f"Density is expecting {len(names)} features as input: {', '.join(names)}"
            raise InputError(f"X has {X.shape[1]} features, but {expected}")
    return as_frame(X, names, "X")
