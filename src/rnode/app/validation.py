"""Checks of a configuration by its schema."""

from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rnode.app.schema import COMMANDS
from rnode.errors import InputError

WORDS = {  # types of pydantic's errors
    **{"int_type": "a whole number", "float_type": "a number", "bool_type": "true or false"},
    **{"string_type": "text", "list_type": "a list [a, b]"},
    **{"greater_than_equal": "at least {ge}", "less_than_equal": "at most {le}"},
}


def validate(command: str, cfg: DictConfig) -> None:
    """Raise InputError with the first wrong key of a composed configuration, if there is one."""
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise InputError(missing(COMMANDS[command], key))
    config = OmegaConf.to_container(cfg, resolve=True)
    try:
        COMMANDS[command].model_validate(without_targets(config))
    except ValidationError as error:
        raise InputError(describe(error, COMMANDS[command], config)) from None


def without_targets(value: Any) -> Any:
    """Leave out what Hydra interprets: `source`, _target_, _partial_ and the like."""
    if not isinstance(value, dict):
        return value
    return {k: without_targets(v) for k, v in value.items() if str(k)[:1] != "_" and k != "source"}


def missing(schema: type[BaseModel], key: str) -> str:
    """Say that a key is missing, and what it is."""
    about = ""
    for part in key.split("."):
        field = getattr(schema, "model_fields", {}).get(part)
        schema, about = (field.annotation, f" ({field.description})") if field else (None, "")
    return f"{key}=… is missing{about}"


def describe(error: ValidationError, schema: type[BaseModel], config: Any) -> str:
    """Name the first wrong key, its value and what would be right."""
    first, path, value = error.errors()[0], [], config
    for part in first["loc"]:  # the rest of a location names alternatives of a type
        if not isinstance(value, dict) or (part not in value and first["type"] != "missing"):
            break
        path, value = [*path, part], value.get(part)
    name = ".".join(map(str, path))
    if first["type"] == "extra_forbidden":
        return f"there is no option {name}"
    if first["type"] == "missing":
        return missing(schema, name)
    if first["type"] in ("model_type", "dict_type"):
        return f"{name}={value}: must be a section, whose keys are set as {name}.KEY=…"
    same = (other for other in error.errors() if other["loc"][: len(path)] == tuple(path))
    *right, last = dict.fromkeys(map(in_words, same))
    shown = "null" if value is None else " ".join(str(value).split())[:200]
    return f"{name}={shown}: must be {', '.join(right)}{' or ' * bool(right)}{last}"


def in_words(error: ErrorDetails) -> str:
    """Say what would be right."""
    if (words := WORDS.get(error["type"])) is None:
        return error["msg"].removeprefix("Input should be ")
    context = error.get("ctx", {}).items()
    limits = {k: f"{v:g}" if isinstance(v, float) else v for k, v in context}  # 0, not 0.0
    return words.format(**limits)
