"""The command `train`: build data and flow, fit, test the best weights, and write the result."""

import contextlib
import sys
import time
from collections import Counter
from math import log, nan
from pathlib import Path

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.loggers import WandbLogger
from rich.table import Table

from rnode.app import sweep
from rnode.app.banner import banner
from rnode.app.build import build, make_partial, require_options
from rnode.app.launch import cluster_plugins, is_first_process, match_processes
from rnode.app.printing import print_table, quantities
from rnode.app.quoting import quote, shell_quote
from rnode.app.report import write_report
from rnode.app.runs import read_run
from rnode.app.schema import flatten
from rnode.errors import Diverged, Stopped
from rnode.flow import Flow
from rnode.training import callbacks, progress, solving
from rnode.training.checkpoint import AtomicCheckpointIO, load_checkpoint, load_to_resume
from rnode.training.environment import ENVIRONMENT, environment
from rnode.training.graphs import CUDAGraphs
from rnode.training.loggers import Label, finish_wandb, make_loggers
from rnode.training.module import RNODE
from rnode.training.pretraining import Pretraining
from rnode.training.results import GAUSSIAN, RESULT, write_result
from rnode.training.run_folder import lock, transcript, whole_file
from rnode.training.yardstick import Yardstick
from rnode.transforms import TableTransform

REWINDS = 3  # at most, with trainer.on_divergence=rewind
ADVICE = "try a smaller optimizer.lr, a larger reg.lambda_j or more steps of solver.train"
TABLE = {
    "NFE forward per batch, training": ("train/nfe_forward", ".0f"),
    "NFE backward per batch, training": ("train/nfe_backward", ".0f"),
    "NFE forward per batch, test": ("test/nfe_forward", ".0f"),
    "kinetic energy / d": ("test/kinetic", ".4f"),
    "squared Jacobian norm / d": ("test/jacobian", ".4f"),
    "seconds per training step": ("train/seconds_per_step", ".3g"),
}


