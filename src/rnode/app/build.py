"""From a configuration to data and flow, and from a checkpoint to its configuration."""

from collections.abc import Collection

import torch
import yaml
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rnode.app.schema import CONF, flatten
from rnode.bases import Mixture, Normal
from rnode.data.datamodule import DataModule
from rnode.dynamics import Probes
from rnode.errors import require
from rnode.flow import Flow
from rnode.transforms import ImageTransform, TableTransform
from rnode.variational import VariationalDequantization

SECTIONS = ("dataset", "model", "solver", "dequantization", "divergence", "probes")


def build(cfg: DictConfig, checkpoint: dict | None = None) -> tuple[DataModule, Flow]:
    """Build what dataset, model and solver describe.

    What was fitted to the data comes from the checkpoint. Without one the data are read.
    """
    data = instantiate(cfg.dataset)
    if checkpoint is None:
        data.setup()
    else:
        data.load_state_dict(checkpoint["DataModule"])
    flow = instantiate(cfg.model)(
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
    if isinstance(data.transform, TableTransform):
        flow.test_probes = Probes("exact")  # of fields that do not compute their divergence
    if checkpoint is not None:
        load_weights(flow, checkpoint)
    return data, flow


def load_weights(flow: Flow, checkpoint: dict) -> None:
    """Give a flow the weights of a checkpoint, and its base."""
    weights = {k.removeprefix("flow."): w for k, w in checkpoint["state_dict"].items()}
    means = weights.get("base.means")
    flow.base = Normal(flow.d)
    if means is not None:
        covariances = torch.eye(means.shape[1]).expand(len(means), -1, -1)
        flow.base = Mixture(means.new_ones(len(means)), means, covariances, flow.k)
    device = next(flow.parameters()).device
    flow.load_state_dict(weights, assign=True)
    flow.to(device)


def config_of(checkpoint: dict, path: str, trust: Collection[str]) -> DictConfig:
    """Return the configuration of a checkpoint's data, model and solver.

    Raises:
        InputError: if it would call a class that neither conf/ nor a package in `trust` names.
    """
    known = set()
    for group in ("dataset", "model", "solver"):
        for file in (CONF / group).glob("*.yaml"):
            content = flatten(yaml.safe_load(file.read_text(encoding="utf-8")))
            known |= {value for key, value in content.items() if key.endswith("_target_")}
    config = {name: checkpoint["config"][name] for name in SECTIONS}
    for key, value in flatten(config).items():
        would = f"ckpt_path={path}: its configuration would"
        require("${" not in f"{key}{value}", f"{would} interpret {value}")
        if key.endswith("_target_") and str(value) not in known:
            package = str(value).split(".")[0]
            hint = f"which conf/ does not name; if it is yours, add trust=[{package}]"
            require(package in trust, f"{would} call {value}, {hint}")
    return OmegaConf.create(config)


def apply_overrides(config: DictConfig, cfg: DictConfig) -> None:
    """Replace in the configuration of a run what a command sets; null leaves the run's own."""
    OmegaConf.set_struct(config, True)  # a run has the options of its own data alone
    changes = OmegaConf.masked_copy(cfg, ["dataset", "solver", "divergence", "probes"])
    for key, value in flatten(OmegaConf.to_container(changes)).items():
        if value is not None:
            OmegaConf.update(config, key, value)
