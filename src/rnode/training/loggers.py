"""The loggers of a run: metrics.csv, and W&B as this program sets it up."""

import csv
import sys
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from rnode.training.results import read_metrics
from rnode.training.run_folder import whole_file


class MetricsCSV(Logger):
    """Appends each row to a file as it is logged; a new column rewrites the whole file.

    A run that resumes from a `checkpoint` drops the rows that it logs again, where Lightning's
    CSVLogger would delete all.
    """

    name = version = None

    def __init__(self, path: Path, checkpoint: dict | None = None):
        super().__init__()
        self.path = path
        self.columns = []
        if rank_zero_only.rank == 0:
            rows = [] if checkpoint is None else read_metrics(path)
            done = (row for row in rows if int(row["step"]) < checkpoint["global_step"])
            self.write([row for row in done if not any(key.startswith("test/") for key in row)])

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = metrics | {"step": step}
        if not row.keys() <= set(self.columns):
            self.write([*read_metrics(self.path), row])
            return
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)

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


class WandbRun(WandbLogger):
    """A run of W&B, which begins with the first metrics: mistakes leave none, no step waits.

    Its summary keeps the least validation bits/dim.
    """

    settings: dict | None = None  # of a run that has not begun

    @property
    def experiment(self) -> Any:  # which Lightning reads before training
        return None if self.settings else super().experiment

    def log_hyperparams(self, params: dict) -> None:
        self.settings = params

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self.settings:
            import wandb  # takes a second to import

            wandb.setup(wandb.Settings(silent=True))  # the table at the end says what W&B would
            settings, self.settings = self.settings, None
            place = {"step_metric": "trainer/global_step"}
            self.experiment.define_metric("val/bits_per_dim", summary="min", **place)
            super().log_hyperparams(settings)
        super().log_metrics(metrics, step)


def finish_wandb() -> None:
    """Close the W&B run, so that the next job of a sweep opens its own."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()
