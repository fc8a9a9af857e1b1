"""A trained density from Python: load a checkpoint or fit rows, then score and sample."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from rnode.app.build import load_flow
from rnode.app.quoting import quote
from rnode.data.datamodule import DataModule, require_finite
from rnode.data.tables import read_table
from rnode.errors import require
from rnode.evaluation import solve_and_measure
from rnode.flow import Flow
from rnode.training.checkpoint import load_checkpoint
from rnode.transforms import TableTransform

Given = Mapping[str, Any] | None  # values of the context columns: one for all, or one a sample


def load(path: str | Path, trust: Sequence[str] = ()) -> "Density":
    """Load the density that a checkpoint holds, on the CPU; its data are not read.

    Args:
        path: a checkpoint of a run, or the folder of a run, for its best.ckpt.
        trust: your own packages, whose classes the checkpoint may name.

    Raises:
        InputError: if the file is not a whole checkpoint, or names a class of another package.
    """
    path = Path(path) / "best.ckpt" if Path(path).is_dir() else path
    return Density(*load_flow(str(path), trust=trust), load_checkpoint(path)["validation_bits"])


class Density:
    """p(x) or p(x | c) of a trained flow, in the data's own units.

    Tables are DataFrames (of polars or pandas), dictionaries of columns, or arrays (N, d) of the
    columns in their order; images are whole numbers (N, C, H, W) or, with one channel, (N, H, W).

    Args:
        data: what the flow was trained on; its splits are not needed.
        flow: the flow, in evaluation mode.
        validation_bits: bits/dim of the validation split, ascending.
        seed: seed of the dequantization noise and of the probes; x has those of its row's number.
    """

    def __init__(self, data: DataModule, flow: Flow, validation_bits: Tensor, seed: int = 0):
        self.data, self.flow, self.seed = data, flow, seed
        self.validation_bits = validation_bits

    @property
    def columns(self) -> list[str] | None:
        """The names of the modelled columns of a table; None for images."""
        table = isinstance(self.data.transform, TableTransform)
        return [column.name for column in self.data.transform.columns] if table else None

    def log_prob(self, rows: Any, context: Given = None) -> np.ndarray:
        """log p(x | c) of each row in nats, (N,). For whole numbers it is a lower bound."""
        return self.score(rows, context)["log_prob"]

    def bits_per_dim(self, rows: Any, context: Given = None) -> np.ndarray:
        """−log₂ p(x | c) / d of each row, (N,)."""
        return self.score(rows, context)["bits_per_dim"]

    def score(
        self, rows: Any, context: Given = None, progress: Callable = iter
    ) -> dict[str, np.ndarray]:
        """Return log_prob in nats, its standard error due to the probes, bits_per_dim and rank.

        The rank is the share of the validation samples that are more likely: 1 is most unusual. It
        is NaN if the checkpoint was written before the first validation of its run.

        Args:
            rows: the samples.
            context: what each is given; a DataFrame of rows may hold these columns itself.
            progress: wraps the iterator of batches, as rich.progress.track does.
        """
        x, c = self.encode(rows, context)
        index, size = torch.arange(len(x)), self.data.eval_batch_size
        parts = [self._score(x[i], i, c[i]) for i in progress(index.split(size))]
        bits, error = (torch.cat(values).double() for values in zip(*parts, strict=True))
        nats = self.flow.d * np.log(2)
        more_likely = torch.searchsorted(self.validation_bits.double(), bits)
        columns = {"log_prob": -nats * bits, "standard_error": nats * error, "bits_per_dim": bits}
        columns["rank"] = more_likely / len(self.validation_bits)
        return {name: values.numpy() for name, values in columns.items()}

    @torch.no_grad()
    def _score(self, x: Tensor, index: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean bits/dim over two sets of probes, and its standard error, (B,) each."""
        batch = self.data.transform.for_evaluation(x, index, context, self.seed)
        batch = batch.to(next(self.flow.parameters()).device)
        first = solve_and_measure(self.flow, batch, self.seed)[1].bits_per_dim.cpu()
        if self.flow.test_probes.divergence == "exact":
            return first, torch.zeros_like(first)
        second = solve_and_measure(self.flow, batch, self.seed + 1)[1].bits_per_dim.cpu()
        return (first + second) / 2, (first - second).abs() / 2

    def sample(
        self, n: int = 1, context: Given = None, seed: int | None = None, temperature: float = 1.0
    ) -> Any:
        """Sample `n` rows: uint8 images (n, C, H, W), or a polars DataFrame of the columns."""
        c = self.encode_context(context, n)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed if seed is None else seed)
            z = temperature * torch.randn(n, self.flow.d)
        device, size = next(self.flow.parameters()).device, self.data.eval_batch_size
        parts = zip(z.split(size), c.split(size), strict=False)
        with torch.no_grad():
            y = [self.flow.inverse(part.to(device), given).cpu() for part, given in parts]
        return self.decode(torch.cat(y))

    def decode(self, y: Tensor) -> Any:
        """Return what the flow models, y (N, *shape), as the kind of data that it was fit to."""
        x = self.data.transform.inverse(y)
        if self.columns is not None:
            integer = [column.name for column in self.data.transform.columns if column.integer]
            frame = pl.DataFrame(x.numpy(), schema=self.columns, orient="row")
            return frame.with_columns(pl.col(integer).cast(pl.Int64))
        return self.data.transform.dequantize.inverse(x).numpy()

    def encode(self, rows: Any, context: Given = None) -> tuple[Tensor, Tensor | None]:
        """Return rows as x (N, *shape) and what each is given, (N, k), as numbers."""
        frame = as_frame(rows) if self.columns is not None else None
        if frame is not None:
            names = list(self.columns)
            if frame.width == len(names) and all(c.startswith("column_") for c in frame.columns):
                frame = frame.rename(dict(zip(frame.columns, names, strict=True)))
            missing = [name for name in names if name not in frame.columns]
            require(not missing, f"rows: lack {', '.join(missing)}; the columns are {names}")
            for name in names:
                number = frame[name].dtype.is_numeric() or frame[name].dtype == pl.Boolean
                require(number, f"rows: column {name} must hold numbers, not {frame[name].dtype}")
            x = frame.select(pl.col(names).cast(pl.Float64)).to_torch()
            require_finite(x, "the rows (NaN is a missing value)")
            self.data.transform.require_inside(x)
            if context is None and self.data.context is not None:
                given = [name for name in self.data.context.columns if name in frame.columns]
                context = {name: frame[name].to_numpy() for name in given}
        else:
            x = self.as_samples(rows)
        return x, self.encode_context(context, len(x))

    def as_samples(self, rows: Any) -> Tensor:
        """Return images or vectors (N, *shape) after checking their shape, type and range."""
        shape, levels = tuple(self.data.shape), self.data.transform.levels
        x = torch.as_tensor(np.asarray(rows))
        if x.dim() == len(shape) and shape[0] == 1 and len(shape) == 3:
            x = x[:, None]
        found = f"rows of shape {tuple(x.shape)} and type {x.dtype}".replace("torch.", "")
        require(x.shape[1:] == shape, f"{found}: must be (N, {', '.join(map(str, shape))})")
        whole = not x.is_floating_point() and not x.is_complex()
        require(whole, f"{found}: must be grey levels, whole numbers from 0 to {levels - 1}")
        inside = len(x) == 0 or (int(x.min()) >= 0 and int(x.max()) < levels)
        require(inside, f"rows from {x.min()} to {x.max()}: must be from 0 to {levels - 1}")
        return x

    def encode_context(self, context: Given, n: int) -> Tensor | None:
        """Return what `n` samples are given, (n, k): each column has one value or `n`."""
        if self.data.context is None:
            require(not context, "context: must be left out; this density has no conditions")
            return torch.empty(n, 0)
        names = list(self.data.context.columns)
        other = [name for name in context or {} if name not in names]
        require(not other, f"context.{', context.'.join(other)}: the conditions are {names}")
        values = {name: np.atleast_1d(np.asarray(v)) for name, v in (context or {}).items()}
        for name, given in values.items():
            require(
                len(given) in (1, n), f"context.{name}: has {len(given)} values for {n} samples"
            )
        return self.data.context.encode({k: np.broadcast_to(v, n) for k, v in values.items()})


