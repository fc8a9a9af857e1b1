"""From a configuration to data and flow, and from a checkpoint to those of its run."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from inspect import Parameter, signature
from pathlib import Path

import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf

from rnode.app.launch import cluster_plugins, match_processes
from rnode.app.schema import CONF, flatten
from rnode.data.datamodule import DataModule
from rnode.dynamics import Probes
from rnode.errors import InputError, require
from rnode.flow import Flow
from rnode.training.checkpoint import flow_weights, load_checkpoint
from rnode.transforms import ImageTransform
from rnode.variational import VariationalDequantization

EXACT_UP_TO = 16  # dimensions: there div f by as many products as dimensions is cheap
SECTIONS = ("dataset", "model", "solver", "dequantization", "divergence", "probes", "test_probes")


def build(cfg: DictConfig, state: dict | None = None) -> tuple[DataModule, Flow]:
    """Build what dataset, model and solver describe.

    `state` is the state of the data in a checkpoint. Without it the data are read here if the size
    of the flow depends on them.
    """
    data, solver = instantiate(cfg.dataset), instantiate(cfg.solver)
    if state:
        data.load_state_dict(state)
    elif cfg.dataset.shape is None or cfg.dataset.get("context"):
        data.setup()
    sizes = {"k": data.context.size} if data.context else {}
    sizes |= {} if cfg.dataset.shape else {"shape": data.shape}
    probes = Probes(cfg.divergence, cfg.probes)
    flow = make_partial(cfg, "model")(solver=solver, probes=probes, **sizes)
    if cfg.dequantization == "variational":
        images = isinstance(data.transform, ImageTransform)
        require(images, "dequantization=variational: needs image data")
        levels, alpha = data.transform.levels, data.transform.logit.alpha
        flow.layers.insert(0, VariationalDequantization(data.shape[0], levels, alpha))
    few = math.prod(data.shape) <= EXACT_UP_TO
    flow.test_probes = Probes("exact" if few else cfg.divergence, cfg.test_probes or cfg.probes)
    return data, flow


def make_partial(cfg: DictConfig, section: str) -> partial:
    """Instantiate a section as the function or class that it names, with its options."""
    made = instantiate(cfg[section])
    require_options(section, made.keywords, made.func)
    return made


def require_options(section: str, options: Iterable[str], target: Callable) -> None:
    """Raise InputError unless the class or function of a section takes all of its options."""
    known = signature(target).parameters
    if Parameter.VAR_KEYWORD in (parameter.kind for parameter in known.values()):
        return
    for name in (name for name in options if name not in known):
        raise InputError(f"{section}.{name}: {target.__name__} has no such option")


def from_checkpoint(cfg: DictConfig) -> tuple[DataModule, Flow, Fabric]:
    """Load the data and the flow of `cfg.ckpt_path`, changed as the command line asks.

    From here on as many processes run as `cfg.trainer` asks for, each with the flow on its device.
    """
    data, flow = load_flow(cfg.ckpt_path, partial(apply_overrides, cfg=cfg), cfg.trust)
    match_processes(cfg.trainer, HydraConfig.get().overrides.task)
    torch.backends.cudnn.allow_tf32 = False  # an adaptive method would chase its error
    fabric = Fabric(**cfg.trainer, plugins=cluster_plugins())
    fabric.launch()
    return data, flow.to(fabric.device), fabric


def load_flow(
    path: str, change: Callable = lambda config: None, trust: Sequence[str] = ()
) -> tuple[DataModule, Flow]:
    """Load the data and the trained flow of a checkpoint, on the CPU.

    `change(config)` changes the configuration of the run first. InputError is raised if it names a
    class that neither conf/ nor a folder of --config-dir names, outside the packages that the user
    trusts.
    """
    checkpoint = load_checkpoint(path)
    sections = {name: checkpoint["config"].get(name) for name in SECTIONS}
    known = set(known_targets())
    for key, value in flatten(sections).items():
        package = str(value).split(".")[0]
        foreign = key.endswith("_target_") and str(value) not in known and package not in trust
        refused = f"call {value}, which conf/ does not name; if it is yours, add trust=[{package}]"
        what = refused if foreign else f"interpret {value}"
        refused = foreign or "${" in f"{key}{value}"
        require(not refused, f"ckpt_path={path}: its configuration would {what}")
    config, state = OmegaConf.create(sections), checkpoint.get("DataModule")
    if config.dataset.shape is None:
        config.dataset.shape = state["shape"]
    config.model.shape = config.model.get("shape") or config.dataset.shape
    change(config)
    (data, flow), weights = build(config, state), flow_weights(checkpoint)
    flow.load_state_dict(weights, assign=True)
    return data, flow.requires_grad_().eval()


def known_targets() -> Iterator[str]:
    """The classes that conf/ and the folders of --config-dir name for data, models and solvers."""
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []
    folders = [Path(s.path) for s in sources if s.schema == "file"]
    for folder, group in itertools.product((CONF, *folders), ("dataset", "model", "solver")):
        for file in (folder / group).glob("*.yaml"):
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
            yield from (v for key, v in flatten(content).items() if key.endswith("_target_"))


def apply_overrides(config: DictConfig, cfg: DictConfig) -> None:
    """Apply what the command line `cfg` sets to the configuration of a run."""
    keys = [override.split("=", 1)[0] for override in HydraConfig.get().overrides.task]
    if "solver" in keys:
        config.solver = cfg.solver
        config.solver.test = cfg.solver.train
    for key in (key for key in keys if key.startswith("solver.")):
        used = key.startswith("solver.test.") or key == "solver.dtype"
        require(used, f"{key}: only solver.test.… and solver.dtype apply to a trained flow")
        OmegaConf.update(config, key, OmegaConf.select(cfg, key))
    for key, value in cfg.dataset.items():
        if value is not None:
            known = key in config.dataset
            require(known, f"dataset.{key}={value}: the data of this run have no such option")
            config.dataset[key] = value
    if cfg.probes is not None:
        config.test_probes = cfg.probes
    config.divergence = cfg.divergence or config.divergence