def main(cfg: DictConfig) -> float | list[float]:
    """Train one flow in the run folder, and return what a guided sweep minimizes."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    match_processes(cfg.trainer, HydraConfig.get().overrides.task)
    ckpt_path, last = cfg.ckpt_path, folder / "last.ckpt"
    if sweep.in_sweep():
        if (result := sweep.earlier_result(cfg, folder)) is not None:
            print(f"{folder} has finished and is skipped")
            return sweep.metric_values(cfg, result)
        ckpt_path = "auto" if last.exists() else ckpt_path
    inside = ckpt_path is not None and Path(ckpt_path).resolve().parent == folder.resolve()
    resumes = inside or ckpt_path == "auto"
    if ckpt_path == "auto":
        ckpt_path = str(last) if last.exists() else None
    try:
        with contextlib.ExitStack() as stack:
            if is_first_process():
                stack.enter_context(lock(folder, resumes))
                stack.enter_context(transcript(folder / "train.log", banner(cfg)))
            return train(cfg, folder, ckpt_path)
    finally:
        finish_wandb()


def train(cfg: DictConfig, folder: Path, ckpt_path: str | None) -> float | list[float]:
    """Fit and test; after a divergence, go back to the last checkpoint if the run asks for it."""
    last = folder / "last.ckpt"
    halvings: Counter[int] = Counter()  # of the learning rate, by the step of the checkpoint
    while True:
        try:
            return sweep.metric_values(cfg, fit(cfg, folder, ckpt_path, halvings))
        except Diverged as error:
            stop = cfg.trainer.on_divergence == "stop" or halvings.total() == REWINDS
            if stop or not last.exists():
                if not is_first_process():
                    sys.exit()  # the first process prints the error and returns the exit code
                good = last if last.exists() else "none yet"
                message = f"{error}; {ADVICE}; last good checkpoint: {good}"
                (folder / sweep.DIVERGED).write_text(f"{message}\n", encoding="utf-8")
                raise Diverged(message) from error
            ckpt_path = str(last)
            step = load_checkpoint(ckpt_path)["global_step"]
            halvings[step] += 1
            back = f"going back to step {step} with half the learning rate"
            if is_first_process():
                print(f"{error}; {back}", file=sys.stderr)


def fit(cfg: DictConfig, folder: Path, ckpt_path: str | None, halvings: Counter[int]) -> dict:
    """Fit anew or from `ckpt_path` on, test the best weights, and return the result."""
    start = time.monotonic()
    pl.seed_everything(cfg.seed, verbose=False)
    config = OmegaConf.to_container(cfg, resolve=True)
    data, flow = build(cfg)
    step, epoch, factor = None, None, 1.0
    if ckpt_path is not None:
        checkpoint = load_to_resume(ckpt_path, config)
        step = checkpoint["global_step"]
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        epoch = None if batches["is_last_batch"] else checkpoint["epoch"]
        factor = checkpoint["learning_rate_factor"] * 0.5 ** halvings[step]
        report_resume(ckpt_path, checkpoint, config)
    schedule = {"warmup_steps": cfg.warmup_steps, "decay": cfg.decay}
    options = {"seed": cfg.seed, "config": config, "learning_rate_factor": factor}
    module = RNODE(flow, make_partial(cfg, "optimizer"), **cfg.reg, **schedule, **options)
    overrides = HydraConfig.get().overrides.task
    if is_first_process():
        (folder / RESULT).unlink(missing_ok=True)
        files = {"config.yaml": cfg, sweep.OVERRIDES: overrides, ENVIRONMENT: environment()}
        for name, content in files.items():
            with whole_file(folder / name, "w") as file:
                OmegaConf.save(content, file, resolve=True)
    best = callbacks.BestCheckpoint(folder)
    loggers = make_loggers(cfg, folder, config, make_label(folder, overrides), step, epoch)
    trainer = make_trainer(cfg, folder, flow, best, loggers)
    sweep.refuse_own_processes(trainer)
    try:
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        if not best.best_model_path:  # the run stopped before its first validation
            trainer.validate(module, data, verbose=False)
        trained = dict(trainer.callback_metrics)
        tested = best.best_model_path or None
        trainer.test(module, data, ckpt_path=tested, weights_only=True, verbose=False)
    except Stopped as stopped:
        kept = "no checkpoint yet"
        if (folder / "last.ckpt").exists():
            place = f"hydra.run.dir={quote(str(folder))}"
            resume = ["rnode", "train", *overrides, place, "ckpt_path=auto"]
            command = " ".join(map(shell_quote, resume))
            kept = f"last checkpoint: {folder / 'last.ckpt'}; to resume: {command}"
        raise Stopped(f"{stopped}; {kept}", stopped.signal) from None
    if not trainer.is_global_zero:
        return {}
    metrics, score = trained | trainer.callback_metrics, best.best_model_score
    score = trained.get("val/bits_per_dim", nan) if score is None else score
    result = write_result(folder, metrics, float(score))
    weights = (
        f"weights of epoch {load_checkpoint(tested)['epoch'] + 1}" if tested else "last weights"
    )
    validation, whole = float(metrics.get("val/seconds", 0)), time.monotonic() - start
    seconds = f"{result['train/seconds'] or 0:.0f}, {validation:.0f}, {whole:.0f}"
    title = f"test set, {weights}"
    table = make_table(metrics, flow, data.transform, title, seconds)
    print_table(table)
    for logger in (logger for logger in loggers if isinstance(logger, WandbLogger)):
        columns = [list(column.cells) for column in table.columns]
        logger.log_table("result", ["quantity", "value"], list(zip(*columns, strict=True)))
    write_report([read_run(folder.resolve())], folder / "report.html")
    print(f"run folder: {folder}")
    if runs := sorted(map(str, folder.glob("wandb/offline-run-*"))):
        print(f"W&B: wandb sync {' '.join(runs)}")
    return result


def make_trainer(
    cfg: DictConfig, folder: Path, flow: Flow, best: Callback, loggers: list
) -> pl.Trainer:
    """Make Lightning's Trainer with the callbacks, plugins and loggers of a run."""
    save = callbacks.SaveAndStop(folder / "last.ckpt", cfg.save_every_n_steps)
    dataset = HydraConfig.get().runtime.choices["dataset"]
    used = [Yardstick(), callbacks.Cost(), save, instantiate(cfg.pictures, folder, dataset)]
    used += [best] if cfg.trainer.enable_checkpointing else []
    if (patience := cfg.early_stopping.patience) is not None:
        # A run may end before its first validation.
        used += [EarlyStopping("val/bits_per_dim", patience=patience, strict=False)]
    used += [Pretraining(cfg.pretrain.share)] if "pretrain" in cfg else []
    used += [solving.TF32(cfg.tf32)]
    refines = cfg.refine is not None and not flow.solver.train.adaptive
    used += [solving.RefineGrid(cfg.refine)] if refines else []
    required = cfg.cuda_graphs is True
    used += [CUDAGraphs(required)] if cfg.cuda_graphs else []
    bar = cfg.trainer.enable_progress_bar and sys.stdout.isatty()
    used += [progress.Report(bar)] if cfg.trainer.enable_progress_bar else []
    used += [progress.Bar()] if bar else []
    plugins = [AtomicCheckpointIO(), *cluster_plugins()]
    options = trainer_options(cfg)
    options["enable_progress_bar"] = bar  # else Lightning would add its own
    own = {"callbacks": used, "plugins": plugins, "logger": loggers}
    own = {name: ours + list(instantiate(options.pop(name, []))) for name, ours in own.items()}
    return instantiate(options, **own, default_root_dir=folder)


