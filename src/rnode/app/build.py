"""From a configuration to data and flow, and from a checkpoint to its configuration."""

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from inspect import Parameter, signature
from pathlib import Path

import yaml
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rnode.app.schema import flatten
from rnode.data.datamodule import DataModule
from rnode.dynamics import Probes
from rnode.errors import require
from rnode.flow import Flow
from rnode.transforms import ImageTransform, TableTransform
from rnode.variational import VariationalDequantization

EXACT_UP_TO = 16  # dimensions: there div f by as many vjps as dimensions is cheap
TABLE_PROBES = 4  # of wider tables in evaluation, at least: with one, their log p is too noisy
SECTIONS = ("dataset", "model", "solver", "dequantization", "divergence", "probes")


def build(cfg: DictConfig, state: dict | None = None) -> tuple[DataModule, Flow]:
    """Build what dataset, model and solver describe.

    `state` is the state of the data in a checkpoint. Without it the data are read.
    """
    data = instantiate(cfg.dataset)
    if state is None:
        data.setup()
    else:
        data.load_state_dict(state)
    flow = make_partial(cfg, "model")(
        shape=data.shape,
        solver=instantiate(cfg.solver),
        probes=Probes(cfg.divergence, cfg.probes),
        k=data.conditions.size,
    )
    if cfg.dequantization == "variational":
        images = isinstance(data.transform, ImageTransform)
        require(images, "dequantization=variational: needs image data")
        levels, alpha = data.transform.levels, data.transform.logit.alpha
        flow.layers.insert(0, VariationalDequantization(data.shape[0], levels, alpha))
    if flow.d <= EXACT_UP_TO:
        flow.test_probes = Probes("exact")
    elif isinstance(data.transform, TableTransform):
        flow.test_probes = Probes(cfg.divergence, max(TABLE_PROBES, cfg.probes))
    return data, flow


def make_partial(cfg: DictConfig, section: str) -> partial:
    """Instantiate a section as the function or class that it names, with its options."""
    function = instantiate(cfg[section])
    require_options(section, function.keywords, function.func)
    return function


def require_options(section: str, options: Iterable[str], target: Callable) -> None:
    """Raise InputError unless the class or function of a section takes all of its options."""
    known = signature(target).parameters
    if Parameter.VAR_KEYWORD in (parameter.kind for parameter in known.values()):
        return
    for name in options:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        unknown = f"{section}.{name}: {target.__name__} has no such option{hint}"
        require(name in known, unknown)


def config_of(
    checkpoint: dict, path: str, trust: Collection[str], folders: Iterable[Path]
) -> DictConfig:
    """Return the configuration of a checkpoint's data, model and solver.

    Raises:
        InputError: if it would call a class that neither the configuration files in `folders` nor a
            package in `trust` names.
    """
    config = {name: checkpoint["config"][name] for name in SECTIONS}
    known = set(known_targets(folders))
    for key, value in flatten(config).items():
        would = f"ckpt_path={path}: its configuration would"
        require("${" not in f"{key}{value}", f"{would} interpret {value}")
        if key.endswith("_target_") and str(value) not in known:
            package = str(value).split(".")[0]
            hint = f"which conf/ does not name; if it is yours, add trust=[{package}]"
            require(package in trust, f"{would} call {value}, {hint}")
    return OmegaConf.create(config)


def known_targets(folders: Iterable[Path]) -> Iterator[str]:
    """The classes that the files in `folders` name for data, models and solvers."""
    for folder in folders:
        for group in ("dataset", "model", "solver"):
            for file in (folder / group).glob("*.yaml"):
                content = flatten(yaml.safe_load(file.read_text(encoding="utf-8")))
                yield from (value for key, value in content.items() if key.endswith("_target_"))


def apply_overrides(config: DictConfig, cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Apply what the command line sets, `cfg` by `overrides`, to the configuration of a run."""
    keys = [override.split("=", 1)[0] for override in overrides]
    if "solver" in keys:
        config.solver = cfg.solver
        config.solver.test = cfg.solver.train
    for key in (key for key in keys if key.startswith("solver.")):
        applies = key.startswith("solver.test.") or key == "solver.dtype"
        require(applies, f"{key}: only solver.test.… and solver.dtype apply to a trained flow")
        OmegaConf.update(config, key, OmegaConf.select(cfg, key))
    for key, value in cfg.dataset.items():
        if value is not None:
            known = key in config.dataset
            require(known, f"dataset.{key}={value}: the data of this run have no such option")
            config.dataset[key] = value
    config.divergence = cfg.divergence or config.divergence
    config.probes = cfg.probes or config.probes
