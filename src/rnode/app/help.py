"""--help: a command, its groups, and the keys of the configuration of a command line."""

import json

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from pydantic import BaseModel

from rnode.app.schema import COMMANDS, CONF
from rnode.app.validation import CommandLine, compose_config


def help_text(about: str, line: CommandLine) -> str:
    """Describe a command, its groups, and its keys with the values that a command line gives."""
    config = OmegaConf.to_container(compose_config(line), resolve=True)
    usage = f"usage: rnode {line.command} [group=option …] [key=value …]"
    sweep = " [-m for a sweep over a=1,2 b=3,4]" if line.command == "train" else ""
    lines = [about, "", f"{usage}{sweep}", f"       python src/{line.command}.py …"]
    for group, choice in HydraConfig.get().runtime.choices.items():
        if "/" in group or "@" in group:
            continue
        lines += ["", f"{group}={choice or ''}"]
        for file in sorted((CONF / group).glob("*.yaml")):
            comments = (text for text in file.read_text("utf-8").splitlines() if text[:2] == "# ")
            first = next(text for text in comments if "@package" not in text)
            lines.append(f"  {file.stem:<20}{first[2:]}")
    lines += ["", "keys, with their values in brackets:"]
    lines += describe_keys(COMMANDS[line.command], config)
    lines += ["", "--cfg job --resolve prints the configuration that a command line makes."]
    return "\n".join(lines)


def describe_keys(schema: type[BaseModel], config: dict, path: str = "") -> list[str]:
    """One line for each key of a section: its name, its sentence and its value."""
    lines = []
    for name, value in config.items():
        if name.startswith("_") or name == "source":  # for Hydra
            continue
        field = schema.model_fields.get(name)
        about = field.description if field else "an option of your own class"
        if isinstance(value, dict):
            section = field.annotation if field else BaseModel
            lines.append(f"{path}{name}: {about}")
            lines += describe_keys(section, value, f"{path}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            lines.append(f"  {path + name:<34}{about} [{text}]")
    return lines
