"""What an error becomes: one line, an exit code and, after a bug, a file with its traceback."""

import contextlib
import os
import shlex
import sys
import traceback
from collections.abc import Iterator
from multiprocessing import current_process
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rnode.app.processes import is_first_process
from rnode.app.validation import explain, quote
from rnode.errors import Diverged, InputError, Stopped
from rnode.training.results import DIVERGED, FAILED, OVERRIDES

MEMORY = "try a smaller dataset.batch_size or model.hidden, or solver.gradient=checkpoint"


@contextlib.contextmanager
def one_line_errors(job: Path | None = None) -> Iterator[None]:
    """Print one line for an error and exit.

    A failed job of a sweep, whose folder is `job`, records its error there, and the sweep goes on.
    A signal ends the whole sweep.
    """
    try:
        yield
    except Stopped as stopped:
        if not is_first_process():  # all stop together; the first process says so
            sys.exit(0)
        hydra = HydraConfig.get()
        place = f"folder={quote(hydra.runtime.output_dir)}"
        again = ["rnode", "train", *hydra.overrides.task, place, "ckpt_path=auto"]
        resume = f"to resume: {shlex.join(again)}"
        if job is not None:
            resume = f"to resume the sweep, add folder={hydra.sweep.dir}"
        print(f"stopped: {stopped}; {resume}", file=sys.stderr, flush=True)
        if current_process().name != "MainProcess":
            os._exit(128 + stopped.signal)  # joblib would catch SystemExit and run the next job
        sys.exit(128 + stopped.signal)
    except Exception as error:
        line, code = describe_error(error)
        print(f"error: {line}", file=sys.stderr, flush=True)
        if job is None:
            sys.exit(code)
        if not (job / DIVERGED).exists():
            (job / FAILED).write_text(f"{line}\n", encoding="utf-8")
        if not (job / OVERRIDES).exists():  # the job failed before its run started
            (job / OVERRIDES).parent.mkdir(exist_ok=True)
            OmegaConf.save(HydraConfig.get().overrides.task, job / OVERRIDES)


def describe_error(error: Exception) -> tuple[str, int]:
    """Return the line that describes an error, and the exit code.

    The code is 2 for a mistake in the input, 1 for a run that failed.
    """
    if isinstance(error, HydraException) and isinstance(cause := error.__cause__, Exception):
        return describe_error(cause)  # Hydra wraps what a class that it builds raises
    line = explain(error)[:1000]
    name = type(error).__name__
    mistakes = InputError | ImportError | HydraException | OmegaConfBaseException
    if isinstance(error, mistakes) or name == "MisconfigurationException":  # of Lightning
        return line, 2
    if isinstance(error, Diverged | OSError):
        return line, 1
    folder = Path(HydraConfig.get().runtime.output_dir if HydraConfig.initialized() else "outputs")
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(traceback.format_exception(error))
    (folder / "error.log").write_text(text, encoding="utf-8")
    advice = f"{MEMORY}: " if isinstance(error, MemoryError) or "out of memory" in line else ""
    return f"{advice}{name}: {line}; the traceback is in {folder / 'error.log'}", 1
