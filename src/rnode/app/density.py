"""A trained density from Python: load a checkpoint or fit rows, then score and sample."""

import contextlib
import copy
import json
import logging
import os
import random
import re
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import polars as pl
import torch
from hydra.core.singleton import Singleton
from omegaconf import DictConfig
from torch import Tensor

from rnode.app import train
from rnode.app.build import apply_overrides, build, config_of
from rnode.app.processes import QUIET_LOGGERS, prepare_process
from rnode.app.validation import compose_config, validate
from rnode.data.conditions import as_array
from rnode.data.datamodule import DataModule
from rnode.data.tables import IN_PYTHON, as_frame, numbers
from rnode.errors import InputError, require
from rnode.evaluation import solve_and_measure
from rnode.flow import Flow
from rnode.training.checkpoint import load_checkpoint
from rnode.training.run_folder import checkpoint_of, lock
from rnode.transforms import TableTransform

FITS = threading.Lock()  # runs set what holds for the whole process, so one trains at a time
DIGITS = 12  # of samples of rounded columns, which hide the rounding of their multiples
PRECISION = (
    (torch.backends.cudnn, "allow_tf32"),
    (torch.backends.cudnn, "benchmark"),
    (torch.backends.cudnn, "deterministic"),
    (torch.backends.cuda.matmul, "allow_tf32"),
)
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
    path = checkpoint_of(path) if Path(path).is_dir() else path
    checkpoint = load_checkpoint(path)
    config = config_of(checkpoint, str(path), trust)
    if cfg is not None:
        apply_overrides(config, cfg)
    data, flow = build(config, checkpoint)
    weights = {k.removeprefix("flow."): w for k, w in checkpoint["state_dict"].items()}
    flow.load_state_dict(weights, assign=True)
    return Density(data, flow.requires_grad_().eval(), checkpoint["validation_bits"])


def from_checkpoint(cfg: DictConfig) -> "Density":
    """Load the density of `cfg.ckpt_path`, changed as the command line asks, on `cfg.device`."""
    density = load(cfg.ckpt_path, cfg.trust, cfg)
    density.seed = cfg.seed
    torch.backends.cudnn.allow_tf32 = False  # an adaptive method would chase its error
    accelerator = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    density.flow.to(accelerator if cfg.device == "auto" else cfg.device)
    return density


@dataclass(eq=False)
class Density:
    """p(x) or p(x | c) of a trained flow, in the data's own units.

    Tables are DataFrames (of polars or pandas), dictionaries of columns, or arrays (N, d) of the
    columns in their order; images are whole numbers (N, C, H, W) or, with one channel, (N, H, W).
    """

    data: DataModule  # what the flow was trained on; its splits are not needed
    flow: Flow  # in evaluation mode
    validation_bits: Tensor  # bits/dim of the validation split, ascending
    seed: int = 0  # of the dequantization noise and the probes; a row has those of its number

    @property
    def columns(self) -> list[str] | None:
        """The names of the modelled columns of a table; None for images."""
        transform = self.data.transform
        return transform.names if isinstance(transform, TableTransform) else None

    @property
    def device(self) -> torch.device:
        return next(self.flow.parameters()).device

    def log_prob(self, rows: Any, context: Values | None = None) -> np.ndarray:
        """log p(x | c) of each row in nats, (N,). For whole numbers it is a lower bound."""
        return self.score(rows, context)["log_prob"]

    def bits_per_dim(self, rows: Any, context: Values | None = None) -> np.ndarray:
        """−log₂ p(x | c) / d of each row, (N,)."""
        return self.score(rows, context)["bits_per_dim"]

    @torch.no_grad()
    def score(self, rows: Any, context: Values | None = None, progress: Callable = iter) -> dict:
        """Return log_prob in nats, its standard_error due to the probes, bits_per_dim and rank.

        Each is an array (N,). The rank is the share of the validation samples that are more likely:
        1 is most unusual. It is NaN if the run had not validated before it wrote the checkpoint.
        A table of rows may hold the conditions itself; `progress` wraps the iterator of batches.
        """
        x, table = self.encode(rows)
        c = self.encode_context(table if context is None else context, len(x))
        seeds = [self.seed] if self.flow.exact else [self.seed, self.seed + 1]
        parts = [torch.empty(len(seeds), 0)]
        batches = torch.arange(len(x)).split(self.data.eval_batch_size) if len(x) else ()
        for index in progress(batches):
            batch = self.data.transform.for_evaluation(x[index], index, c[index], self.seed)
            batch = batch.to(self.device)
            measures = [solve_and_measure(self.flow, batch, seed)[1] for seed in seeds]
            parts.append(torch.stack([m.bits_per_dim.cpu() for m in measures]))
        draws = torch.cat(parts, dim=1).double()  # a row for each seed of the probes
        bits = draws.mean(0)
        nats = self.flow.d * np.log(2)
        more_likely = torch.searchsorted(self.validation_bits.double(), bits)
        return {
            "log_prob": (-nats * bits).numpy(),
            "standard_error": (nats * (draws[0] - bits).abs()).numpy(),
            "bits_per_dim": bits.numpy(),
            "rank": (more_likely / len(self.validation_bits)).numpy(),
        }

    @torch.no_grad()
    def sample(
        self, n: int = 1, context: Values | None = None, seed: int | None = None, temperature=1.0
    ) -> Any:
        """Sample `n` rows: uint8 images (n, C, H, W), or a polars DataFrame of the columns.

        They are new ones in every call unless a `seed` is given.
        """
        require(n >= 0, f"n={n}: must be 0 or more")
        c = self.encode_context({} if context is None else context, n).to(self.device)
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        z = self.sample_z(c, seed, temperature)
        batches = torch.arange(n).split(self.data.eval_batch_size)
        return self.decode(torch.cat([self.flow.inverse(z[i], c[i]).cpu() for i in batches]))

    def sample_z(self, c: Tensor, seed: int, temperature: float) -> Tensor:
        """Sample z (n, d) for c (n, k) from the base, equal on all devices."""
        return self.flow.base.sample(c, temperature, torch.Generator().manual_seed(seed))

    def encode(self, rows: Any) -> tuple[Tensor, Values | pl.DataFrame]:
        """Return rows as x (N, *shape), and the table that may hold their conditions."""
        transform, shape = self.data.transform, tuple(self.data.shape)
        if self.columns is None:
            x = torch.from_numpy(as_array(rows))
            x = x[:, None] if x.dim() == 3 else x
            top = transform.levels - 1
            grey = x.shape[1:] == shape and bool((x.long().clamp(0, top) == x).all())
            right = f"(N, *{shape}) of whole numbers from 0 to {top}"
            require(grey, f"rows: are {tuple(x.shape)} of {x.dtype}; must be {right}")
            return x, {}
        frame = as_frame(rows, self.columns)
        missing = [name for name in self.columns if name not in frame.columns]
        require(not missing, f"rows: lack {', '.join(missing)}; the columns are {self.columns}")
        x = torch.from_numpy(numbers(frame, self.columns, "rows").to_numpy(writable=True))
        for row, column in (~x.isfinite()).nonzero()[:1].tolist():
            value = frame[self.columns[column]][row]
            raise InputError(f"rows: {self.columns[column]} is {value} in row {row}, not a number")
        transform.require_inside(x)
        return x, frame

    def encode_context(self, context: Any, n: int) -> Tensor:
        """Return what `n` samples are conditioned on, c (n, k), from a dictionary or a table."""
        if not isinstance(context, Mapping):
            frame = as_frame(context)
            known = [name for name in self.data.conditions.columns if name in frame.columns]
            context = {name: frame[name].to_numpy() for name in known}
        return self.data.conditions.encode(context, n)

    def decode(self, y: Tensor) -> Any:
        """Return what the flow models, y (N, *shape), as `sample` does."""
        x = self.data.transform.inverse(y)
        if self.columns is None:
            return self.data.transform.dequantize.inverse(x).numpy()
        columns = self.data.transform.columns
        types = {column.name: pl.Int64 if column.integer else pl.Float64 for column in columns}
        rounded = [column.name for column in columns if column.unit]
        frame = pl.DataFrame(x.numpy(), types, orient="row")
        return frame.with_columns(pl.col(rounded).round_sig_figs(DIGITS))


