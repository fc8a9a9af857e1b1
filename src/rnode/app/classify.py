"""`rnode train task=classify`: train a neural ODE that classifies (section 9)."""

import json
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from rnode.app.banner import banner
from rnode.app.build import make_partial
from rnode.app.printing import print_table, quantities
from rnode.app.sweep import in_sweep
from rnode.app.train import trainer_options
from rnode.data.context import Label
from rnode.data.datamodule import DataModule
from rnode.errors import require
from rnode.training.classifier import MEASURES, Classifier, labelled, loaders
from rnode.training.loggers import MetricsCSV
from rnode.training.plots import plot_band, save_figure
from rnode.training.results import RESULT
from rnode.training.run_folder import lock, transcript, whole_file

USED = (  # keys, and sections, that the command line may set
    *("task", "seed", "dataset", "model.hidden", "model.layers", "solver", "regularizer", "reg"),
    *("optimizer", "warmup_steps", "trainer"),
)


def main(cfg: DictConfig) -> float:
    """Train in the run folder, and return the accuracy on the test set."""
    for text in HydraConfig.get().overrides.task:
        key = text.lstrip("+~").split("=")[0]
        used = any(f"{key}.".startswith(f"{name}.") for name in USED)
        require(used, f"{key}: task=classify does not use it")
    require(not in_sweep(), "task=classify: must be a single run; sweeps compare bits/dim")
    devices = cfg.trainer.devices
    require(devices == 1, f"trainer.devices={devices}: task=classify needs 1")
    folder = Path(HydraConfig.get().runtime.output_dir)
    with lock(folder, resumes=False), transcript(folder / "train.log", banner(cfg)):
        return train(cfg, folder)


def train(cfg: DictConfig, folder: Path) -> float:
    start = time.monotonic()
    pl.seed_everything(cfg.seed, verbose=False)
    data, classes = load(cfg)
    model, splits = cfg.model, data.splits
    sizes = {"hidden": model.hidden, "layers": model.layers, "warmup_steps": cfg.warmup_steps}
    solver, optimizer = instantiate(cfg.solver), make_partial(cfg, "optimizer")
    module = Classifier(data.shape, classes, solver, optimizer, **cfg.reg, **sizes)
    with whole_file(folder / "config.yaml", "w") as file:
        OmegaConf.save(cfg, file, resolve=True)
    best = ModelCheckpoint(folder, "best", "val/accuracy", mode="max", enable_version_counter=False)
    own = {"callbacks": [best], "logger": MetricsCSV(folder / "metrics.csv")}
    trainer = instantiate(trainer_options(cfg), **own, default_root_dir=folder)
    sets = labelled(splits, lambda x: features(data, x))
    train, val, test = loaders(sets, data.batch_size, data.eval_batch_size)
    trainer.fit(module, train, val)
    tested = best.best_model_path or None
    trainer.test(module, test, ckpt_path=tested, weights_only=True, verbose=False)
    *curve, measured = module.curve
    plot(curve, folder / "curves.png")
    result = {f"test/{name}": measured[name] for name in MEASURES}
    result["train/seconds"] = module.seconds
    with whole_file(folder / RESULT, "w") as file:
        json.dump(result, file, indent=2)
    table = quantities("test set")
    for name, label in MEASURES.items():
        table.add_row(label, f"{measured[name]:.4g}")
    seconds = f"{module.seconds:.0f}, {time.monotonic() - start:.0f}"
    table.add_row("seconds: training, whole run", seconds)
    print_table(table)
    print(f"run folder: {folder}")
    return measured["accuracy"]


def load(cfg: DictConfig) -> tuple[DataModule, int]:
    """Return data with labels, and the number of their classes."""
    name = HydraConfig.get().runtime.choices["dataset"]
    require("context" in cfg.dataset, f"task=classify: dataset={name} has no labels")
    if cfg.dataset.context is None and cfg.dataset.levels is not None:
        cfg.dataset.context = "label"
    data = instantiate(cfg.dataset)
    data.setup()
    columns = list(data.context.columns.values()) if data.context else []
    whole = isinstance(data.splits.train, Tensor)
    require(whole, f"task=classify: dataset={name} does not fit into memory")
    one = len(columns) == 1 and isinstance(columns[0], Label)
    require(one, f"dataset.context={cfg.dataset.context}: must be one column of labels")
    return data, columns[0].size


def features(data: DataModule, x: Tensor) -> Tensor:
    """Images in [0, 1], or standardized columns."""
    if data.transform.discrete and hasattr(data.transform, "levels"):
        return x / (data.transform.levels - 1)
    return data.transform.for_evaluation(
        x, torch.arange(len(x)), x.new_empty(len(x), 0), data.seed
    ).y


def plot(curve: list[dict[str, float]], path: Path) -> None:
    """Plot the accuracy and the NFE of each validation against the seconds of training."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for ax, name in zip(axes, ("accuracy", "nfe"), strict=True):
        plot_band(ax, [tuple([row[key] for row in curve] for key in ("seconds", name))])
        ax.set(xlabel="seconds of training", ylabel=f"validation {MEASURES[name]}")
    axes[1].locator_params("y", integer=True)
    save_figure(figure, path)
