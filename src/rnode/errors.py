"""Errors that a user can meet. Each message is one line."""


class InputError(ValueError):
    """A value that the user gave is wrong; the message says what would be right."""


class DivergenceError(ArithmeticError):
    """A quantity became NaN or infinite, or the step size of a solver underflowed.

    Args:
        message: what diverged, and where.
        shared: whether every process of the run raises this error at the same step.
    """

    def __init__(self, message: str, shared: bool = False):
        super().__init__(message)
        self.shared = shared


class WriteError(OSError):
    """A file could not be written."""


class Stopped(Exception):
    """A signal stopped the run, which ended cleanly.

    Args:
        message: where the run stopped and how to resume it.
        signal: the number of the signal.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def require(condition: bool, message: str) -> None:
    """Raise InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks and without torch's C++ call stack."""
    return " ".join(str(error).split("\nException raised from ")[0].split())
