"""From a configuration to the data and the flow that it describes; from a checkpoint to those of its run."""

import functools
import math
from collections.abc import Callable, Iterator

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf

import cli
from launch import settle
from rnode.checkpoint import flow_weights, leaves, load_checkpoint
from rnode.data import DataModule
from rnode.dynamics import Probes
from rnode.errors import InputError, configured, is_int, is_shape, require
from rnode.flow import Flow

EXACT_UP_TO = 16  # dimensions: div f by as many products as there are dimensions is cheap there


def build(cfg: DictConfig) -> tuple[DataModule, Flow]:
    """What the groups dataset, model and solver describe."""
    with configured("dataset"):
        data = instantiate(cfg.dataset)
    with configured("solver"):
        solver = instantiate(cfg.solver)
    with configured("model"):
        return data, instantiate(cfg.model)(solver=solver, probes=Probes(cfg.divergence, cfg.probes))


def exact_if_small(config: DictConfig) -> None:
    shape = config.dataset.get("shape")
    if is_shape(shape) and math.prod(shape) <= EXACT_UP_TO:
        config.divergence = "exact"


def from_checkpoint(cfg: DictConfig) -> tuple[DataModule, Flow, Fabric]:
    """Data and trained flow of `cfg.ckpt_path`, with what the command line sets anew (conf/checkpoint.yaml).

    From here on there are as many processes as `cfg.trainer` asks for, each with the flow on its device.
    """
    cli.require_sections(cfg, "dataset", "solver", "trainer")
    require(isinstance(cfg.ckpt_path, str), "ckpt_path", cfg.ckpt_path, "a checkpoint of a run, such as outputs/…/best.ckpt")
    require(is_int(cfg.seed, at_least=0), "seed", cfg.seed, "a whole number from 0 to 2^32 - 1")
    data, flow = load_flow(cfg.ckpt_path, lambda config: set_anew(config, cfg))
    settle(cfg.trainer, HydraConfig.get().overrides.task)
    with configured("trainer"):
        fabric = Fabric(**cfg.trainer)
    fabric.launch()
    return data, flow.to(fabric.device), fabric


def load_flow(path: str, change: Callable[[DictConfig], None] = exact_if_small) -> tuple[DataModule, Flow]:
    """Data and trained flow of a checkpoint, on the CPU. `change` is given the configuration first.

    A checkpoint is data: its configuration may name what conf/ names, where conf/ names it, and nothing else.
    """
    checkpoint = load_checkpoint(path)
    config, weights = read_config(checkpoint["config"], path), flow_weights(checkpoint, path)
    change(config)
    with torch.device("meta"):  # no memory is taken for weights before their sizes are known to be the model's
        data, flow = build(config)
    try:
        flow.load_state_dict(weights, assign=True)
    except RuntimeError:
        raise InputError(f"ckpt_path={path}: its weights do not fit the model of its own configuration") from None
    return data, flow.eval()


def read_config(config: dict, path: str) -> DictConfig:
    """The sections of a checkpoint's configuration that describe data and flow; InputError unless it is one of ours."""
    names = ("dataset", "model", "solver", "divergence", "probes")
    if missing := [name for name in names if name not in config]:
        raise InputError(f"ckpt_path={path}: its configuration has no {missing[0]}")
    config = {name: config[name] for name in names}
    refuse_foreign(config, path)
    return OmegaConf.create(config)


def refuse_foreign(config: dict, path: str) -> None:
    """InputError unless `config` calls, at each place, what a file of conf/ calls there, and has no text to interpret."""
    found, known = dict(sections(config)), known_calls()
    keys = [key for section in found.values() for key in section]
    for text in (*keys, *leaves(config)):
        if isinstance(text, str) and "${" in text:
            raise InputError(f"ckpt_path={path}: its configuration would be interpreted: {text[:80]}")
    if not all(isinstance(key, str) for key in keys):
        raise InputError(f"ckpt_path={path}: its configuration has keys that are not names")
    for place, section in found.items():
        call = for_hydra(section)
        if call and call not in known.get(place, []):
            what = f"{str(call.get('_target_'))[:80]}, which is not of this project"
            if call.get("_target_") in [c["_target_"] for calls in known.values() for c in calls]:
                what = f"{call['_target_']} for {place}, or not as this project does"
            raise InputError(f"ckpt_path={path}: its configuration would call {what}")
    if missing := [place for place in known if not for_hydra(found.get(place, {}))]:
        raise InputError(f"ckpt_path={path}: its configuration does not say what {missing[0]} is")


@functools.cache
def known_calls() -> dict[str, list[dict]]:
    """By place in a configuration, such as dataset.source, the calls that the files of conf/ have there."""
    known: dict[str, list[dict]] = {}
    for file in (file for group in ("dataset", "model", "solver") for file in (cli.CONF / group).glob("*.yaml")):
        content = OmegaConf.to_container(OmegaConf.load(file))
        whole = content if "# @package _global_" in file.read_text() else {file.parent.name: content}
        for place, section in sections(whole):
            if call := for_hydra(section):
                known.setdefault(place, []).append(call)
    return known


def for_hydra(section: dict) -> dict:
    """What of a section Hydra reads: _target_, _partial_, _args_ and the like."""
    return {key: value for key, value in section.items() if key.startswith("_")}


def sections(value: object, place: str = "") -> Iterator[tuple[str, dict]]:
    """(place, section) of the sections of a configuration, at any depth, in lists too."""
    if isinstance(value, dict):
        yield place, value
        for key, part in value.items():
            yield from sections(part, f"{place}.{key}".removeprefix("."))
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from sections(part, f"{place}[{i}]")


def set_anew(config: DictConfig, cfg: DictConfig) -> None:
    """Put what the command line sets in the place of what the checkpoint has."""
    keys = [override.split("=", 1)[0] for override in HydraConfig.get().overrides.task]
    if unknown := [key for key in keys if key[0] in "+~"]:
        raise InputError(f"there is no option {unknown[0]}; --help lists them")
    if "solver" in keys:
        config.solver = cfg.solver
        config.solver.test = cfg.solver.train
    for key in (key for key in keys if key.startswith("solver.")):
        used = key.startswith("solver.test.") or key == "solver.dtype"
        require(used, "option", key, "solver.test.… or solver.dtype: a trained flow is not solved as in training")
        OmegaConf.update(config, key, OmegaConf.select(cfg, key))
    for key, value in cfg.dataset.items():
        if value is not None:
            require(key in config.dataset, f"dataset.{key}", value, "left out: the data of this run have no such option")
            config.dataset[key] = value
    exact_if_small(config)
    for key in ("divergence", "probes"):
        config[key] = config[key] if cfg[key] is None else cfg[key]
