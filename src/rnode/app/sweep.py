"""Sweeps (`-m`): run their jobs, skip jobs that have finished, and record jobs that fail."""

import math
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import current_process
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from rnode.app.exits import describe_error, one_line_errors
from rnode.app.processes import is_first_process
from rnode.app.schema import flatten
from rnode.errors import Stopped, require, require_choice
from rnode.training.results import CONFIG, DIVERGED, FAILED, OVERRIDES, RESULT, RESULTS, read_result

SWEPT = "RNODE_SWEPT"  # environment variable, for jobs: the keys that the sweep varies
LIMITS = [  # a job may differ in them from the run that it resumes
    f"trainer.{key}" for key in ("max_epochs", "max_steps", "max_time", "min_epochs", "min_steps")
]
WITHOUT_EFFECT = (  # keys, and sections, that do not change the result of a run
    *("folder", "ckpt_path", "sweep_metrics", "logger"),
    *(f"callbacks.{name}" for name in ("best", "cost", "figures", "gaussian", "progress", "save")),
    *("dataset.root", "trainer.accelerator", "trainer.strategy", "trainer.profiler"),
    *("trainer.log_every_n_steps", "trainer.enable_progress_bar", "trainer.enable_model_summary"),
)


def in_sweep() -> bool:
    """Return whether this process runs a job of a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def metric_values(cfg: DictConfig, result: dict) -> float | list[float]:
    """Return the results that a guided sweep optimizes; NaN for one that was not measured."""
    measured = [result.get(name) for name in cfg.sweep_metrics]
    values = [math.nan if value is None else value for value in measured]
    return values[0] if len(values) == 1 else values


def earlier_result(cfg: DictConfig, folder: Path) -> dict[str, float | None] | None:
    """Return the result that the job `cfg` has left in its folder; None if the job has to run.

    Raises:
        InputError: if the folder holds a run of another configuration.
    """
    if not any((folder / name).exists() for name in ("last.ckpt", "best.ckpt", RESULT)):
        return None
    there = flatten(OmegaConf.to_container(OmegaConf.load(folder / CONFIG)))
    here = flatten(OmegaConf.to_container(cfg, resolve=True))
    changed = [key for key in there.keys() | here.keys() if there.get(key) != here.get(key)]
    without_effect = tuple(f"{name}." for name in WITHOUT_EFFECT)
    changed = [key for key in changed if not f"{key}.".startswith(without_effect)]
    for key in sorted(changed):
        differ = f"another configuration ({key} is {there.get(key)} there and {here.get(key)} here)"
        require(key in LIMITS, f"{folder}: holds a run of {differ}; use another folder")
    return None if changed else read_result(folder)


def run_job(function: Callable[[DictConfig], Any], cfg: DictConfig, folder: Path) -> Any:
    """Run `function(cfg)`; in a sweep, record an error in `folder` and return None.

    The other jobs then run, and the sweep ends with a report. A signal ends the whole sweep.
    """
    for name in (DIVERGED, FAILED):  # of an earlier job in this folder
        (folder / name).unlink(missing_ok=True)
    if not in_sweep():
        return function(cfg)
    try:
        return function(cfg)
    except Stopped as stopped:
        resume = f"to resume the sweep, add hydra.sweep.dir={HydraConfig.get().sweep.dir}"
        print(f"stopped: {stopped}; {resume}", file=sys.stderr, flush=True)
        if current_process().name != "MainProcess":
            os._exit(128 + stopped.signal)  # joblib would catch SystemExit and run the next job
        sys.exit(128 + stopped.signal)
    except Exception as error:
        if is_first_process():
            line, _ = describe_error(error)
            print(f"error: job {folder.name}: {line}", file=sys.stderr, flush=True)
            if not (folder / DIVERGED).exists():
                (folder / FAILED).write_text(f"{line}\n", encoding="utf-8")
            if not (folder / OVERRIDES).exists():  # the job failed before its run started
                (folder / OVERRIDES).parent.mkdir(exist_ok=True)
                OmegaConf.save(HydraConfig.get().overrides.task, folder / OVERRIDES)
        return None


class Sweep(Callback):
    """Runs before and after the jobs of a sweep, in the process that the user started."""

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        with one_line_errors():  # Hydra turns other exceptions of a callback into warnings
            for name in config.sweep_metrics:
                require_choice("sweep_metrics", name, RESULTS)
        typed = OverridesParser.create().parse_overrides(config.hydra.overrides.task)
        keys = [override.key_or_group for override in typed if override.is_sweep_override()]
        sweeper = config.hydra.sweeper
        os.environ[SWEPT] = " ".join([*keys, *(sweeper.get("params") or ())])
        if "sampler" in sweeper and "seed" in sweeper.sampler and sweeper.sampler.seed is None:
            sweeper.sampler.seed = config.seed  # Optuna, started again, suggests the same jobs
        if not config.hydra.launcher._target_.endswith("BasicLauncher"):
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches the workers too

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        from rnode.app.report import report_sweep  # imports torch, which takes seconds

        with one_line_errors():
            report_sweep(Path(config.hydra.sweep.dir), config.logger.get("wandb"))
