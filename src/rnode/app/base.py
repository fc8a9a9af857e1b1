"""The base of a run: a density in closed form where a flow starts, and what is fitted to z.

This is `base=gaussian`, `mixture` and `auto`; `base=normal` needs none of it.
"""

import copy
import math
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Timer
from rich.table import Table

from rnode.app.build import load_weights
from rnode.app.summary import print_table
from rnode.data.closed_forms import fit_candidates, fit_gaussian, fit_z, name_of
from rnode.data.datamodule import DataModule
from rnode.errors import require
from rnode.evaluation import weighted_mean
from rnode.training.callbacks import StopBehindClosedForm
from rnode.training.checkpoint import load_checkpoint
from rnode.training.gaussian import validation_rows
from rnode.training.module import RNODE
from rnode.training.results import CLOSED_FORM
from rnode.training.resume import BestCheckpoint
from rnode.training.schedule import passed
from rnode.transforms import TableTransform

START_SECONDS = 10  # of the fits before training, at most
START_SHARE = 0.1  # of max_time, for these fits
END_SHARE = 0.2  # of the time of a run, for the fits that follow it


def start_at_closed_form(
    cfg: DictConfig, trainer: pl.Trainer, module: RNODE, data: DataModule
) -> None:
    """Let a flow start at a density in closed form, which is the first best.ckpt.

    For base=auto it is a Gaussian of the columns as transformed for the best density, which is
    kept in CLOSED_FORM: a flow learns more from there than from a mixture.
    """
    flow = module.flow
    if isinstance(data.transform, TableTransform):
        rows = validation_rows(trainer, data)
        timers = (each for each in trainer.callbacks if isinstance(each, Timer))  # of max_time
        seconds = [START_SECONDS, *(START_SHARE * each.time_remaining() for each in timers)]
        limit = min(seconds) if trainer.world_size == 1 else math.inf  # all processes fit the same
        candidates = fit_candidates(data, cfg.base, rows, cfg.seed, limit)
        table = Table("closed form", "nats", title="validation", title_justify="left")
        for candidate in candidates:
            table.add_row(candidate.name, f"{candidate.nats:.4f}")
        if trainer.is_global_zero:
            print_table(table)
        best = candidates[0]
        data.transform, flow.base = best.transform, best.base.float()
        gaussian = next((c for c in candidates if c.is_gaussian_as(best)), best)
        if cfg.base == "auto" and gaussian is not best:
            trainer.validate(module, data, weights_only=True, verbose=False)
            trainer.save_checkpoint(Path(cfg.folder) / CLOSED_FORM, weights_only=False)
            trainer.print(f"{CLOSED_FORM} keeps this density; the flow starts at '{gaussian.name}'")
            flow.base = gaussian.base.float()
    else:
        require(cfg.base == "gaussian", f"base={cfg.base}: must be normal or gaussian for images")
        flow.base = fit_gaussian(data, flow, cfg.seed).float()
    trainer.validate(module, data, weights_only=True, verbose=False)
    if isinstance(best := trainer.checkpoint_callback, BestCheckpoint):
        best.save_first(trainer)


def left_of_training(trainer: pl.Trainer, spent: float) -> float:
    """Return the seconds that training left when a callback ended it, after `spent` seconds."""
    if not trainer.should_stop or trainer.global_step == 0:
        return 0.0
    share = min(passed(trainer), 1.0) or 1.0  # 0 of a run without an end
    return spent * (1 / share - 1)


def fit_to_z(
    cfg: DictConfig,
    trainer: pl.Trainer,
    module: RNODE,
    data: DataModule,
    before: float,
    spent: float,
) -> None:
    """Fit bases to z of the best weights and to that of the closed form, and keep the better.

    None is fitted to z of a flow that was far behind. Training took `spent` seconds, after
    `before` seconds of the run.
    """
    left = left_of_training(trainer, spent)
    seconds = END_SHARE * (before + spent + left) + left
    best = trainer.checkpoint_callback
    flow = module.flow
    if best and best.best_model_path:
        load_weights(flow, load_checkpoint(best.best_model_path))
    flows = [flow]
    closed = Path(cfg.folder) / CLOSED_FORM
    if closed.exists():
        flows.append(copy.deepcopy(flow))
        load_weights(flows[1], load_checkpoint(closed))
    if any(isinstance(c, StopBehindClosedForm) and c.stopped for c in trainer.callbacks):
        trainer.print("training stopped: the flow was far behind the density in closed form")
        del flows[0]
    trainer.print(f"mixtures are fitted for {seconds:.0f} s at most")
    rows = validation_rows(trainer, data)
    log_probs = []
    for each in flows:
        fit = None
        if trainer.is_global_zero:
            fit = fit_z(data, each, rows, cfg.seed, seconds / len(flows))
        base, log_prob = trainer.strategy.broadcast(fit)
        each.base = base.float()
        log_probs.append(log_prob)
    weights = data.splits.weights_of("val")[:rows]
    if len(flows) == 2 and not weighted_mean(log_probs[0] - log_probs[1], weights) > 0:
        trainer.print("the density in closed form is better, and is kept")
        del flows[0]
    module.flow = flows[0]
    trainer.validate(module, data, weights_only=True, verbose=False)
    trainer.print(f"base: {name_of(module.flow.base)} of z")
    if isinstance(best, BestCheckpoint):
        best.replace(trainer)
