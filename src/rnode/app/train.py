"""The command `train`: build data and flow, fit, test the best weights, and write the result."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rnode.app import sweep
from rnode.app.base import fit_to_z, start_at_closed_form
from rnode.app.build import build
from rnode.app.processes import cluster_plugins, is_first_process, launched, match_processes
from rnode.app.runs import Run
from rnode.app.summary import print_numbers
from rnode.data.datamodule import DataModule
from rnode.data.splits import SPLIT_NAMES
from rnode.errors import Diverged, InputError, one_line, require
from rnode.training.checkpoint import AtomicCheckpointIO, load_to_resume
from rnode.training.gaussian import validation_rows
from rnode.training.loggers import MetricsCSV, finish_wandb
from rnode.training.module import RNODE
from rnode.training.progress import Progress
from rnode.training.results import (
    CONFIG,
    DIVERGED,
    METRICS,
    OVERRIDES,
    RESULT,
    write_result,
)
from rnode.training.run_folder import ENVIRONMENT, environment, lock, whole_file
from rnode.transforms import TableTransform

ADVICE = "try a smaller optimizer.lr, a larger reg.lambda_j or more steps of solver.train"


def main(cfg: DictConfig) -> float | list[float]:
    """Train one flow in the run folder, and return what a guided sweep minimizes."""
    folder = Path(cfg.folder)
    overrides = list(HydraConfig.get().overrides.task)
    last = folder / "last.ckpt"
    match_processes(cfg.trainer)
    name_wandb(cfg.logger.get("wandb"), folder, overrides)
    if sweep.in_sweep():
        devices = cfg.trainer.devices  # the process of another device would run the sweep again
        require(devices == 1 or launched(), f"trainer.devices={devices}: must be 1 in a sweep")
        result = sweep.earlier_result(folder, overrides)
        if result is not None:
            print(f"{folder} has finished and is skipped")
            return sweep.metric_values(cfg, result)
        cfg.ckpt_path = "auto" if last.exists() else cfg.ckpt_path
    if cfg.ckpt_path == "auto":
        cfg.ckpt_path = str(last) if last.exists() else None
    resumes = cfg.ckpt_path is not None and Path(cfg.ckpt_path).resolve().parent == folder.resolve()
    try:
        with lock(folder, resumes) if is_first_process() else contextlib.nullcontext():
            result = fit(cfg, overrides)
            if result:  # of the first process
                publish(folder)
            return sweep.metric_values(cfg, result)
    except Diverged as error:
        if not is_first_process():
            sys.exit()  # the first process prints the error and returns the exit code
        message = (
            f"{error}; {ADVICE}; last good checkpoint: {last if last.exists() else 'none yet'}"
        )
        (folder / DIVERGED).write_text(f"{message}\n", encoding="utf-8")
        raise Diverged(message) from error


def name_wandb(wandb: DictConfig | None, folder: Path, overrides: list[str]) -> None:
    """Name W&B's run after its folder, or in a sweep after the swept overrides, and tag it."""
    if not wandb:
        return
    choices = HydraConfig.get().runtime.choices
    groups = [group for group in ("dataset", "model", "solver", "experiment") if choices[group]]
    wandb.tags = [*(f"{group}={choices[group]}" for group in groups), *wandb.tags]
    if sweep.in_sweep():
        wandb.group = wandb.group or folder.parent.name
        keys = os.environ.get(sweep.SWEPT_KEYS, "").split()  # a cluster may not pass it on
        swept = [text for text in overrides if text.split("=")[0].lstrip("+") in keys]
        wandb.name = wandb.name or " ".join(swept)
    wandb.name = wandb.name or folder.name


