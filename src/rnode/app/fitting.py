"""Runs that a Python program starts: they leave it everything as it was."""

import contextlib
import copy
import io
import json
import logging
import os
import random
import re
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import polars as pl
import torch
from hydra.core.singleton import Singleton

from rnode.app import train
from rnode.app.processes import QUIET_LOGGERS, prepare_process
from rnode.app.validation import compose_config, validate
from rnode.data.tables import IN_PYTHON
from rnode.errors import InputError, require
from rnode.training.run_folder import lock

FITS = threading.Lock()  # runs set what holds for the whole process, so one trains at a time


def train_table(
    rows: pl.DataFrame | Path, place: Path, overrides: Sequence[str], seed: int, **options: Any
) -> None:
    """Train on rows, or those of a file, in the new or empty folder `place`.

    The options are parameters of Density, and keys of dataset=table. If the user chose no `folder`,
    there are no figures and no report.
    """
    overrides = ["dataset=table", f"seed={seed}", *overrides]
    if not any(text.lstrip("+~").startswith("logger") for text in overrides):
        overrides.append("logger=csv")
    cfg = compose_config("train", overrides)
    arguments = {k: v for k, v in options.items() if k in cfg.dataset and v is not None}
    # Names or numbers of NumPy, pandas or polars become those of Python.
    plain = json.dumps(arguments, default=lambda v: v.tolist() if hasattr(v, "tolist") else list(v))
    cfg.dataset.update(json.loads(plain))
    cfg.dataset.path = "" if isinstance(rows, pl.DataFrame) else str(rows.expanduser().absolute())
    cfg.trainer.max_time = options["max_time"] or cfg.trainer.max_time
    if options["folder"] is None:
        cfg.callbacks.figures = None
    try:
        validate("train", cfg)
    except InputError as error:  # as the arguments in Python are called
        raise InputError(re.sub(r"^(dataset|trainer)\.", "", str(error))) from None
    place.mkdir(parents=True, exist_ok=True)
    require(not any(place.iterdir()), f"folder={place}: must be new or empty")
    cfg.folder = str(place)
    prepare_process()
    with lock(place, resumes=False):
        if isinstance(rows, pl.DataFrame):
            cfg.dataset.path = str(place / "X.parquet")
            rows.write_parquet(cfg.dataset.path)
        train.fit(cfg, overrides)
        if options["folder"] is not None:
            train.publish(place)


@contextlib.contextmanager
def undisturbed(verbose: bool) -> Iterator[None]:
    """Give a caller everything back that a run sets for the whole process.

    Unless it is `verbose`, what it prints is dropped.
    """
    with FITS, contextlib.ExitStack() as stack:
        if not verbose:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(patch.dict(os.environ))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        tf32 = torch.backends.cudnn.allow_tf32
        stack.callback(setattr, torch.backends.cudnn, "allow_tf32", tf32)
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(random.setstate, random.getstate())
        stack.callback(Singleton.set_state, copy.copy(Singleton.get_state()))
        stack.callback(IN_PYTHON.reset, IN_PYTHON.set(True))
        for logger in map(logging.getLogger, QUIET_LOGGERS):
            stack.callback(logger.setLevel, logger.level)
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                stack.callback(signal.signal, number, signal.getsignal(number))
        yield