def fit(
    rows: Any,
    columns: Sequence[str] | None = None,
    context: Sequence[str] | None = None,
    integer: Sequence[str] | None = None,
    log: Sequence[str] | None = None,
    logit: Mapping[str, Sequence[float]] | None = None,
    max_time: str | None = None,
    folder: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> "Density":
    """Train on a table as `rnode train dataset=table` does, and return the best density.

    Args:
        rows: a DataFrame, a dictionary of columns, an array (N, d) or the path of a file.
        columns: the columns whose density is modelled; None: all numeric ones but `context`.
        context: the columns on which the density is conditioned.
        integer: the columns of whole numbers, which are dequantized.
        log: the positive columns whose logarithm is modelled.
        logit: the columns between two bounds, {name: [low, high]}, whose logit is modelled.
        max_time: time after which training stops, as [DD:]HH:MM:SS.
        folder: the run folder; None: a new one in outputs/table.
        overrides: further options of the command line, such as "model.hidden=128".
    """
    from rnode.app.cli import run  # it imports the commands, which import this module

    place = Path(folder or f"outputs/table/{time.strftime('%Y-%m-%d_%H-%M-%S')}").absolute()
    path = Path(rows).absolute() if isinstance(rows, str | Path) else place / "rows.parquet"
    if path.parent == place:
        place.mkdir(parents=True, exist_ok=True)
        as_frame(rows).write_parquet(path)
    options = {"path": str(path), "columns": columns, "context": context, "integer": integer}
    options |= {"log": log, "logit": logit}
    given = [f"dataset.{key}={override(v)}" for key, v in options.items() if v is not None]
    given += [] if max_time is None else [f"trainer.max_time={max_time}"]
    place_of_run = f"hydra.run.dir={quote(str(place))}"
    run("train", ["dataset=table", *given, place_of_run, *overrides], contextlib.nullcontext)
    best = place / "best.ckpt"
    return load(best if best.exists() else place / "last.ckpt")


def override(value: Any) -> str:
    """Write a value as Hydra reads it on a command line."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{quote(k)}:{override(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str):
        return quote(value)
    return f"[{','.join(map(override, value))}]" if isinstance(value, Sequence) else str(value)


def as_frame(rows: Any) -> pl.DataFrame:
    """Return a table as a DataFrame; the columns of an array are column_0, column_1, …."""
    if isinstance(rows, pl.DataFrame):
        return rows
    if isinstance(rows, str | Path):
        return read_table(Path(rows).expanduser())
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # of pandas
        return pl.DataFrame({str(name): rows[name].to_numpy() for name in rows.columns})
    if isinstance(rows, Mapping):
        return pl.DataFrame(dict(rows))
    array = np.asarray(rows)
    require(array.ndim == 2, f"rows of shape {array.shape}: must be (N, columns)")
    names = [f"column_{i}" for i in range(array.shape[1])]
    return pl.DataFrame(array, schema=names, orient="row")
