"""Checks of a configuration by its schema."""

from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError

from rnode.app.schema import COMMANDS
from rnode.errors import InputError


def validate(command: str, cfg: DictConfig) -> None:
    """Raise InputError with the first wrong key of a composed configuration, if there is one."""
    config = OmegaConf.to_container(cfg, resolve=True)
    try:
        COMMANDS[command].model_validate(without_targets(config))
    except ValidationError as error:
        raise InputError(describe(error, config)) from None


def without_targets(value: Any) -> Any:
    """Leave out what Hydra interprets: `source`, _target_, _partial_ and the like."""
    if not isinstance(value, dict):
        return value
    return {k: without_targets(v) for k, v in value.items() if str(k)[:1] != "_" and k != "source"}


def describe(error: ValidationError, config: Any) -> str:
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
        return f"{name} is missing"
    if first["type"] in ("model_type", "dict_type"):
        return f"{name}={value}: must be a section, whose keys are set as {name}.KEY=…"
    same = (other for other in error.errors() if other["loc"][: len(path)] == tuple(path))
    right = dict.fromkeys(other["msg"].removeprefix("Input should be ") for other in same)
    shown = "null" if value is None else " ".join(str(value).split())[:200]
    return f"{name}={shown}: must be {' or '.join(right)}"
