"""The loggers: metrics.csv, W&B, TensorBoard and MLflow."""

import csv
import os
import sys
from pathlib import Path
from typing import NamedTuple

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from rnode.errors import WriteError, one_line, require
from rnode.training.results import read_metrics
from rnode.training.run_folder import whole_file


class MetricsCSV(Logger):
    """Appends each row as it is logged; a new column rewrites the whole file.

    A resumed run drops the rows that it logs again: those from step `before` on, those of a test,
    and the time of the `epoch` in which it resumes.
    """

    name = version = ""

    def __init__(self, path: Path, before: int = 0, epoch: int | None = None):
        super().__init__()
        self.path, self.columns = path, []
        if rank_zero_only.rank == 0:
            rows = [row for row in read_metrics(path) if int(row["step"]) < before]
            again = {"train/seconds_per_epoch", "epoch"}
            rows = [r for r in rows if not (again <= r.keys() and r["epoch"] == str(epoch))]
            self.write([row for row in rows if not any(key.startswith("test/") for key in row)])

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = metrics | {"step": step}
        if not row.keys() <= set(self.columns):
            self.write([*read_metrics(self.path), row])
            return
        try:
            with open(self.path, "a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        except OSError as error:
            raise WriteError(f"{self.path} could not be written ({one_line(error)})") from error

    def write(self, rows: list[dict]) -> None:
        """Replace the file by these rows; without rows there is no file."""
        self.columns = sorted(set().union(*rows))
        if not rows:
            self.path.unlink(missing_ok=True)
            return
        with whole_file(self.path, "w") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)

    def log_hyperparams(self, params: object, *args: object, **kwargs: object) -> None:
        pass  # config.yaml holds them


class Label(NamedTuple):
    """How the run is called where several runs are shown together."""

    name: str
    group: str | None  # of a sweep
    tags: list[str]


def make_loggers(
    cfg: DictConfig, folder: Path, config: dict, label: Label, step: int | None, epoch: int | None
) -> list[Logger]:
    """Return the logger of metrics.csv and those that the configuration chooses.

    A run that resumes from `step`, in the middle of `epoch` unless that is None, keeps earlier
    rows.
    """
    loggers = [MetricsCSV(folder / "metrics.csv", step or 0, epoch)]
    if "wandb" in cfg and cfg.wandb.mode != "disabled":
        loggers.append(make_wandb(cfg.wandb, folder, config, label, step is not None))
    try:
        if "tensorboard" in cfg:
            loggers.append(instantiate(cfg.tensorboard, save_dir=folder))
        if "mlflow" in cfg:
            loggers.append(instantiate(cfg.mlflow, run_name=cfg.mlflow.run_name or label.name))
    except InstantiationException as error:
        require(not isinstance(error.__cause__, ModuleNotFoundError), one_line(error.__cause__))
        raise
    return loggers


def make_wandb(
    wandb: DictConfig, folder: Path, config: dict, label: Label, resumes: bool
) -> WandbLogger:
    """Return the logger of W&B, whose summary keeps the least validation bits/dim.

    The W&B run of a resumed run has the same name and another offline folder, which `wandb sync`
    joins to the first.
    """
    import wandb as library  # takes a second to import

    library.setup(library.Settings(silent=True))  # the table at the end says what W&B would
    place = os.environ.get("WANDB_DIR", folder)
    earlier = folder.glob("wandb/*run-*-*") if resumes else ()  # …run-DATE_TIME-ID
    identity = max((path.name.split("-")[-2:] for path in earlier), default=[None])[-1]
    options = dict(wandb) | {"save_dir": place, "config": config, "id": identity}
    options["name"], options["group"] = wandb.name or label.name, wandb.group or label.group
    logger = WandbLogger(**options | {"tags": [*label.tags, *wandb.tags]})
    step = {"step_metric": "trainer/global_step"}
    logger.experiment.define_metric("val/bits_per_dim", summary="min", **step)
    return logger


def finish_wandb() -> None:
    """Close the W&B run, so that the next job of a sweep opens its own."""
    library = sys.modules.get("wandb")
    if library is not None and library.run is not None:
        library.finish()
