"""Errors that a user can meet. Each message is one line."""

from collections.abc import Collection


class InputError(ValueError):
    """A value that the user gave is wrong; the message says what would be right."""


class Diverged(ArithmeticError):
    """A quantity became NaN or infinite, or the step size of a solver underflowed."""


class Stopped(Exception):
    """The signal of number `signal` stopped the run, which ended cleanly."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def require(condition: bool, message: str) -> None:
    """Raise InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def require_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise InputError unless the argument `name` has one of `choices` as its `value`."""
    require(value in choices, f"{name}={value}: must be one of {', '.join(choices)}")


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks and without torch's C++ call stack."""
    return " ".join(str(error).split("\nException raised from ")[0].split())
