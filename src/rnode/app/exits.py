"""What an error becomes: one line, an exit code and, after a bug, a file with its traceback."""

import contextlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from rnode.app.processes import is_first_process
from rnode.errors import Diverged, InputError, Stopped, one_line

MEMORY = "try a smaller dataset.batch_size or model.hidden, or solver.gradient=checkpoint"


def describe_error(error: Exception) -> tuple[str, int]:
    """Return the line that describes an error, and the exit code.

    The code is 2 for a mistake in the input, 1 for a run that failed, 128 + n after signal n.
    """
    if isinstance(error, HydraException) and isinstance(cause := error.__cause__, Exception):
        # Hydra wraps what a class that it builds raises. One that is not found has a wrong name.
        return describe_error(InputError(cause) if isinstance(cause, ImportError) else cause)
    line, name = one_line(error)[:1500], type(error).__name__
    if isinstance(error, Stopped):
        return line, 128 + error.signal
    if isinstance(error, InputError | HydraException | OmegaConfBaseException):
        return line, 2
    if name == "MisconfigurationException":  # of Lightning, which may not be loaded
        return f"trainer: {line}", 2
    if isinstance(error, Diverged | OSError):
        return line, 1
    folder = Path(HydraConfig.get().runtime.output_dir if HydraConfig.initialized() else "outputs")
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(traceback.format_exception(error))
    (folder / "error.log").write_text(text, encoding="utf-8")
    advice = f"{MEMORY}: " if isinstance(error, MemoryError) or "out of memory" in line else ""
    return f"{advice}{name}: {line[:500]}; the traceback is in {folder / 'error.log'}", 1


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Print one line for an error and exit."""
    try:
        yield
    except Exception as error:
        line, code = describe_error(error)
        stopped = isinstance(error, Stopped)
        if stopped and not is_first_process():  # all stop together; the first process says so
            sys.exit(0)
        print(f"{'stopped' if stopped else 'error'}: {line}", file=sys.stderr)
        sys.exit(code)