def fit(
    rows: Any,
    *,
    max_time: str | None = None,
    folder: str | Path | None = None,
    overrides: Sequence[str] = (),
    **options: Any,
) -> Density:
    """Train on a table as `rnode train dataset=table` does, and return the best density.

    Args:
        rows: a DataFrame, a dictionary of columns, an array (N, d) or the path of a file.
        max_time: time after which training stops, as [DD:]HH:MM:SS.
        folder: the run folder, which must be new or empty; None: a new one in outputs/table.
        overrides: further options of the command line, such as "model.hidden=128".
        **options: keys of dataset=table. `columns` are the names of the columns whose density is
            modelled, by default all numeric ones; `context` those on which it is conditioned;
            `integer` those of whole numbers, which are dequantized; `log` the positive ones whose
            logarithm is modelled; `logit` those between two bounds, {name: [low, high]}.

    Raises:
        InputError: if an argument is invalid.
    """
    with FITS, undisturbed():
        cfg = compose_config("train", ["dataset=table", *overrides])
        unknown = [name for name in options if name not in cfg.dataset]
        require(not unknown, f"{unknown}: are no keys of dataset=table ({', '.join(cfg.dataset)})")
        cfg.dataset.update(json.loads(json.dumps(options, default=to_list)))
        cfg.trainer.max_time = max_time or cfg.trainer.max_time
        frame = None if isinstance(rows, str | Path) else as_frame(rows)
        cfg.dataset.path = str(Path(rows).expanduser().absolute()) if frame is None else ""
        try:
            validate("train", cfg)
        except InputError as error:  # as the arguments of this function are called
            raise InputError(re.sub(r"^(dataset|trainer)\.", "", str(error))) from None
        if folder is None:
            os.makedirs("outputs/table", exist_ok=True)
            folder = tempfile.mkdtemp("", f"{datetime.now():%Y-%m-%d_%H-%M-%S}-", "outputs/table")
        folder = Path(folder).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        require(not any(folder.iterdir()), f"folder={folder}: must be new or empty")
        cfg.folder = str(folder)
        prepare_process()
        with lock(folder, resumes=False):
            if frame is not None:
                cfg.dataset.path = str(folder / "rows.parquet")
                frame.write_parquet(cfg.dataset.path)
            train.fit(cfg, ["dataset=table", *overrides])
        return load(folder)


def to_list(values: Any) -> Any:
    """Return names or numbers of NumPy, pandas or polars as those of Python."""
    return values.tolist() if hasattr(values, "tolist") else list(values)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Give a caller everything back that a run sets for the whole process."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(patch.dict(os.environ))
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(random.setstate, random.getstate())
        stack.callback(Singleton.set_state, copy.copy(Singleton.get_state()))
        stack.callback(IN_PYTHON.reset, IN_PYTHON.set(True))
        for logger in map(logging.getLogger, QUIET_LOGGERS):
            stack.callback(logger.setLevel, logger.level)
        for module, name in PRECISION:
            stack.callback(setattr, module, name, getattr(module, name))
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                stack.callback(signal.signal, number, signal.getsignal(number))
        yield
