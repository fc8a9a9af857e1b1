"""A trained density from Python: load a checkpoint or fit rows, then score and sample."""

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from hydra.core.hydra_config import HydraConfig
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor

from rnode.app import train
from rnode.app.build import apply_overrides, build, config_of
from rnode.app.processes import prepare_process
from rnode.app.schema import CONF
from rnode.app.validation import compose_config, validate
from rnode.data.datamodule import DataModule, require_finite
from rnode.errors import InputError, require
from rnode.evaluation import solve_and_measure
from rnode.flow import Flow
from rnode.training.checkpoint import flow_weights, load_checkpoint
from rnode.training.run_folder import lock
from rnode.transforms import TableTransform

Values = Mapping[str, Any]  # of the conditions by name: one value for all samples, or one for each


def load(
    path: str | Path,
    trust: Collection[str] = (),
    folders: Sequence[Path] = (CONF,),
    change: Callable[[DictConfig], None] = lambda config: None,
) -> "Density":
    """Load the density that a checkpoint holds, on the CPU; its data are not read.

    Args:
        path: a checkpoint of a run, or the folder of a run, for its best.ckpt.
        trust: your own packages, whose classes the checkpoint may name.
        folders: the folders of configuration files, whose classes the checkpoint may name too.
        change: called with the configuration of the run, to change it before it is used.

    Raises:
        InputError: if the file is not a whole checkpoint, or names a class of another package.
    """
    path = Path(path) / "best.ckpt" if Path(path).is_dir() else path
    checkpoint = load_checkpoint(path)
    config = config_of(checkpoint, str(path), trust, folders)
    change(config)
    data, flow = build(config, checkpoint["DataModule"])
    flow.load_state_dict(flow_weights(checkpoint), assign=True)
    return Density(data, flow.requires_grad_().eval(), checkpoint["validation_bits"])


def from_checkpoint(cfg: DictConfig) -> tuple["Density", Fabric]:
    """Load the density of `cfg.ckpt_path`, changed as the command line asks.

    The flow is on `cfg.device`.
    """
    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    folders = [Path(s.path) for s in hydra.runtime.config_sources if s.schema == "file"]
    change = partial(apply_overrides, cfg=cfg, overrides=overrides)
    density = load(cfg.ckpt_path, cfg.trust, folders, change)
    density.seed = cfg.seed
    torch.backends.cudnn.allow_tf32 = False  # an adaptive method would chase its error
    fabric = Fabric(accelerator=cfg.device, devices=1)
    fabric.launch()
    density.flow.to(fabric.device)
    return density, fabric


