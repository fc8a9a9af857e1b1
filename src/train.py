"""Train a flow: compose → instantiate → fit → test. `python src/train.py --help` lists what can be set."""

import sys

import hydra
from omegaconf import DictConfig, OmegaConf

import cli

REWINDS = 3  # at most, with trainer.on_divergence=rewind

# What is slow to import (torch, Lightning, W&B) is imported where it is used: --help and a misspelt key do not wait.


@hydra.main(version_base="1.3", config_path=str(cli.CONF), config_name="config")
@cli.job
def main(cfg: DictConfig) -> float:
    """One run, in the folder Hydra made for it. Returns the best validation bits/dim, for sweeps to minimize."""
    refuse_unknown(cfg)
    from collections import Counter
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from rnode.allocator import keep_freed_memory
    from rnode.checkpoint import load_checkpoint
    from rnode.errors import DivergenceError, is_int, require
    from rnode.trainer_options import check_trainer_options

    quiet()
    keep_freed_memory()
    folder = Path(HydraConfig.get().runtime.output_dir)
    require(is_int(cfg.seed, at_least=0), "seed", cfg.seed, "a whole number from 0 to 2^32 - 1")
    check_trainer_options(OmegaConf.to_container(cfg.trainer, resolve=True))
    require(isinstance(cfg.compile, bool), "compile", cfg.compile, "true or false")
    on_divergence = cfg.trainer.on_divergence
    require(on_divergence in ("stop", "rewind"), "trainer.on_divergence", on_divergence, "stop or rewind")

    ckpt_path, last = cfg.ckpt_path, folder / "last.ckpt"
    if ckpt_path == "auto":
        ckpt_path = str(last) if last.exists() else None
    halvings, factor = (
        Counter(),
        1.0,
    )  # of the learning rate, by the step gone back to; that step's checkpoint has none of them
    try:
        while True:
            try:
                return train(cfg, folder, ckpt_path, factor)
            except DivergenceError as error:
                if on_divergence == "stop" or halvings.total() == REWINDS or not last.exists():
                    advice = "try a smaller optimizer.lr, a larger reg.lambda_j or a smaller solver.train.step_size"
                    message = f"{error}; {advice}; last good checkpoint: {last if last.exists() else 'none yet'}"
                    (folder / "diverged.txt").write_text(f"{message}\n")
                    raise DivergenceError(message) from error
                ckpt_path = str(last)
                step = load_checkpoint(ckpt_path)["global_step"]
                halvings[step] += 1
                factor = 0.5 ** halvings[step]
                print(f"{error}; going back to step {step} with half the learning rate", file=sys.stderr)
    finally:
        finish_wandb()


def train(cfg: DictConfig, folder, ckpt_path: str | None, learning_rate_factor: float) -> float:
    """Fit, then test the best weights. Returns the best validation bits/dim.

    `learning_rate_factor` is put to the learning rate that the checkpoint `ckpt_path` has.
    """
    import shlex

    import pytorch_lightning as pl
    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate
    from pytorch_lightning.callbacks import ModelCheckpoint

    from build import build
    from rnode.callbacks import Compile, EpochTimer, Progress, RefineGrid, SaveWithinEpochs, ScaleLearningRate, StopOnSignal
    from rnode.checkpoint import AtomicCheckpointIO, check_checkpoint, restoring
    from rnode.errors import Stopped
    from rnode.module import RNODE

    pl.seed_everything(cfg.seed, verbose=False)
    config = OmegaConf.to_container(cfg, resolve=True)
    data, flow = build(cfg)
    schedule = {"warmup_steps": cfg.warmup_steps, "decay": cfg.decay}
    module = RNODE(flow, instantiate(cfg.optimizer), **cfg.reg, **schedule, seed=cfg.seed, config=config)
    step = None if ckpt_path is None else check_checkpoint(ckpt_path, config)
    best = ModelCheckpoint(folder, filename="best", monitor="val/bits_per_dim", enable_version_counter=False)
    # Not save_last=True of the one above: Lightning then writes the last epoch only if it is also the best.
    last = ModelCheckpoint(folder, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
    callbacks = [EpochTimer(), StopOnSignal(folder / "last.ckpt"), instantiate(cfg.pictures, folder)]
    within = SaveWithinEpochs(folder / "last.ckpt", cfg.save_every_n_steps)
    callbacks += [within, best, last] if cfg.trainer.enable_checkpointing else []
    callbacks += [Compile()] if cfg.compile else []
    callbacks += [RefineGrid(cfg.refine)] if cfg.refine is not None and not flow.solver.train.adaptive else []
    callbacks += [ScaleLearningRate(learning_rate_factor)] if learning_rate_factor != 1 else []
    callbacks += [Progress()] if cfg.trainer.enable_progress_bar else []
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    trainer = instantiate(
        OmegaConf.masked_copy(cfg.trainer, [name for name in cfg.trainer if name != "on_divergence"]),
        logger=loggers(cfg.wandb, folder, config, step),
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO(), *(cfg.trainer.plugins or [])],
        default_root_dir=folder,
    )

    try:
        with restoring(ckpt_path):
            trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        if not best.best_model_path:  # stopped before the first validation, by trainer.max_steps for example
            trainer.validate(module, data, verbose=False)
        trained = dict(trainer.callback_metrics)
        trainer.test(module, data, ckpt_path=best.best_model_path or None, weights_only=True, verbose=False)
    except Stopped as stopped:
        kept = "no checkpoint yet"
        if (folder / "last.ckpt").exists():
            overrides = [*HydraConfig.get().overrides.task, f"hydra.run.dir={folder}", "ckpt_path=auto"]
            kept = f"last checkpoint: {folder / 'last.ckpt'}; to go on: {shlex.join(['python', 'src/train.py', *overrides])}"
        raise Stopped(f"{stopped}; {kept}", stopped.signal) from None
    if trainer.is_global_zero:
        summarize(trained | trainer.callback_metrics, module, folder)
    score = best.best_model_score
    return float(trained.get("val/bits_per_dim", "nan") if score is None else score)  # nan: no validation was wanted


