"""The check of a command line before Hydra starts, by Hydra's grammar, conf/ and the schema."""

import difflib
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from pydantic import BaseModel, ValidationError

from rnode.app.quoting import quote, shell_quote
from rnode.app.schema import COMMANDS, CONF, flatten
from rnode.errors import InputError, one_line, require

SYNONYMS = {  # what people type for keys of another name
    "learning_rate": "optimizer.lr",
    "epochs": "trainer.max_epochs",
    "steps": "trainer.max_steps",
    "gpus": "trainer.devices",
    "data": "dataset",
    "batch": "dataset.batch_size",
    "channels": "model.hidden",
    "width": "model.hidden",
    "resume": "ckpt_path",
}
WORDS = {  # where pydantic's are not plain
    "model_type": "a section, whose keys are set one by one",
    "string_pattern_mismatch": "[DD:]HH:MM:SS",
}


@dataclass(frozen=True)
class CommandLine:
    """A command, the overrides of its configuration, and what its flags say."""

    command: str
    overrides: list[str]
    config_dir: str | None = None  # folder of the user's own configuration files
    multirun: bool = False


def check(line: CommandLine) -> None:
    """Raise InputError if the configuration of a run, or of the jobs of a sweep, is wrong.

    Every option of the groups that a sweep varies must exist. The values of other keys that it
    varies are left to its jobs: where one is wrong, the others still run.
    """
    parsed = parse(line.overrides)
    swept = [o.key_or_group for o in parsed if line.multirun and o.is_sweep_override()]
    choices = [values(o) if o.key_or_group in swept else [o.input_line] for o in parsed]
    for k in range(max(map(len, choices), default=1)):
        overrides = [options[k % len(options)] for options in choices]
        validate(line.command, compose_config(replace(line, overrides=overrides)), swept)


def parse(overrides: list[str]) -> list[Override]:
    """Parse overrides by Hydra's grammar."""
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()  # lists the options of glob(*)
            return OverridesParser.create(loader).parse_overrides(overrides)
    except OverrideParseException as error:
        key, equals, value = error.override.partition("=")
        folder = "; that folder holds no checkpoint of a run" if os.path.isdir(key) else ""
        require(equals == "=", f"{error.override}: must be KEY=VALUE{folder}")
        quoted = shell_quote(f"{key}={quote(value)}")
        reason = "= ~ [ ] ( ) and letters like λ need quotes"
        raise InputError(f"{error.override}: {reason}; write {quoted}") from error


def values(override: Override) -> list[str]:
    """Return an override for each option of a swept group, or for one value of a swept key."""
    key, sweep = override.get_key_element(), override.value()
    if isinstance(sweep, IntervalSweep):
        return [f"{key}={sweep.start}"]
    count = None if (CONF / key).is_dir() else 1
    return [f"{key}={value}" for value in islice(override.sweep_string_iterator(), count)]


def compose_config(line: CommandLine) -> DictConfig:
    """Compose the configuration of a run, without Hydra's own section; HydraConfig has that."""
    overrides = line.overrides
    parse(overrides)
    if line.config_dir is not None:
        folder = os.path.abspath(line.config_dir)
        require(os.path.isdir(folder), f"--config-dir {line.config_dir}: there is no such folder")
        overrides = [f"hydra.searchpath=[{quote(f'file://{folder}')}]", *overrides]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose(line.command, overrides, return_hydra_config=True)
    except MissingConfigException as error:
        file, options = error.missing_cfg_file or "", ", ".join(error.options or [])
        extra = "; pip install -e '.[sweep]' brings more" if file.startswith("hydra/") else ""
        raise InputError(f"there is no {file}; the options are {options}{extra}") from error
    except ConfigCompositionException as error:
        key = re.match(r"Could not override '([\w.]+)'", str(error))
        raise InputError(no_such_option(key[1], line) if key else one_line(error)) from error
    with open_dict(config), read_write(config.hydra):
        config.hydra.runtime.output_dir = "outputs"  # the run folder, once Hydra has started
        HydraConfig.instance().set_config(config)  # for interpolations ${hydra:…}
        del config["hydra"]
    return config


def no_such_option(key: str, line: CommandLine) -> str:
    """Say that a key does not exist, and suggest one that does."""
    groups = [path.name for path in CONF.iterdir() if path.is_dir()]
    chosen = [text for text in line.overrides if text.partition("=")[0] in groups]
    config = OmegaConf.to_container(compose_config(replace(line, overrides=chosen)))
    known = [*known_keys(config), *groups]
    last = key.rpartition(".")[2]
    same = [name for name in known if name == SYNONYMS.get(last) or name.endswith(f".{last}")]
    close = same or difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    if key.partition(".")[0] in ("trainer", "wandb"):
        hint = f"{hint}+{key}=… passes it to Lightning; "
    return f"there is no option {key}; {hint}rnode {line.command} --help lists them"


def known_keys(config: dict) -> list[str]:
    """Return all keys of nested sections, such as trainer and trainer.max_epochs."""
    parts = (key.split(".") for key in flatten(config))
    return list(dict.fromkeys(key for path in parts for key in accumulate(path, "{}.{}".format)))


def validate(command: str, cfg: DictConfig, swept: Collection[str] = ()) -> None:
    """Raise InputError if a key is missing or wrong, unless it is among those `swept`."""
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise InputError(missing(COMMANDS[command], key))
    config = OmegaConf.to_container(cfg, resolve=True)
    try:
        COMMANDS[command].model_validate(without_targets(config))
    except ValidationError as error:
        known = known_keys(config)
        for detail in error.errors():
            key = ".".join(map(str, detail["loc"]))
            if detail["type"] == "missing":
                raise InputError(missing(COMMANDS[command], key)) from None
            while key not in known:  # the end of `loc` names an alternative of a type
                key = key.rpartition(".")[0]
            require(detail["type"] != "extra_forbidden", f"there is no option {key}")
            words = detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            words = words.replace("greater than or equal to", "at least")
            words = words.replace("less than or equal to", "at most")
            value = (
                "null" if detail["input"] is None else " ".join(str(detail["input"]).split())[:200]
            )
            right = WORDS.get(detail["type"], words)
            require(key in swept, f"{key}={value}: must be {right}")


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
