"""Lightning's Trainer checks few of its options; the others are looked at here, by the types that its signature gives."""

import inspect
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pytorch_lightning import Trainer

from rnode.errors import is_int, is_number, require

AT_LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "num_nodes": 1,
    "log_every_n_steps": 0,
    "val_check_interval": 1,
}
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a name", list: "a list", dict: "a section"}


def check_trainer_options(options: dict) -> None:
    """InputError if an option, given as a plain value, is not of its type; what Trainer does not know is left to it."""
    hints = get_type_hints(Trainer.__init__)
    for name, value in options.items():
        if name in inspect.signature(Trainer.__init__).parameters and name in hints:
            least = AT_LEAST.get(name, -1)
            right = " or ".join(dict.fromkeys(words(hints[name])))
            require(
                fits(value, hints[name], least), f"trainer.{name}", value, f"{right}{f', {least} or more' * (least >= 0)}"
            )


def fits(value: object, hint: Any, least: int) -> bool:
    """Whether a plain value is of the type; numbers are `least` or more. A section with a _target_ may become anything."""
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return any(fits(value, choice, least) for choice in get_args(hint))
    if kind is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if kind is list:
        return isinstance(value, list) and all(fits(item, *get_args(hint), least) for item in value)
    if kind is int:
        return is_int(value, least)
    if kind is float:
        return isinstance(value, float) and is_number(value, min(least, 0))
    if kind in (bool, str, dict, NoneType):
        return isinstance(value, kind)
    return isinstance(value, dict) and "_target_" in value


def words(hint: Any) -> list[str]:
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return [word for choice in get_args(hint) for word in words(choice)]
    if kind is Literal:
        return [str(choice) for choice in get_args(hint)]
    return ["null"] if kind is NoneType else [WORDS.get(kind, "a section with a _target_")]
