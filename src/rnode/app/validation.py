"""The check of a command line before Hydra starts, by Hydra's grammar, conf/ and the schema."""

import difflib
import re
import shlex
from itertools import accumulate

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from pydantic import ValidationError

from rnode.app.schema import COMMANDS, CONF, flatten
from rnode.errors import InputError, require

SYNONYMS = {  # what people type for keys of another name
    "learning_rate": "optimizer.lr",
    "epochs": "trainer.max_epochs",
    "steps": "trainer.max_steps",
    "gpus": "trainer.devices",
    "data": "dataset",
    "channels": "model.hidden",
    "resume": "ckpt_path",
}


def check(command: str, overrides: list[str]) -> None:
    """Raise InputError if the configuration of a run, or of the first job of a sweep, is wrong.

    Of a sweep, every option of a group must exist too.
    """
    choices = []
    for override in parse(overrides):
        if override.is_discrete_sweep():
            key = override.get_key_element()
            values = [f"{key}={value}" for value in override.sweep_string_iterator()]
            choices.append(values if (CONF / key).is_dir() else values[:1])
        elif not override.is_sweep_override():  # Optuna draws the values of an interval
            choices.append([override.input_line])
    for k in range(max(map(len, choices), default=1)):
        validate(command, compose_config(command, [values[k % len(values)] for values in choices]))


def quote(value: str) -> str:
    """Quote the value of an override if Hydra cannot read it without quotes."""
    plain = re.fullmatch(r"[\w/.:+@%-]+", value, re.ASCII)
    return value if plain else QuotedString(value, Quote.double).with_quotes()


def parse(overrides: list[str]) -> list[Override]:
    """Parse overrides by Hydra's grammar."""
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()  # lists the options of glob(*)
            return OverridesParser.create(loader).parse_overrides(overrides)
    except OverrideParseException as error:
        key, equals, value = error.override.partition("=")
        require(equals == "=", f"{error.override}: must be KEY=VALUE")
        right = shlex.quote(f"{key}={quote(value)}")
        reason = f"= ~ [ ] ( ) and letters like λ need quotes; write {right}"
        raise InputError(f"{error.override}: {reason}") from error


def compose_config(command: str, overrides: list[str]) -> DictConfig:
    """Compose the configuration of a run, without Hydra's own section; HydraConfig has that."""
    parse(overrides)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose(command, overrides, return_hydra_config=True)
    except MissingConfigException as error:
        options = f"the options are {', '.join(error.options or [])}"
        raise InputError(f"there is no {error.missing_cfg_file}; {options}") from error
    except ConfigCompositionException as error:
        match = re.match(r"Could not override '([\w.]+)'", str(error))
        if match is None:
            raise
        key = match[1]
        groups = [path.name for path in CONF.iterdir() if path.is_dir()]
        chosen = [o for o in overrides if o.partition("=")[0] in (*groups, "hydra.searchpath")]
        known = [*known_keys(OmegaConf.to_container(compose_config(command, chosen))), *groups]
        last = key.rpartition(".")[2]
        same = [name for name in known if name == SYNONYMS.get(last) or name.endswith(f".{last}")]
        close = same or difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        if key.partition(".")[0] in ("trainer", "logger"):
            hint += f"+{key}=… passes it to Lightning; "
        message = f"there is no option {key}; {hint}rnode {command} --help lists them"
        raise InputError(message) from error
    with open_dict(config), read_write(config.hydra):
        config.hydra.runtime.output_dir = "outputs"  # the run folder, once Hydra has started
        HydraConfig.instance().set_config(config)  # for interpolations ${hydra:…}
        del config["hydra"]
    return config


def known_keys(config: dict) -> list[str]:
    """Return all keys of nested sections, such as trainer and trainer.max_epochs."""
    parts = (key.split(".") for key in flatten(config))
    return list(dict.fromkeys(key for path in parts for key in accumulate(path, "{}.{}".format)))


def validate(command: str, cfg: DictConfig) -> None:
    """Raise InputError if a key is missing or wrong."""
    missing = OmegaConf.missing_keys(cfg)
    require(not missing, f"{', '.join(sorted(missing))}=… is missing; --help describes it")
    config = OmegaConf.to_container(cfg, resolve=True)
    try:
        COMMANDS[command].model_validate(config)
    except ValidationError as error:
        detail = error.errors()[0]
    else:
        return
    key = ".".join(map(str, detail["loc"]))
    require(detail["type"] != "extra_forbidden", f"there is no option {key}; --help lists them")
    require(detail["type"] != "missing", f"{key}=… is missing; --help describes it")
    known = known_keys(config)
    while key not in known:  # the end of `loc` names an alternative of a type
        key = key.rpartition(".")[0]
    right = detail["msg"].partition(" should ")[2].replace("greater than or equal to", "at least")
    if detail["type"] == "string_pattern_mismatch":
        right = "be [DD:]HH:MM:SS"
    value = "null" if detail["input"] is None else " ".join(str(detail["input"]).split())
    right = right.replace("less than or equal to", "at most")
    raise InputError(f"{key}={value[:200]}: must {right}")
