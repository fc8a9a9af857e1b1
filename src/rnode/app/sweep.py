"""Sweeps (`-m`): run their jobs, skip jobs that have finished, and record jobs that fail.

The folder of a job says how the job ended: result.json marks a finished run, diverged.txt or
failed.txt holds the error message of the last job in this folder. Without any of these files the
job was interrupted, or is still running.
"""

import contextlib
import ctypes
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing import current_process
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from rnode.app.launch import is_first_process
from rnode.app.report_error import describe_error, one_line_errors, wants_traceback
from rnode.app.schema import flatten
from rnode.errors import Stopped, require
from rnode.training.results import RESULT, read_result

DIVERGED, FAILED, OVERRIDES = "diverged.txt", "failed.txt", ".hydra/overrides.yaml"
SWEPT = "RNODE_SWEPT"  # environment variable, for jobs: the keys that the sweep varies
SWEEP_METRICS = {
    "bits_per_dim": ["val/bits_per_dim"],
    "bits_per_dim_and_nfe": ["val/bits_per_dim", "val/nfe_forward"],
}
TIMES = ("max_epochs", "max_steps", "max_time", "min_epochs", "min_steps")
LIMITS = {f"trainer.{key}" for key in TIMES}  # a job resumes a run that had other limits
DISPLAY = ("log_every_n_steps", "profiler", "enable_progress_bar", "enable_model_summary")
IRRELEVANT = (  # keys, and sections, that do not change the result of a run
    *("ckpt_path", "sweep_metric", "save_every_n_steps", "cuda_graphs"),
    *("wandb", "pictures", "tensorboard", "mlflow"),
    *("dataset.root", "trainer.accelerator", "trainer.strategy", "trainer.on_divergence"),
    *(f"trainer.{key}" for key in DISPLAY),
)


def in_sweep() -> bool:
    """Return whether this process runs a job of a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def swept(overrides: list[str]) -> list[str]:
    """Return the overrides of a job of keys that the sweep varies."""
    keys = os.environ.get(SWEPT, "").split()  # a cluster may not pass it on
    return [override for override in overrides if override.split("=")[0].lstrip("+") in keys]


def metric_values(cfg: DictConfig, result: dict) -> float | list[float]:
    """Return what a guided sweep minimizes; NaN where the run did not measure it."""
    found = [result.get(name) for name in SWEEP_METRICS[cfg.sweep_metric]]
    values = [math.nan if value is None else value for value in found]
    return values if len(values) > 1 else values[0]


def earlier_result(cfg: DictConfig, folder: Path) -> dict[str, float | None] | None:
    """Return the result that the job `cfg` has left in its folder; None if the job has to run.

    Raises:
        InputError: if the folder holds a run of another configuration.
    """
    if not any((folder / name).exists() for name in ("last.ckpt", "best.ckpt", RESULT)):
        return None
    configs = (OmegaConf.load(folder / "config.yaml"), cfg)
    texts = (OmegaConf.to_yaml(config, resolve=True) for config in configs)
    theirs, ours = (flatten(OmegaConf.to_container(OmegaConf.create(text))) for text in texts)
    changed = {key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)}
    changed = {key for key in changed if not is_irrelevant(key)}
    other = sorted(changed - LIMITS)
    words = [f"{key} is {theirs.get(key)} there and {ours.get(key)} here" for key in other[:3]]
    words += [f"{len(other) - 3} more"] if len(other) > 3 else []
    differ = f"{folder}: holds a run of another configuration ({'; '.join(words)})"
    require(not other, f"{differ}; use another folder")
    return None if changed else read_result(folder)


def is_irrelevant(key: str) -> bool:
    """Return whether a dotted key does not change the result of a run."""
    return any(f"{key}.".startswith(f"{name}.") for name in IRRELEVANT)


def refuse_own_processes(trainer: Any) -> None:
    """Raise InputError if a job would start processes: each would run the command of the sweep."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    starts = environment is not None and not environment.creates_processes_externally
    require(
        not (in_sweep() and trainer.world_size > 1 and starts),
        f"trainer.devices={trainer.num_devices}: must be 1 in a sweep, unless a cluster starts the "
        "processes (hydra.launcher.tasks_per_node=… of submitit_slurm)",
    )