def refuse_unknown(cfg: DictConfig) -> None:
    """What `+key=value` adds must be something that a run reads; a section stays one."""
    from rnode.errors import InputError

    cli.require_sections(cfg, "trainer", "solver", "model", "dataset", "optimizer", "pictures", "wandb", "reg")
    known = {*OmegaConf.load(cli.CONF / "config.yaml"), "trainer", "solver", "model", "dataset", "reg"}
    known |= {"reg.lambda_k", "reg.lambda_j"}
    for key in [*cfg, *(f"reg.{name}" for name in cfg.reg)]:
        if key not in known:
            raise InputError(f"there is no option {key}; python src/train.py --help lists them")


def quiet() -> None:
    """Silence what Lightning and torch say about choices that are made on purpose here."""
    import logging
    import warnings

    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    for message in (
        r".*does not have many workers.*",  # the data are in memory: a worker would only copy them
        r".*(Checkpoint|Experiment logs) directory .* exists and is not empty.*",  # it holds Hydra's and our config
        r".*number of training batches .* is smaller than the logging interval.*",
        r".*could not find the monitored key.*",  # a run stopped before its first validation is validated at its end
        r".*The dirpath has changed.*",  # a resumed run has a folder of its own
        r".*Using `DistributedSampler` with the dataloaders.*",  # the metrics count each image once all the same
        r".*There is a wandb run already in progress.*",  # of this run, before it was rewound
        r".*LeafSpec.*",  # Lightning's own use of torch
        r".*your dataloader is not resumable.*",  # it goes on where the checkpoint's epoch was cut off
    ):
        warnings.filterwarnings("ignore", message)


def loggers(wandb: DictConfig, folder, config: dict, step: int | None) -> list:
    """metrics.csv in the run folder, and a W&B run there unless it is disabled.

    `step` is that of the checkpoint a run goes on from. If that run was in this folder, its rows up to there are kept.
    """
    from pytorch_lightning.loggers import CSVLogger, WandbLogger

    from rnode.errors import configured, require
    from rnode.pictures import read_metrics

    modes = ("offline", "online", "disabled")
    require(wandb.mode in modes, "wandb.mode", wandb.mode, " or ".join(modes))
    earlier = read_metrics(folder / "metrics.csv") if step is not None else []
    csv = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
    rows = [row for row in earlier if int(row["step"]) < step and not any(key.startswith("test/") for key in row)]
    if rows:
        csv.experiment.metrics = rows  # Lightning's writer would begin the file anew
        csv.save()
    if wandb.mode == "disabled":
        return [csv]
    from wandb import Settings, setup

    setup(Settings(silent=True))  # the summary says what W&B would
    with configured("wandb"):
        return [csv, WandbLogger(save_dir=folder, config=config, **wandb)]


def finish_wandb() -> None:
    """Close the run, so that the next job of a multirun opens its own."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()


def summarize(metrics: dict, module, folder) -> None:
    """The table at the end of a run."""
    from math import log

    from rich.console import Console
    from rich.table import Table

    table = Table(title="test set", title_justify="left")
    table.add_column("quantity")
    table.add_column("value", justify="right")

    def row(name: str, key: str, form: str) -> None:
        if key in metrics:
            table.add_row(name, form.format(float(metrics[key])))

    bits, error = (float(metrics.get(f"test/bits_per_dim{suffix}", "nan")) for suffix in ("", "_se"))
    nats = log(2) * module.flow.d
    table.add_row("bits/dim (± standard error)", f"{bits:.4f} ± {error:.4f}")
    table.add_row("negative log-likelihood, nats", f"{bits * nats:.3f} ± {error * nats:.3f}")
    row("NFE forward per batch, training", "train/nfe_forward", "{:.0f}")
    row("NFE backward per batch, training", "train/nfe_backward", "{:.0f}")
    row("NFE forward per batch, test", "test/nfe_forward", "{:.0f}")
    row("kinetic energy / d", "test/kinetic", "{:.4f}")
    row("squared Jacobian norm / d", "test/jacobian", "{:.4f}")
    row("seconds per epoch", "train/seconds_per_epoch", "{:.1f}")
    console = Console()
    console.print(table)
    console.print(f"run folder: {folder}", soft_wrap=True)
    for run in sorted(folder.glob("wandb/offline-run-*")):
        console.print(f"W&B: wandb sync {run}", soft_wrap=True)


if __name__ == "__main__":
    cli.run(main, "train.py", "Train a continuous normalizing flow by maximum likelihood (RNODE).")
