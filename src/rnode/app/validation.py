"""The check of a configuration: Hydra composes it, and the schema checks its values."""

import difflib
import re

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import ConfigAttributeError, ConfigKeyError
from pydantic import BaseModel, ValidationError

from rnode.app.schema import COMMANDS, CONF, flatten
from rnode.errors import InputError, one_line, require


def compose_config(command: str, overrides: list[str]) -> DictConfig:
    """Compose the configuration of a run, without Hydra's own section; HydraConfig has that.

    Raises:
        InputError: if an override cannot be parsed, or names an unknown key or option.
    """
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose(command, overrides, return_hydra_config=True)
    except HydraException as error:
        raise InputError(explain(error)) from error
    with open_dict(config), read_write(config.hydra):
        config.hydra.runtime.output_dir = "outputs"  # the run folder, once Hydra has started
        HydraConfig.instance().set_config(config)  # for interpolations ${hydra:…}
        del config["hydra"]
    return config


def explain(error: Exception) -> str:
    """Return the message of an error of Hydra or OmegaConf; for an unknown key, what was meant."""
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {one_line(error)}"
    unknown = error.__cause__ if isinstance(error, HydraException) else error
    if not isinstance(unknown, ConfigAttributeError | ConfigKeyError):
        return one_line(error)
    key = unknown.full_key
    section, dot, name = key.rpartition(".")
    known = [
        section + dot + other for other in flatten(OmegaConf.to_container(unknown.parent_node))
    ]
    if not section:
        known += [path.name for path in CONF.iterdir() if path.is_dir()]
    by_name = {other.rpartition(".")[2]: other for other in reversed(known)}
    close = difflib.get_close_matches(name, by_name, n=1)
    hint = f"did you mean {by_name[close[0]]}? " if close else ""
    if section:
        hint += f"+{key}=… passes it on; "
    return f"there is no option {key}; {hint}--help lists them"


def validate(command: str, cfg: DictConfig) -> BaseModel:
    """Return the values of a configuration; a missing or wrong one is an InputError."""
    missing = OmegaConf.missing_keys(cfg)
    require(not missing, f"{', '.join(sorted(missing))}=… is missing; --help describes it")
    try:
        return COMMANDS[command].model_validate(OmegaConf.to_container(cfg, resolve=True))
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(str(part) for part in detail["loc"] if "[" not in str(part))  # no types
        time = detail["type"] == "string_pattern_mismatch"
        right = "must be [DD:]HH:MM:SS" if time else detail["msg"]
        raise InputError(f"{key}={detail['input']}: {right}") from error


def quote(value: str) -> str:
    """Quote the value of an override if Hydra cannot read it without quotes."""
    plain = re.fullmatch(r"[\w/.:+@%-]+", value, re.ASCII)
    return value if plain else QuotedString(value, Quote.double).with_quotes()
