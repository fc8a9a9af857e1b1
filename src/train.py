"""Train a flow: compose → instantiate → fit → test. `python src/train.py --help` lists what can be set."""

import sys

import hydra
from omegaconf import DictConfig, OmegaConf

import cli
import sweep

REWINDS = 3  # at most, with trainer.on_divergence=rewind

# What is slow to import (torch, Lightning, W&B) is imported where it is used: --help and a misspelt key do not wait.


@hydra.main(version_base="1.3", config_path=str(cli.CONF), config_name="config")
@cli.job
@sweep.job
def main(cfg: DictConfig) -> float | list[float]:
    """One run, in the folder Hydra made for it. Returns its `objective`, for sweeps to minimize.

    In a sweep, a job that is finished there is skipped, and one that was cut off goes on.
    """
    refuse_unknown(cfg)
    from collections import Counter
    from pathlib import Path

    import torch
    from hydra.core.hydra_config import HydraConfig
    from pytorch_lightning.utilities import rank_zero_only

    from launch import settle
    from rnode.allocator import keep_freed_memory
    from rnode.checkpoint import load_checkpoint
    from rnode.errors import DivergenceError, is_int, require
    from rnode.files import claim
    from rnode.trainer_options import check_trainer_options

    cli.quiet()
    keep_freed_memory()
    folder = Path(HydraConfig.get().runtime.output_dir)
    require(is_int(cfg.seed, at_least=0), "seed", cfg.seed, "a whole number from 0 to 2^32 - 1")
    check_trainer_options(OmegaConf.to_container(cfg.trainer, resolve=True))
    settle(cfg.trainer, HydraConfig.get().overrides.task)
    require(isinstance(cfg.compile, bool), "compile", cfg.compile, "true or false")
    on_divergence = cfg.trainer.on_divergence
    require(on_divergence in ("stop", "rewind"), "trainer.on_divergence", on_divergence, "stop or rewind")
    require(cfg.objective in sweep.OBJECTIVES, "objective", cfg.objective, " or ".join(sweep.OBJECTIVES))

    ckpt_path, last = cfg.ckpt_path, folder / "last.ckpt"
    if sweep.is_job():
        if (result := sweep.earlier_result(cfg, folder)) is not None:
            print(f"{folder} is finished, and skipped")
            return sweep.objective(cfg, result)
        ckpt_path = "auto" if last.exists() else ckpt_path
    claimed = claim(folder, ckpt_path)
    if ckpt_path == "auto":
        ckpt_path = str(last) if last.exists() else None
    # Of the learning rate, by the step gone back to; that step's checkpoint has none of them.
    halvings, factor = Counter(), 1.0
    try:
        while True:
            try:
                return sweep.objective(cfg, train(cfg, folder, ckpt_path, factor))
            except DivergenceError as error:
                first = rank_zero_only.rank == 0
                several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
                alone = several and not error.shared  # the other processes know nothing of it
                if on_divergence == "stop" or alone or halvings.total() == REWINDS or not last.exists():
                    if not (first or alone):
                        sys.exit()  # the first process says it, and has the exit code
                    advice = "try a smaller optimizer.lr, a larger reg.lambda_j or a smaller solver.train.step_size"
                    message = f"{error}; {advice}; last good checkpoint: {last if last.exists() else 'none yet'}"
                    (folder / "diverged.txt").write_text(f"{message}\n")
                    raise DivergenceError(message) from error
                ckpt_path = str(last)
                step = load_checkpoint(ckpt_path)["global_step"]
                halvings[step] += 1
                factor = 0.5 ** halvings[step]
                if first:
                    print(f"{error}; going back to step {step} with half the learning rate", file=sys.stderr)
    finally:
        finish_wandb()
        claimed.close()