class Density:
    """p(x) or p(x | c) of a trained flow, in the data's own units.

    Tables are DataFrames (of polars or pandas), dictionaries of columns, or arrays (N, d) of the
    columns in their order; images are whole numbers (N, C, H, W) or, with one channel, (N, H, W).

    Args:
        data: what the flow was trained on; its splits are not needed.
        flow: the flow, in evaluation mode.
        validation_bits: bits/dim of the validation split, ascending.
        seed: seed of the dequantization noise and of the probes; x has those of its row's number.

    Attributes:
        columns: the names of the modelled columns of a table; None for images.
    """

    def __init__(self, data: DataModule, flow: Flow, validation_bits: Tensor, seed: int = 0):
        self.data = data
        self.flow = flow
        self.validation_bits = validation_bits
        self.seed = seed
        table = isinstance(data.transform, TableTransform)
        self.columns = data.transform.names if table else None

    def log_prob(self, rows: Any, context: Values | None = None) -> np.ndarray:
        """log p(x | c) of each row in nats, (N,). For whole numbers it is a lower bound."""
        return self.score(rows, context)["log_prob"]

    def bits_per_dim(self, rows: Any, context: Values | None = None) -> np.ndarray:
        """−log₂ p(x | c) / d of each row, (N,)."""
        return self.score(rows, context)["bits_per_dim"]

    def score(
        self, rows: Any, context: Values | None = None, progress: Callable = iter
    ) -> dict[str, np.ndarray]:
        """Return log_prob in nats, its standard error due to the probes, bits_per_dim and rank.

        The rank is the share of the validation samples that are more likely: 1 is most unusual. It
        is NaN if the checkpoint was written before the first validation of its run.

        Args:
            rows: the samples.
            context: values of the conditions; a table of rows may hold these columns itself.
            progress: wraps the iterator of batches, as rich.progress.track does.
        """
        x, columns = self.encode(rows)
        c = self.data.conditions.encode(columns if context is None else context, len(x))
        batches = torch.arange(len(x)).split(self.data.eval_batch_size)
        parts = [self._score(x[index], index, c[index]) for index in progress(batches)]
        bits, error = (torch.cat(part).double() for part in zip(*parts, strict=True))
        nats = self.flow.d * np.log(2)
        more_likely = torch.searchsorted(self.validation_bits.double(), bits)
        scores = {
            "log_prob": -nats * bits,
            "standard_error": nats * error,
            "bits_per_dim": bits,
            "rank": more_likely / len(self.validation_bits),
        }
        return {name: values.numpy() for name, values in scores.items()}

    @torch.no_grad()
    def _score(self, x: Tensor, index: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Mean bits/dim over two sets of probes, and its standard error, (B,) each."""
        batch = self.data.transform.for_evaluation(x, index, c, self.seed)
        batch = batch.to(next(self.flow.parameters()).device)
        first = solve_and_measure(self.flow, batch, self.seed)[1].bits_per_dim.cpu()
        if self.flow.test_probes.divergence == "exact":
            return first, torch.zeros_like(first)
        second = solve_and_measure(self.flow, batch, self.seed + 1)[1].bits_per_dim.cpu()
        return (first + second) / 2, (first - second).abs() / 2

    @torch.no_grad()
    def sample(
        self,
        n: int = 1,
        context: Values | None = None,
        seed: int | None = None,
        temperature: float = 1.0,
    ) -> Any:
        """Sample `n` rows: uint8 images (n, C, H, W), or a polars DataFrame of the columns."""
        c = self.data.conditions.encode(context or {}, n)
        z = self.sample_z(n, self.seed if seed is None else seed, temperature)
        device = next(self.flow.parameters()).device
        batches = torch.arange(n).split(self.data.eval_batch_size)
        return self.decode(
            torch.cat([self.flow.inverse(z[i].to(device), c[i].to(device)).cpu() for i in batches])
        )

    def sample_z(self, n: int, seed: int, temperature: float) -> Tensor:
        """Sample z (n, d) with standard deviation `temperature`, on the CPU."""
        return temperature * torch.randn(
            n, self.flow.d, generator=torch.Generator().manual_seed(seed)
        )

    def encode(self, rows: Any) -> tuple[Tensor, Values]:
        """Return rows as x (N, *shape), and the columns of conditions that they hold."""
        if self.columns is None:
            return as_images(rows, tuple(self.data.shape), self.data.transform.levels), {}
        frame = as_frame(rows)
        if frame.width == len(self.columns) and all(c.startswith("column_") for c in frame.columns):
            frame = frame.rename(dict(zip(frame.columns, self.columns, strict=True)))
        missing = [name for name in self.columns if name not in frame.columns]
        require(not missing, f"rows: lack {', '.join(missing)}; the columns are {self.columns}")
        for name in self.columns:
            dtype = frame.schema[name]
            number = dtype.is_numeric() or dtype == pl.Boolean
            require(number, f"rows: column {name} must hold numbers, not {dtype}")
        x = frame.select(pl.col(self.columns).cast(pl.Float64)).to_torch()
        require_finite(x, "the rows (NaN is a missing value)")
        self.data.transform.require_inside(x)
        conditions = [name for name in self.data.conditions.columns if name in frame.columns]
        return x, {name: frame[name].to_numpy() for name in conditions}

    def decode(self, y: Tensor) -> Any:
        """Return what the flow models, y (N, *shape), as `sample` does."""
        x = self.data.transform.inverse(y)
        if self.columns is None:
            return self.data.transform.dequantize.inverse(x).numpy()
        columns = self.data.transform.columns
        types = {column.name: pl.Int64 if column.integer else pl.Float64 for column in columns}
        return pl.DataFrame(x.numpy(), types, orient="row")


def as_images(rows: Any, shape: tuple[int, ...], levels: int) -> Tensor:
    """Return grey levels x (N, C, H, W) after checking their shape, type and range."""
    x = torch.as_tensor(np.asarray(rows))
    if x.dim() == 3 and shape[0] == 1:
        x = x[:, None]
    kind = f"rows of shape {tuple(x.shape)} and type {x.dtype}".replace("torch.", "")
    require(x.shape[1:] == shape, f"{kind}: must be (N, {', '.join(map(str, shape))})")
    inside = x.numel() == 0 or (int(x.min()) >= 0 and int(x.max()) < levels)
    grey = inside and not x.is_floating_point()
    require(grey, f"{kind}: must be grey levels, whole numbers from 0 to {levels - 1}")
    return x


def as_frame(rows: Any) -> pl.DataFrame:
    """Return a table as a DataFrame; the columns of an array are column_0, column_1, …."""
    if isinstance(rows, pl.DataFrame):
        return rows
    if hasattr(rows, "columns"):  # of pandas; polars would need pyarrow for it
        rows = {str(name): rows[name].to_numpy() for name in rows.columns}
    return pl.DataFrame(dict(rows) if isinstance(rows, Mapping) else np.asarray(rows), orient="row")


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
) -> Density:
    """Train on a table as `rnode train dataset=table` does, and return the best density.

    Args:
        rows: a DataFrame, a dictionary of columns, an array (N, d) or the path of a file.
        columns: the columns whose density is modelled; None: all numeric ones but `context`.
        context: the columns on which the density is conditioned.
        integer: the columns of whole numbers, which are dequantized.
        log: the positive columns whose logarithm is modelled.
        logit: the columns between two bounds, {name: [low, high]}, whose logit is modelled.
        max_time: time after which training stops, as [DD:]HH:MM:SS.
        folder: the run folder, which must be new or empty; None: a new one in outputs/table.
        overrides: further options of the command line, such as "model.hidden=128".

    Raises:
        InputError: if an argument is invalid.
    """
    folder = Path(folder or f"outputs/table/{datetime.now():%Y-%m-%d_%H-%M-%S-%f}").absolute()
    table = None if isinstance(rows, str | Path) else as_frame(rows)
    path = Path(rows).expanduser().absolute() if table is None else folder / "rows.parquet"
    overrides = ["dataset=table", *overrides]
    cfg = compose_config("train", overrides)
    cfg.folder, cfg.dataset.path = str(folder), str(path)
    validate("train", cfg)
    names = ("columns", "context", "integer", "log", "logit")
    for name, value in zip(names, (columns, context, integer, log, logit), strict=True):
        cfg.dataset[name] = cfg.dataset[name] if value is None else value
    cfg.trainer.max_time = max_time or cfg.trainer.max_time
    try:
        validate("train", cfg)
    except InputError as error:  # what is wrong now are arguments, not keys
        raise InputError(str(error).removeprefix("dataset.").removeprefix("trainer.")) from None
    folder.mkdir(parents=True, exist_ok=True)
    require(not any(folder.iterdir()), f"folder={folder}: must be new or empty")
    prepare_process()
    with lock(folder, resumes=False):
        if table is not None:
            table.write_parquet(path)
        train.fit(cfg, overrides)
    best = folder / "best.ckpt"
    return load(best if best.exists() else folder / "last.ckpt")
