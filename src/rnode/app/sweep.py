"""Sweeps (`-m`): what their jobs share, which jobs have finished, and the report at the end."""

import math
import signal
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from rnode.app.exits import one_line_errors
from rnode.errors import require
from rnode.training.results import OVERRIDES, RESULT, read_result

SWEPT_KEYS = "RNODE_SWEPT"  # environment variable, for jobs: the keys that the sweep varies
LIMITS = {"trainer.max_epochs", "trainer.max_steps", "trainer.max_time"}
# Keys, or their first letters, that do not change the result of a run.
WITHOUT_EFFECT = ("ckpt_path", "logger", "callbacks.figures", "dataset.root", "trainer.accelerator")


def in_sweep() -> bool:
    """Return whether this process runs a job of a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def metric_values(cfg: DictConfig, result: dict) -> float | list[float]:
    """Return the results that a guided sweep optimizes; NaN for one that was not measured."""
    values = [math.nan if result.get(k) is None else result[k] for k in cfg.sweep_metrics]
    return values[0] if len(values) == 1 else values


def earlier_result(folder: Path, overrides: list[str]) -> dict[str, float | None] | None:
    """Return the result that a job has left in its folder; None if the job has to run.

    Raises:
        InputError: if the folder holds a run of other overrides. Its limits may differ.
    """
    if not any((folder / name).exists() for name in ("last.ckpt", "best.ckpt", RESULT)):
        return None
    differing = set(OmegaConf.load(folder / OVERRIDES)) ^ set(overrides)
    keys = {override.partition("=")[0] for override in differing}
    changed = {key for key in keys if not key.startswith(WITHOUT_EFFECT)}
    others = ", ".join(sorted(changed - LIMITS))
    require(not others, f"{folder}: holds a run with another {others}; use another folder")
    return None if changed else read_result(folder)


class Sweep(Callback):
    """Runs before and after the jobs of a sweep, in the process that the user started."""

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        sampler = config.hydra.sweeper.get("sampler", {})
        if sampler.get("seed", 0) is None:
            sampler.seed = config.seed  # Optuna, started again, suggests the same jobs
        if not config.hydra.launcher._target_.endswith("BasicLauncher"):
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches the workers too

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        from rnode.app.report import report_sweep  # imports torch, which takes seconds

        with one_line_errors():  # Hydra would turn other exceptions of a callback into warnings
            report_sweep(Path(config.hydra.sweep.dir))
