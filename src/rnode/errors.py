"""What can go wrong by a user's hand or in a run, as exceptions whose message is one line."""


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
        raise InputError(f"{name}={value}: must be {right}")


def is_int(value: object, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def is_number(value: object, at_least: float = float("-inf")) -> bool:
    """A finite real number that is at least `at_least`."""
    return isinstance(value, int | float) and not isinstance(value, bool) and at_least <= value < float("inf")


def one_line(error: BaseException) -> str:
    """A library's message without its line breaks, to stand in one of ours."""
    return " ".join(str(error).split())
