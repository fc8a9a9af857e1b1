"""The command `train`: build data and flow, fit, test the best weights, and write the result."""

import contextlib
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from pytorch_lightning.callbacks import Checkpoint, ProgressBar
from pytorch_lightning.loggers import Logger, WandbLogger

from rnode.app import sweep
from rnode.app.build import build, make_partial, require_options
from rnode.app.processes import cluster_plugins, is_first_process, launched, match_processes
from rnode.app.report import write_report
from rnode.app.runs import Run
from rnode.app.schema import flatten
from rnode.app.summary import make_table, print_table
from rnode.app.validation import quote
from rnode.errors import Diverged, Stopped, require
from rnode.training.checkpoint import AtomicCheckpointIO, load_checkpoint, load_to_resume
from rnode.training.loggers import MetricsCSV, finish_wandb
from rnode.training.module import RNODE
from rnode.training.pretraining import Pretraining
from rnode.training.results import CONFIG, DIVERGED, METRICS, OVERRIDES, RESULT, write_result
from rnode.training.run_folder import ENVIRONMENT, environment, lock, transcript, whole_file

ADVICE = "try a smaller optimizer.lr, a larger reg.lambda_j or more steps of solver.train"


def main(cfg: DictConfig) -> float | list[float]:
    """Train one flow in the run folder, and return what a guided sweep minimizes."""
    folder, overrides = Path(cfg.folder), list(HydraConfig.get().overrides.task)
    last = folder / "last.ckpt"
    match_processes(cfg.trainer)
    name_loggers(cfg, overrides)
    if sweep.in_sweep():
        require_one_device(cfg.trainer.devices)
        result = sweep.earlier_result(cfg, folder)
        if result is not None:
            print(f"{folder} has finished and is skipped")
            return sweep.metric_values(cfg, result)
        cfg.ckpt_path = "auto" if last.exists() else cfg.ckpt_path
    resumes = cfg.ckpt_path == "auto"
    if resumes:
        cfg.ckpt_path = str(last) if last.exists() else None
    elif cfg.ckpt_path is not None:
        resumes = Path(cfg.ckpt_path).resolve().parent == folder.resolve()
    with contextlib.ExitStack() as stack:
        if is_first_process():
            stack.enter_context(lock(folder, resumes))
            stack.enter_context(transcript(folder / "train.log"))
        try:
            return sweep.metric_values(cfg, fit(cfg, overrides))
        except Diverged as error:
            if not is_first_process():
                sys.exit()  # the first process prints the error and returns the exit code
            good = last if last.exists() else "none yet"
            message = f"{error}; {ADVICE}; last good checkpoint: {good}"
            (folder / DIVERGED).write_text(f"{message}\n", encoding="utf-8")
            raise Diverged(message) from error
        except Stopped as stopped:
            kept = "no checkpoint yet"
            if last.exists():
                place = f"hydra.run.dir={quote(str(folder))}"
                resume = ["rnode", "train", *overrides, place, "ckpt_path=auto"]
                kept = f"last checkpoint: {last}; to resume: {shlex.join(resume)}"
            raise Stopped(f"{stopped}; {kept}", stopped.signal) from None


def require_one_device(devices: int | str | ListConfig) -> None:
    """Raise InputError if a job of a sweep would start processes: each would run the sweep."""
    single = devices in (1, "1") or (isinstance(devices, ListConfig) and len(devices) == 1)
    require(
        single or launched() is not None,
        f"trainer.devices={devices}: must be 1 in a sweep, unless a cluster starts the processes "
        "(hydra.launcher.tasks_per_node=… of submitit_slurm)",
    )


