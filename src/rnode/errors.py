"""What can go wrong by a user's hand or in a run, as exceptions whose message is one line."""

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence

LARGEST = 2**32 - 1  # whole number that a configuration may have: torch and NumPy take no larger seeds


class InputError(ValueError):
    """A mistake in what the user gave: the message names it, its value and what would be right."""


class DivergenceError(ArithmeticError):
    """A computation that left the finite numbers, or a solver whose step size underflowed.

    shared: whether every process of the run raises it, at the same point.
    """

    def __init__(self, message: str, shared: bool = False):
        super().__init__(message)
        self.shared = shared


class WriteError(OSError):
    """A file that could not be written; the message is one line."""


class Stopped(Exception):
    """The run was asked by a signal to stop, and has."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def require(condition: bool, name: str, value: object, right: str) -> None:
    """Raise InputError unless `condition`: `name=value` is not what it must be, which is `right`."""
    if not condition:
        too_large = isinstance(value, int) and value > LARGEST and "number" in right
        shown = " ".join(str(value).split())
        raise InputError(f"{name}={shown[:200]}: must be {right}{f', at most {LARGEST}' if too_large else ''}")


@contextlib.contextmanager
def configured(key: str) -> Iterator[None]:
    """What a library says while the section `key` of the configuration is made into an object is about that section."""
    try:
        yield
    except (AssertionError, AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{key}: {one_line(error)}") from error


SHAPE = f"a list of whole numbers, 1 or more, with a product of at most {LARGEST}"


def is_int(value: object, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and at_least <= value <= LARGEST


def is_shape(value: object) -> bool:
    """A list of whole numbers, 1 or more, of which no array's size is out of reach."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        return False
    return all(is_int(n, at_least=1) for n in value) and math.prod(value) <= LARGEST


def is_number(value: object, at_least: float = float("-inf")) -> bool:
    """A finite real number that is at least `at_least`; torch takes no whole number beyond LARGEST for one."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and value >= at_least and abs(value) <= (LARGEST if isinstance(value, int) else sys.float_info.max)


def one_line(error: BaseException) -> str:
    """A library's message without its line breaks, to stand in one of ours."""
    return " ".join(str(error).split("\nException raised from ")[0].split())  # what follows is torch's own call stack
