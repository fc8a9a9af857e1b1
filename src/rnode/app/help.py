"""--help: a command, its groups, and the keys of the configuration of a command line."""

import json

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from rnode.app.schema import COMMANDS, CONF, Callback, Logger

ENTRIES = {"callbacks.": Callback, "logger.": Logger}


def help_text(command: str, cfg: DictConfig) -> str:
    """Describe a command, its groups, and its keys with their values in `cfg`."""
    lines = [COMMANDS[command].__doc__, f"\nusage: rnode {command} [group=option …] [key=value …]"]
    for group, choice in HydraConfig.get().runtime.choices.items():
        if "/" in group or "@" in group:
            continue
        lines += ["", f"{group}={choice or ''}"]
        for file in sorted((CONF / group).glob("*.yaml")):
            comments = file.read_text("utf-8").splitlines()
            about = next(line for line in comments if not line.startswith("# @package"))
            lines.append(f"  {file.stem:<20}{about[2:]}")
    lines += ["", "keys, with their values in brackets; --cfg job --resolve prints them as YAML:"]
    config = OmegaConf.to_container(cfg, resolve=True)
    return "\n".join([*lines, *describe_keys(COMMANDS[command], config)])


def describe_keys(schema: type, config: dict, path: str = "") -> list[str]:
    """One line for each key of a section: its name, its sentence and its value."""
    lines = []
    for name, value in config.items():
        if name.startswith("_") or name == "source":  # for Hydra
            continue
        field = getattr(schema, "model_fields", {}).get(name)
        about = field.description if field else "an option of the class"
        if isinstance(value, dict):
            lines.append(f"{path}{name}: {value.get('_target_', about)}")
            section = field.annotation if field else ENTRIES.get(path)
            lines += describe_keys(section, value, f"{path}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            lines.append(f"  {path + name:<34}{about} [{text}]")
    return lines
