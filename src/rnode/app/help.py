"""--help, and suggestions for a misspelt key, from the configuration of a command line."""

import difflib
import json
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from pydantic import BaseModel

from rnode.app.schema import CONF, schema_of

SYNONYMS = {
    "lr": "optimizer.lr",
    "learning_rate": "optimizer.lr",
    "epochs": "trainer.max_epochs",
    "steps": "trainer.max_steps",
    "batch_size": "dataset.batch_size",
    "batch": "dataset.batch_size",
    "data": "dataset",
    "root": "dataset.root",
    "channels": "model.hidden",
    "width": "model.hidden",
    "lambda_k": "reg.lambda_k",
    "lambda_j": "reg.lambda_j",
    "gpus": "trainer.devices",
    "devices": "trainer.devices",
    "precision": "trainer.precision",
    "adjoint": "solver.gradient",
    "checkpoint": "ckpt_path",
    "ckpt": "ckpt_path",
    "resume": "ckpt_path",
}


def composed(command: str, overrides: list[str], search: list[str]) -> tuple[dict, dict]:
    """Compose a configuration and return it with the chosen option of every group."""
    path = (
        [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in search)}]"]
        if search
        else []
    )
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(command, [*path, *overrides], return_hydra_config=True)
    choices = {k: v for k, v in cfg.hydra.runtime.choices.items() if "/" not in k and "@" not in k}
    own = OmegaConf.masked_copy(cfg, [name for name in cfg if name != "hydra"])
    for missing in OmegaConf.missing_keys(own):
        OmegaConf.update(own, missing, None)
    return OmegaConf.to_container(own, resolve=True), choices


def help_text(command: str, purpose: str, overrides: list[str], search: list[str]) -> str:
    """Describe the groups, and the keys of the configuration that `overrides` make."""
    config, choices = composed(command, overrides, search)
    usage = f"rnode {command} [group=option …] [key=value …] [-m for a sweep over a=1,2 b=3,4]"
    lines = [purpose, "", f"usage: {usage}", f"       python src/{command}.py …"]
    for group, choice in choices.items():
        lines += ["", f"{group}={choice or ''}"]
        for file in sorted((CONF / group).glob("*.yaml")):
            comments = [
                line[2:] for line in file.read_text("utf-8").splitlines() if line[:2] == "# "
            ]
            about = next(comment for comment in comments if not comment.startswith("@package"))
            lines.append(f"  {file.stem:<20}{about}")
    lines += ["", "keys, with their values in brackets:"]
    lines += describe_keys(schema_of(command, config), config)
    lines += ["", "--cfg job --resolve prints the configuration that a command line makes."]
    return "\n".join(lines)


def describe_keys(schema: type[BaseModel], config: dict, path: str = "") -> list[str]:
    """One line for each key of a section: its name, its sentence and its value."""
    lines = []
    for name, value in config.items():
        field = schema.model_fields.get(name)
        about = (field.description or "") if field else ""
        inner = field.annotation if field else None
        if isinstance(value, dict) and name != "source":
            model = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else BaseModel
            lines.append(f"{path}{name}: {about}")
            lines += describe_keys(model, value, f"{path}{name}.")
        elif not name.startswith("_") and name != "source":
            shown = "null" if value is None else json.dumps(value, ensure_ascii=False)
            lines.append(f"  {path + name:<34}{about} [{shown}]")
    return lines


def wrong_option(command: str, overrides: list[str], search: list[str]) -> str | None:
    """Name the first override of a key that does not exist, and suggest keys that do."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    chosen = [o.input_line for o in parsed if o.key_or_group in groups]
    config, _ = composed(command, chosen, search)
    known = [*dotted_keys(config), *(groups if command == "train" else ["solver"])]
    for override in parsed:
        key = override.key_or_group
        added = override.is_add() or override.is_force_add() or key.split(".")[0] == "hydra"
        if not added and key not in known and "/" not in key and "@" not in key:
            last = key.rsplit(".", 1)[-1]
            like = [SYNONYMS.get(key) or SYNONYMS.get(last)]
            like = [name for name in like if name in known] or difflib.get_close_matches(
                key, known, 1
            )
            like = like or [name for name in known if name.endswith(f".{last}")][:1]
            meant = f"did you mean {like[0]}? " if like else ""
            return f"there is no option {key}; {meant}rnode {command} --help lists them"
    return None


def dotted_keys(config: Any, path: str = "") -> list[str]:
    """All keys of nested sections, such as trainer and trainer.max_epochs."""
    if not isinstance(config, dict):
        return []
    keys = [f"{path}{name}" for name in config]
    return keys + [key for name in config for key in dotted_keys(config[name], f"{path}{name}.")]