def fit(cfg: DictConfig, overrides: Sequence[str] = ()) -> dict[str, float | None]:
    """Fit a flow in cfg.folder, test its best weights, and return the content of result.json.

    The run folder records the `overrides` of the command line, from which `cfg` was composed.
    """
    folder = Path(cfg.folder)
    config = OmegaConf.to_container(cfg, resolve=True)
    started = time.monotonic()
    pl.seed_everything(cfg.seed, verbose=False)
    checkpoint = load_to_resume(cfg.ckpt_path, config) if cfg.ckpt_path else None
    callbacks = instantiate_all(cfg.callbacks)
    try:
        trainer = build_trainer(cfg, callbacks)  # before the data, which may take minutes to read
        data, flow = build(cfg, checkpoint)
        data.setup()
        validated = cfg.base == "normal" or validation_rows(trainer, data) > 0
        require(
            validated, f"base={cfg.base}: needs validation, which trainer.limit_val_batches=0 omits"
        )
        module = RNODE(
            flow,
            instantiate(cfg.optimizer),
            **cfg.reg,
            warmup_steps=warmup_steps(cfg, data),
            decay=cfg.decay,
            seed=cfg.seed,
            config=config,
        )
        if is_first_process():
            write_settings(cfg, overrides)
        trainer.loggers = [MetricsCSV(folder / METRICS, checkpoint), *trainer.loggers]
        for logger in trainer.loggers:
            logger.log_hyperparams(config)
        if checkpoint is not None:
            step, epoch = checkpoint["global_step"], checkpoint["epoch"]
            trainer.print(f"resuming from {cfg.ckpt_path}, step {step}, epoch {epoch}")
        if checkpoint is None and cfg.base != "normal":
            start_at_closed_form(cfg, trainer, module, data)
        fit_start = time.monotonic()
        trainer.fit(module, data, ckpt_path=cfg.ckpt_path, weights_only=True)
        fit_seconds = time.monotonic() - fit_start
        best = trainer.checkpoint_callback
        tested = best.best_model_path if best else None
        if not tested:
            trainer.validate(module, data, weights_only=True, verbose=False)
        if best and not tested:
            trainer.print("no validation during training: best.ckpt has the last weights")
            trainer.save_checkpoint(folder / "best.ckpt", weights_only=False)
            if trainer.global_step == 0:  # ckpt_path=auto resumes from there
                trainer.save_checkpoint(folder / "last.ckpt", weights_only=False)
        if cfg.base in ("mixture", "auto"):
            fit_to_z(cfg, trainer, module, data, fit_start - started, fit_seconds)
            tested = None
        trained = dict(trainer.callback_metrics)
        trainer.test(module, data, ckpt_path=tested or None, weights_only=True, verbose=False)
        if not trainer.is_global_zero:
            return {}
        metrics = {k: float(v) for k, v in (trained | trainer.callback_metrics).items()}
        score = best.best_model_score if tested else metrics.get("val/bits_per_dim", math.nan)
        result = write_result(folder, metrics, float(score))
        split = "test" if "test/bits_per_dim" in metrics else "val"
        bits = metrics.get(f"{split}/bits_per_dim", math.nan)
        nats = {f"{split}/nats": math.log(2) * flow.d * bits}
        table = isinstance(data.transform, TableTransform)
        numbers = nats | result if table else result | nats
        print_numbers(f"{SPLIT_NAMES[split]} set", numbers)
    finally:
        finish_wandb()
    return result


def publish(folder: Path) -> None:
    """Write the report of a finished run, and print where it is."""
    from rnode.app.report import write_report  # no step waits for polars and Jinja

    write_report([Run(folder.resolve())], folder / "report.html")
    print(f"run folder: {folder}")


def warmup_steps(cfg: DictConfig, data: DataModule) -> int:
    """Return the steps of the warm-up, by default 50 but those of two epochs at most."""
    n = len(data.splits.train)
    steps = cfg.warmup_steps
    if steps is None:
        steps = min(50, 2 * math.ceil(n / data.batch_size))
    if None in (cfg.dataset.batch_size, cfg.warmup_steps):
        chosen = f"dataset.batch_size={data.batch_size} warmup_steps={steps}"
        print(f"{chosen}, for {n} training samples")
    return steps


def build_trainer(cfg: DictConfig, callbacks: list[pl.Callback]) -> pl.Trainer:
    """Build Lightning's Trainer with the loggers of the run, but for metrics.csv."""
    for key in ("callbacks", "default_root_dir", "enable_checkpointing", "logger", "plugins"):
        hint = "+callbacks.NAME._target_=… and +logger.NAME._target_=… add a callback or logger"
        require(key not in cfg.trainer, f"trainer.{key}: is set by this program; {hint}")
    talks = cfg.trainer.enable_progress_bar
    loggers = instantiate_all(cfg.logger)
    try:
        return instantiate(
            cfg.trainer,
            max_time=cfg.trainer.max_time and f"00:{cfg.trainer.max_time}"[-11:],  # DD:HH:MM:SS
            enable_progress_bar=talks and sys.stdout.isatty(),
            callbacks=[c for c in callbacks if talks or not isinstance(c, Progress)],
            logger=loggers,
            enable_checkpointing=cfg.callbacks.get("best") is not None,
            plugins=[AtomicCheckpointIO(), *cluster_plugins()],
            default_root_dir=cfg.folder,
        )
    except InstantiationException as error:
        raise InputError(f"trainer: {one_line(error.__cause__ or error)}") from error


def write_settings(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Write what a run is made of to its folder, and remove the result of an earlier run there."""
    folder = Path(cfg.folder)
    (folder / RESULT).unlink(missing_ok=True)
    (folder / OVERRIDES).parent.mkdir(exist_ok=True)
    files = {CONFIG: cfg, ENVIRONMENT: environment(), OVERRIDES: list(overrides)}
    for name, content in files.items():
        with whole_file(folder / name, "w") as file:
            OmegaConf.save(content, file, resolve=True)


def instantiate_all(section: DictConfig) -> list:
    """Instantiate the entries of a section that have a `_target_`."""
    return [instantiate(entry) for entry in section.values() if entry and "_target_" in entry]
