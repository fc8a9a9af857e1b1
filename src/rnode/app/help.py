"""--help, and suggestions for a misspelt key, from the configuration of a command line."""

import difflib
import itertools
import json
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel

from rnode.app.schema import COMMANDS, CONF, flatten

SYNONYMS = {  # what people type for keys of another name
    **{"learning_rate": "optimizer.lr", "epochs": "trainer.max_epochs", "data": "dataset"},
    **{"channels": "model.hidden", "width": "model.hidden", "gpus": "trainer.devices"},
    **{"steps": "trainer.max_steps", "batch": "dataset.batch_size", "resume": "ckpt_path"},
}


def composed(command: str, overrides: list[str], config_dir: str | None) -> DictConfig:
    """Compose a configuration with Hydra's own section; a missing mandatory value is null."""
    search = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(command, search + overrides, return_hydra_config=True)
    for key in (key for key in config if key != "hydra" and OmegaConf.is_missing(config, key)):
        config[key] = None
    if "folder" in config:  # only a run has one
        config.folder = ""
    return config


def without_hydra(config: DictConfig) -> dict[str, Any]:
    sections = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    return OmegaConf.to_container(sections, resolve=True)


def help_text(command: str, about: str, overrides: list[str], config_dir: str | None) -> str:
    """Describe a command, its groups, and the keys of the configuration that `overrides` make."""
    config = composed(command, overrides, config_dir)
    sweep = " [-m for a sweep over a=1,2 b=3,4]" if command == "train" else ""
    lines = [about, "", f"usage: rnode {command} [group=option …] [key=value …]{sweep}"]
    lines.append(f"       python src/{command}.py …")
    for group, choice in config.hydra.runtime.choices.items():
        if "/" in group or "@" in group:
            continue
        lines += ["", f"{group}={choice or ''}"]
        for file in sorted((CONF / group).glob("*.yaml")):
            comments = (line for line in file.read_text("utf-8").splitlines() if line[:2] == "# ")
            first = next(line for line in comments if "@package" not in line)
            lines.append(f"  {file.stem:<20}{first[2:]}")
    lines += ["", "keys, with their values in brackets:"]
    lines += describe_keys(COMMANDS[command], without_hydra(config))
    lines += ["", "--cfg job --resolve prints the configuration that a command line makes."]
    return "\n".join(lines)


def describe_keys(schema: type[BaseModel], config: dict, path: str = "") -> list[str]:
    """One line for each key of a section: its name, its sentence and its value."""
    lines = []
    for name, value in config.items():
        field = schema.model_fields.get(name)
        about = field.description if field else "an option of your own class"
        if name.startswith("_") or name == "source":  # for Hydra
            continue
        if isinstance(value, dict):
            lines.append(f"{path}{name}: {about}")
            lines += describe_keys(
                field.annotation if field else BaseModel, value, f"{path}{name}."
            )
        else:
            shown = value if isinstance(value, str) else json.dumps(value)
            lines.append(f"  {path + name:<34}{about} [{shown}]")
    return lines


def unknown_key(command: str, overrides: list[str], config_dir: str | None) -> str | None:
    """Name the first override of a key that does not exist, and suggest one that does."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    chosen = [
        o.input_line for o in parsed if o.key_or_group in groups and not o.is_sweep_override()
    ]
    config = without_hydra(composed(command, chosen, config_dir))
    known = [*known_keys(config), *(groups if command == "train" else ["solver"])]
    for override in parsed:
        key = override.key_or_group
        exists = key in known or key.startswith("hydra") or "@" in key
        if exists or override.is_add() or override.is_force_add():
            continue
        last = key.rsplit(".", 1)[-1]
        same = [name for name in known if name == SYNONYMS.get(last) or name.endswith(f".{last}")]
        close = same or difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        if key.split(".")[0] in ("trainer", "wandb"):
            hint += f"+{key}=… passes it to Lightning; "
        return f"there is no option {key}; {hint}rnode {command} --help lists them"
    return None


def known_keys(config: dict) -> list[str]:
    """All keys of nested sections, such as trainer and trainer.max_epochs."""
    parts = (key.split(".") for key in flatten(config))
    keys = (key for path in parts for key in itertools.accumulate(path, "{}.{}".format))
    return list(dict.fromkeys(keys))
