"""From a configuration to the data and the flow that it describes; from a checkpoint to those of its run."""

import math
import re
from collections.abc import Callable

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf

import cli
from launch import settle
from rnode.checkpoint import load_checkpoint
from rnode.data import DataModule
from rnode.dynamics import Probes
from rnode.errors import InputError, is_int, require
from rnode.flow import Flow

EXACT_UP_TO = 16  # dimensions: div f by as many products as there are dimensions is cheap there


def build(cfg: DictConfig) -> tuple[DataModule, Flow]:
    """What the groups dataset, model and solver describe."""
    data = instantiate(cfg.dataset)
    return data, instantiate(cfg.model)(solver=instantiate(cfg.solver), probes=Probes(cfg.divergence, cfg.probes))


def exact_if_small(config: DictConfig) -> None:
    if math.prod(config.dataset.shape) <= EXACT_UP_TO:
        config.divergence = "exact"


def from_checkpoint(cfg: DictConfig) -> tuple[DataModule, Flow, Fabric]:
    """Data and trained flow of `cfg.ckpt_path`, with what the command line sets anew (conf/checkpoint.yaml).

    From here on there are as many processes as `cfg.trainer` asks for, each with the flow on its device.
    """
    require(isinstance(cfg.ckpt_path, str), "ckpt_path", cfg.ckpt_path, "a checkpoint of a run, such as outputs/…/best.ckpt")
    require(is_int(cfg.seed, at_least=0) and cfg.seed < 2**32, "seed", cfg.seed, "a whole number from 0 to 2^32 - 1")
    data, flow = load_flow(cfg.ckpt_path, lambda config: set_anew(config, cfg))
    settle(cfg.trainer, HydraConfig.get().overrides.task)
    fabric = Fabric(**cfg.trainer)
    fabric.launch()
    return data, flow.to(fabric.device), fabric


def load_flow(path: str, change: Callable[[DictConfig], None] = exact_if_small) -> tuple[DataModule, Flow]:
    """Data and trained flow of a checkpoint, on the CPU. `change` is given the configuration first.

    A checkpoint is data: its configuration may name what conf/ names and nothing else.
    """
    checkpoint = load_checkpoint(path)
    config = read_config(checkpoint["config"], path)
    change(config)
    data, flow = build(config)
    prefix = "flow."
    weights = {key.removeprefix(prefix): w for key, w in checkpoint["state_dict"].items() if key.startswith(prefix)}
    try:
        flow.to(next(iter(weights.values())).dtype).load_state_dict(weights)
    except (RuntimeError, StopIteration):
        raise InputError(f"ckpt_path={path}: its weights do not fit the model of its own configuration") from None
    return data, flow.eval()


def read_config(config: dict, path: str) -> DictConfig:
    """The sections of a checkpoint's configuration that describe data and flow; InputError if they are not plain data."""
    sections = ("dataset", "model", "solver", "divergence", "probes")
    if missing := [name for name in sections if name not in config]:
        raise InputError(f"ckpt_path={path}: its configuration has no {missing[0]}")
    config = {name: config[name] for name in sections}
    allowed = {
        target for file in cli.CONF.glob("*/*.yaml") for target in re.findall(r"_target_: (rnode\S+)", file.read_text())
    }
    refuse_foreign(config, allowed, path)
    return OmegaConf.create(config)


def refuse_foreign(value: object, allowed: set[str], path: str) -> None:
    """InputError if `value`, at any depth, has a `_target_` that is not allowed or text that OmegaConf would interpret."""
    if isinstance(value, dict):
        target = value.get("_target_")
        if target is not None and target not in allowed:
            raise InputError(f"ckpt_path={path}: its configuration would call {target}, which is not of this project")
        for key, child in value.items():
            refuse_foreign(key, allowed, path)
            refuse_foreign(child, allowed, path)
    elif isinstance(value, list):
        for child in value:
            refuse_foreign(child, allowed, path)
    elif isinstance(value, str) and "${" in value:
        raise InputError(f"ckpt_path={path}: its configuration would be interpreted: {value[:80]}")


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