def fit(cfg: DictConfig, overrides: Sequence[str] = ()) -> dict[str, float | None]:
    """Fit a flow in cfg.folder, test its best weights, and return the content of result.json.

    The run folder records the `overrides` of the command line, from which `cfg` was composed.
    """
    start, folder = time.monotonic(), Path(cfg.folder)
    pl.seed_everything(cfg.seed, verbose=False)
    config = OmegaConf.to_container(cfg, resolve=True)
    data, flow = build(cfg)
    checkpoint = None
    if cfg.ckpt_path is not None:
        checkpoint = load_to_resume(cfg.ckpt_path, config)
        report_resume(cfg.ckpt_path, checkpoint, config)
    callbacks = instantiate_all(cfg.callbacks)
    module = RNODE(
        flow,
        make_partial(cfg, "optimizer"),
        **cfg.reg,
        warmup_steps=cfg.warmup_steps,
        decay=cfg.decay,
        seed=cfg.seed,
        config=config,
        pretraining=next((c for c in callbacks if isinstance(c, Pretraining)), None),
    )
    if is_first_process():
        (folder / RESULT).unlink(missing_ok=True)
        files = {CONFIG: cfg, ENVIRONMENT: environment()}
        for name, content in (files | {OVERRIDES: list(overrides)}).items():
            with whole_file(folder / name, "w") as file:
                OmegaConf.save(content, file, resolve=True)
    try:
        loggers = [MetricsCSV(folder / METRICS, checkpoint), *instantiate_all(cfg.logger)]
        trainer = make_trainer(cfg, callbacks, loggers)
        for logger in loggers:
            logger.log_hyperparams(config)
        trainer.fit(module, data, ckpt_path=cfg.ckpt_path, weights_only=True)
        best = trainer.checkpoint_callback
        tested = best.best_model_path if best else None
        if not tested:  # the run stopped before its first validation
            trainer.validate(module, data, verbose=False)
        trained = dict(trainer.callback_metrics)
        trainer.test(module, data, ckpt_path=tested or None, weights_only=True, verbose=False)
        if not trainer.is_global_zero:
            return {}
        metrics = {k: float(v) for k, v in (trained | trainer.callback_metrics).items()}
        score = best.best_model_score if tested else metrics.get("val/bits_per_dim", math.nan)
        result = write_result(folder, metrics, float(score))
        metrics |= {
            "train/seconds": result["train/seconds"] or 0.0,
            "all": time.monotonic() - start,
        }
        epoch = load_checkpoint(tested)["epoch"] + 1 if tested else trainer.current_epoch
        table = make_table(metrics, flow, data.transform, f"test set, weights of epoch {epoch}")
        print_table(table)
        for logger in (logger for logger in loggers if isinstance(logger, WandbLogger)):
            columns = [list(column.cells) for column in table.columns]
            logger.log_table("result", ["quantity", "value"], list(zip(*columns, strict=True)))
    finally:
        finish_wandb()
    write_report([Run(folder.resolve())], folder / "report.html")
    print(f"run folder: {folder}")
    if runs := sorted(map(str, folder.glob("wandb/offline-run-*"))):
        print(f"W&B: wandb sync {' '.join(runs)}")
    return result


def instantiate_all(section: DictConfig) -> list:
    """Instantiate the entries of a section that have a `_target_`; a logger may be turned off."""
    entries = [entry for entry in section.values() if entry and "_target_" in entry]
    return [made for made in map(instantiate, entries) if made is not None]


def make_trainer(
    cfg: DictConfig, callbacks: list[pl.Callback], loggers: list[Logger]
) -> pl.Trainer:
    """Make Lightning's Trainer of a run."""
    options = dict(cfg.trainer)
    require_options("trainer", options.keys() - {"_target_"}, pl.Trainer)
    if options["max_time"] is not None and options["max_time"].count(":") == 2:
        options["max_time"] = f"00:{options['max_time']}"  # with the days
    if not options["enable_progress_bar"]:
        callbacks = [c for c in callbacks if not isinstance(c, ProgressBar)]
    return instantiate(
        {"enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks)} | options,
        callbacks=callbacks,
        logger=loggers,
        plugins=[AtomicCheckpointIO(), *cluster_plugins()],
        default_root_dir=cfg.folder,
    )


def report_resume(path: str, checkpoint: dict, config: dict) -> None:
    """Print what a resumed run takes from the checkpoint and what from the command line."""
    if not is_first_process():
        return
    step, epoch = checkpoint["global_step"], checkpoint["epoch"]
    print(f"resuming from {path}: weights, optimizer state, step {step}, epoch {epoch}")
    theirs, ours = flatten(checkpoint["config"]), flatten(config)
    for key in sorted(theirs.keys() | ours.keys()):
        if theirs.get(key) != ours.get(key) and not sweep.is_irrelevant(key):
            print(f"{key}={ours.get(key)} from the command line (checkpoint: {theirs.get(key)})")


def name_loggers(cfg: DictConfig, overrides: list[str]) -> None:
    """Name a run after its folder; in a sweep after the swept overrides, in the sweep's group."""
    name, group = Path(cfg.folder).name, None
    if sweep.in_sweep():
        name = " ".join(sweep.swept(overrides)) or name
        group = Path(cfg.folder).parent.name
    if wandb := cfg.logger.get("wandb"):
        chosen = HydraConfig.get().runtime.choices
        groups = [key for key in ("dataset", "model", "solver", "experiment") if chosen[key]]
        wandb.tags = [*(f"{key}={chosen[key]}" for key in groups), *wandb.tags]
        wandb.name = wandb.name or name
        wandb.group = wandb.group or group
    if cfg.logger.get("mlflow"):
        OmegaConf.update(cfg, "logger.mlflow.run_name", name, force_add=True)