def trainer_options(cfg: DictConfig) -> dict:
    """Return the options of `trainer` as Lightning's Trainer takes them."""
    options = {name: value for name, value in cfg.trainer.items() if name != "on_divergence"}
    if (time := options["max_time"]) is not None and time.count(":") == 2:
        options["max_time"] = f"00:{time}"  # with the days
    require_options("trainer", options.keys() - {"_target_"}, pl.Trainer)
    return options


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


def make_label(folder: Path, overrides: list[str]) -> Label:
    """Name a run after its folder; in a sweep after the overrides that the user gave as lists."""
    chosen = HydraConfig.get().runtime.choices
    tags = [f"{group}={chosen[group]}" for group in ("dataset", "model", "solver")]
    tags += [f"{group}={chosen[group]}" for group in ("recipe", "experiment") if chosen[group]]
    if not sweep.in_sweep():
        return Label(folder.name, None, tags)
    return Label(" ".join(sweep.swept(overrides)) or folder.name, folder.parent.name, tags)


def make_table(metrics: dict, flow: Flow, transform: object, title: str, seconds: str) -> Table:
    """Return the table at the end of a run."""
    table = quantities(title)
    bits, error = (float(metrics[f"test/bits_per_dim{suffix}"]) for suffix in ("", "_se"))
    nats = log(2) * flow.d
    table.add_row("bits/dim (± standard error)", f"{bits:.4f} ± {error:.4f}")
    tabular = isinstance(transform, TableTransform)
    units = " (units of the table)" * tabular
    table.add_row(
        f"negative log-likelihood, nats{units}", f"{bits * nats:.3f} ± {error * nats:.3f}"
    )
    if tabular:
        log_det = float(metrics["test/log_det"]) - transform.log_det_whitening
        standardized = bits * nats + log_det
        table.add_row("negative log-likelihood, nats (standardized)", f"{standardized:.3f}")
    if (gaussian := metrics.get(GAUSSIAN)) is not None:
        table.add_row("bits/dim of a Gaussian, validation set", f"{float(gaussian):.4f}")
    table.add_row("weights", f"{progress.count_weights(flow):,}")
    table.add_row("divergence", str(flow.test_probes))
    for name, (key, form) in TABLE.items():
        if key in metrics:
            table.add_row(name, format(float(metrics[key]), form))
    table.add_row("seconds: training, validation, whole run", seconds)
    return table