def run_job(function: Callable[[DictConfig], Any], cfg: DictConfig, folder: Path) -> Any:
    """Run `function(cfg)`; in a sweep, record an error in `folder` and return None.

    The other jobs then run, and the sweep ends with a report. A signal ends the whole sweep.
    """
    if not in_sweep():
        value = function(cfg)
        forget_failure(folder)
        return value
    parallel = current_process().name != "MainProcess"
    if parallel and sys.platform == "linux":  # joblib's workers would finish their queue alone
        set_signal_of_parents_death = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_signal_of_parents_death, signal.SIGTERM)
    forget_failure(folder)
    try:
        return function(cfg)
    except Stopped as stopped:
        resume = f"to resume the sweep, add hydra.sweep.dir={HydraConfig.get().sweep.dir}"
        print(f"stopped: {stopped}; {resume}", file=sys.stderr, flush=True)
        code = 128 + stopped.signal
        if parallel:
            os._exit(code)  # joblib would send an exception to the parent and start the next job
        sys.exit(code)
    except Exception as error:
        record_failure(error, folder)
        return None


def forget_failure(folder: Path) -> None:
    """Delete the error message of an earlier job in this folder."""
    for name in (DIVERGED, FAILED):
        (folder / name).unlink(missing_ok=True)


def record_failure(error: Exception, folder: Path) -> None:
    """Print why a job failed, and write it into the folder of the job."""
    line, _ = describe_error(error)
    if wants_traceback():
        traceback.print_exception(error)
    if not is_first_process():
        return
    print(f"error: job {folder.name}: {line}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):  # a full disk: the report says that there is no result
        if not (folder / DIVERGED).exists():
            (folder / FAILED).write_text(f"{line}\n", encoding="utf-8")
        if not (folder / OVERRIDES).exists():  # the job failed before its run started
            (folder / OVERRIDES).parent.mkdir(exist_ok=True)
            OmegaConf.save(HydraConfig.get().overrides.task, folder / OVERRIDES)


class Sweep(Callback):
    """Runs before and after the jobs of a sweep, in the process that the user started."""

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        with one_line_errors():  # Hydra turns other exceptions of a callback into warnings
            prepare(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        from rnode.app.sweep_report import report  # imports matplotlib, which no job needs

        with one_line_errors():
            report(Path(config.hydra.sweep.dir), config.get("wandb"))


def prepare(config: DictConfig) -> None:
    """Set the options of sweeper and launcher that follow from the configuration."""
    typed = OverridesParser.create().parse_overrides(config.hydra.overrides.task)
    keys = [override.key_or_group for override in typed if override.is_sweep_override()]
    os.environ[SWEPT] = " ".join([*keys, *(config.hydra.sweeper.get("params") or ())])
    metric, sweeper, launcher = config.sweep_metric, config.hydra.sweeper, config.hydra.launcher
    known = " or ".join(SWEEP_METRICS)
    require(metric in SWEEP_METRICS, f"sweep_metric={metric}: must be {known}")
    if "max_failure_rate" in sweeper:  # Optuna's
        given = {override.split("=")[0] for override in config.hydra.overrides.hydra}
        for key, reason in (("direction", "sweep_metric"), ("max_failure_rate", "the sweep")):
            name = f"hydra.sweeper.{key}"
            wrong = f"{name}={sweeper[key]}: must be left out; {reason} sets it"
            require(name not in given, wrong)
        sweeper.direction = ["minimize"] * len(SWEEP_METRICS[metric])
        sweeper.max_failure_rate = 1.0
        if "seed" in sweeper.sampler and sweeper.sampler.seed is None:
            sweeper.sampler.seed = config.seed  # started again, it suggests the same jobs
    if launcher._target_.endswith("JoblibLauncher"):
        import joblib  # installed with the launcher alone

        jobs, cores = joblib.effective_n_jobs(launcher.n_jobs), joblib.cpu_count()
        threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, cores // jobs)
        print(f"{cores} cores; jobs at a time (hydra.launcher.n_jobs): {jobs}, ", end="")
        print(f"threads of each (OMP_NUM_THREADS): {threads}")
    if not launcher._target_.endswith("BasicLauncher"):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches the workers too