def train(cfg: DictConfig, folder, ckpt_path: str | None, learning_rate_factor: float) -> dict:
    """Fit, then test the best weights. Returns what result.json holds, in the process that writes it.

    `learning_rate_factor` is put to the learning rate that the checkpoint `ckpt_path` has.
    """
    import shlex

    import pytorch_lightning as pl
    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate
    from pytorch_lightning.callbacks import ModelCheckpoint
    from pytorch_lightning.utilities import rank_zero_only

    from build import build
    from launch import plugins
    from rnode.callbacks import Compile, EpochTimer, Progress, RefineGrid, SaveWithinEpochs, ScaleLearningRate, StopOnSignal
    from rnode.checkpoint import AtomicCheckpointIO, check_checkpoint, restoring
    from rnode.errors import Stopped
    from rnode.files import whole_file
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
    if rank_zero_only.rank == 0:
        (folder / sweep.RESULT).unlink(missing_ok=True)
        for name, told in (("config.yaml", cfg), (sweep.OVERRIDES, HydraConfig.get().overrides.task)):
            with whole_file(folder / name, "w") as file:
                OmegaConf.save(told, file, resolve=True)
    trainer = instantiate(
        OmegaConf.masked_copy(cfg.trainer, [name for name in cfg.trainer if name != "on_divergence"]),
        logger=loggers(cfg.wandb, folder, config, step),
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO(), *plugins(), *(cfg.trainer.plugins or [])],
        default_root_dir=folder,
    )
    sweep.refuse_own_processes(trainer)

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
    if not trainer.is_global_zero:
        return {}
    metrics, score = trained | trainer.callback_metrics, best.best_model_score
    summarize(metrics, module, folder)
    score = float(trained.get("val/bits_per_dim", "nan") if score is None else score)  # nan: no validation was wanted
    return sweep.write_result(folder, metrics, score)


def refuse_unknown(cfg: DictConfig) -> None:
    """What `+key=value` adds must be something that a run reads; a section stays one."""
    from rnode.errors import InputError

    cli.require_sections(cfg, "trainer", "solver", "model", "dataset", "optimizer", "pictures", "wandb", "reg")
    known = {*OmegaConf.load(cli.CONF / "config.yaml"), "trainer", "solver", "model", "dataset", "reg"}
    known |= {"reg.lambda_k", "reg.lambda_j"}
    for key in [*cfg, *(f"reg.{name}" for name in cfg.reg)]:
        if key not in known:
            raise InputError(f"there is no option {key}; python src/train.py --help lists them")


def loggers(wandb: DictConfig, folder, config: dict, step: int | None) -> list:
    """metrics.csv in the run folder, and a W&B run there unless it is disabled.

    `step` is that of the checkpoint a run goes on from. If that run was in this folder, its rows up to there are kept and
    its W&B run goes on, in a second offline folder of the same name, which `wandb sync` joins to the first.
    """
    from pytorch_lightning.loggers import WandbLogger

    from rnode.errors import configured, require
    from rnode.metrics import MetricsFile

    modes = ("offline", "online", "disabled")
    require(wandb.mode in modes, "wandb.mode", wandb.mode, " or ".join(modes))
    metrics = MetricsFile(folder / "metrics.csv", before=step or 0)
    if wandb.mode == "disabled":
        return [metrics]
    from wandb import Settings, setup

    setup(Settings(silent=True))  # the summary says what W&B would
    earlier = folder.glob("wandb/*run-*-*") if step is not None else ()  # offline-run-DATE_TIME-ID
    identity = max((path.name.split("-")[-2:] for path in earlier), default=[None])[-1]
    with configured("wandb"):
        return [metrics, WandbLogger(save_dir=folder, config=config, id=identity, **wandb)]


def finish_wandb() -> None:
    """Close the run, so that the next job of a multirun opens its own; say if what it logged is not all on the disk."""
    from pathlib import Path

    wandb = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return
    log = Path(wandb.run.settings.log_internal)
    wandb.finish()
    lines = log.read_text().splitlines() if log.is_file() else []  # W&B's writer, another process, says it there alone
    lost = next((line for line in lines if "failed to save record" in line), None)
    if lost:
        reason = lost.rsplit(": ", 1)[-1].strip('"}')
        print(f"W&B could not write all that was logged ({reason}); metrics.csv has it", file=sys.stderr)


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
    if runs := sorted(map(str, folder.glob("wandb/offline-run-*"))):
        console.print(f"W&B: wandb sync {' '.join(runs)}", soft_wrap=True)


if __name__ == "__main__":
    cli.run(main, "train.py", "Train a continuous normalizing flow by maximum likelihood (RNODE).")
