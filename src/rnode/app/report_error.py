"""Errors as the user sees them: one line, an exit code, and a file with the traceback of a bug."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from rnode.app.launch import is_first_process, launched
from rnode.errors import Diverged, InputError, Stopped, one_line

LONGEST = 1500  # characters of a message; a value that it repeats may be longer


def wants_traceback() -> bool:
    """Return whether the user set HYDRA_FULL_ERROR=1."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def describe_error(error: Exception) -> tuple[str, int]:
    """Return the line that describes an error, and the exit code.

    The code is 2 for a mistake in the input, 1 for a run that failed, 128 + n after signal n.
    """
    if isinstance(error, HydraException) and isinstance(cause := error.__cause__, Exception):
        # Hydra wraps what a class that it builds raises. One that is not found has a wrong name.
        return describe_error(InputError(cause) if isinstance(cause, ImportError) else cause)
    line = one_line(error)[:LONGEST]
    if isinstance(error, Stopped):
        return line, 128 + error.signal
    if isinstance(error, InputError | HydraException | OmegaConfBaseException):
        return line, 2
    if isinstance(error, Diverged | OSError):
        return line, 1
    if type(error).__name__ == "MisconfigurationException":  # of Lightning, which may not be loaded
        return f"trainer: {line}", 2
    memory = isinstance(error, MemoryError) or "out of memory" in line or "can't allocate" in line
    advice = "try a smaller dataset.batch_size or model.hidden, or solver.gradient=checkpoint"
    advice = f"not enough memory; {advice}: " * memory
    return f"{advice}{type(error).__name__}: {line[:500]}; {save_traceback(error)}", 1


def save_traceback(error: Exception) -> str:
    """Write the traceback to error.log in the run folder and return where it is."""
    folder = Path(HydraConfig.get().runtime.output_dir if HydraConfig.initialized() else "outputs")
    text = "".join(traceback.format_exception(error))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.log").write_text(text, encoding="utf-8")
    except OSError as refused:
        return f"the traceback could not be written ({one_line(refused)})"
    return f"the traceback is in {folder / 'error.log'}"


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Print one line for an error and exit; with HYDRA_FULL_ERROR=1, let the error pass."""
    try:
        yield
    except Exception as error:
        if wants_traceback():
            raise
        line, code = describe_error(error)
        if code > 128 and not is_first_process():  # all stop together; the first process says so
            sys.exit(0)
        started = launched()
        several = started is not None and started.per_node * started.nodes > 1
        where = f" (process {started.rank})" if several else ""
        print(f"{'stopped' if code > 128 else 'error'}: {line}{where}", file=sys.stderr)
        sys.exit(code)
