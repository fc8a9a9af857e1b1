"""What a run prints while it trains: what it is, how long it will take, how far it is."""

import math
import sys
import time
from datetime import timedelta

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import RichProgressBar
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from rnode.data.datamodule import SPLIT_NAMES
from rnode.training.module import RNODE
from rnode.training.pretraining import timer_of

LIKELIHOOD = {"bits/dim": "train/bits_per_dim", "NFE": "train/nfe_forward"}
MATCHING = {"loss of flow matching": "train/loss"}
ESTIMATE_STEP = 3  # step after which the duration is estimated; the first step is not timed
INTERVAL = 60.0  # seconds from one line to the next where there is no terminal
DAY = 24 * 3600.0  # seconds of a run that is worth advice
ADVICE = "; a smaller model.hidden, model.pieces or dataset.resize shortens it"


class Progress(RichProgressBar):
    """Prints the data, the flow and the device, the time that the run will take, and validations.

    On a terminal it draws a bar with the metrics of the last log step; elsewhere it prints a line
    each minute.
    """

    def __init__(self):
        super().__init__(refresh_rate=4 if sys.stdout.isatty() else 0)
        self.metrics: dict[str, str] = {}
        self.steps = 0  # steps of this process by the current loss
        self.start = 0  # the first step of equation (17)
        self.began = self.printed = 0.0  # times: after the first step, and of the last line

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        counts = MofNCompleteColumn(), TimeRemainingColumn()
        return [TextColumn("{task.description}"), BarColumn(bar_width=15), *counts]

    def get_metrics(self, trainer: Trainer, module: RNODE) -> dict[str, str]:
        if module.logs:  # in every step, the host would wait for the device
            self.metrics = read_metrics(trainer, module)
        return self.metrics

    def on_fit_start(self, trainer: Trainer, module: RNODE) -> None:
        splits, flow = trainer.datamodule.splits, module.flow
        sizes = [f"{len(getattr(splits, s)):,} for {n}" for s, n in SPLIT_NAMES.items()]
        trainer.print(f"samples of shape {list(flow.shape)}: {', '.join(sizes)}")
        weights = sum(parameter.numel() for parameter in flow.parameters())
        trainer.print(
            f"{weights:,} weights in {len(flow.pieces)} piece(s), on {trainer.world_size} × "
            f"{module.device}, precision={trainer.precision}"
        )

    def on_train_batch_end(self, trainer: Trainer, module: RNODE, *batch: object) -> None:
        super().on_train_batch_end(trainer, module, *batch)
        self.steps = self.steps + 1 if self.start == module.start else 1
        self.start = module.start
        if self.steps in (1, ESTIMATE_STEP) and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        now = time.monotonic()
        if self.steps == 1:
            self.began = now
            return
        seconds = (now - self.began) / (self.steps - 1)
        if self.steps == ESTIMATE_STEP:
            self.printed = now
            trainer.print(estimate(trainer, module, seconds))
        elif self.steps > ESTIMATE_STEP and self.is_disabled and now > self.printed + INTERVAL:
            self.printed = now
            metrics = [f"{name} {value}" for name, value in read_metrics(trainer, module).items()]
            left = to_go(seconds_left(trainer, seconds))
            trainer.print(f"{position(trainer)}: {', '.join(metrics)}; {left}")

    # One row at a time: rows that move up and down would leave their traces in the run's log.
    def on_validation_start(self, trainer: Trainer, module: RNODE) -> None:
        super().on_validation_start(trainer, module)
        self.show_training(False)

    def on_validation_end(self, trainer: Trainer, module: RNODE) -> None:
        super().on_validation_end(trainer, module)
        self.show_training(True)
        metrics, best = trainer.callback_metrics, None
        if trainer.checkpoint_callback is not None:
            best = trainer.checkpoint_callback.best_model_score
        bits, error = (float(metrics[f"val/bits_per_dim{end}"]) for end in ("", "_se"))
        better = "" if best is not None and bits >= best else ", the best so far"
        trainer.print(f"{position(trainer)}: validation {bits:.4f} ± {error:.4f} bits/dim{better}")

    def show_training(self, visible: bool) -> None:
        if self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, visible=visible)

    def _get_train_description(self, current_epoch: int) -> str:
        return epoch_of(self.trainer)


def read_metrics(trainer: Trainer, module: RNODE) -> dict[str, str]:
    names, metrics = MATCHING if module.matching else LIKELIHOOD, trainer.callback_metrics
    return {k: f"{float(metrics[name]):.4g}" for k, name in names.items() if name in metrics}


def estimate(trainer: Trainer, module: RNODE, seconds: float) -> str:
    """Say how long a step, an epoch and the run will take, if a batch takes so many seconds."""
    left = seconds_left(trainer, seconds)
    epoch = timedelta(seconds=round(seconds * trainer.num_training_batches))
    line = f"takes {module.nfe} NFE and {seconds:.2g} s, an epoch {epoch}, {to_go(left)}"
    if module.matching:
        return f"a step of flow matching {line}; those of equation (17) will take longer"
    return f"a step {line}{ADVICE if DAY < left < math.inf else ''}"


def seconds_left(trainer: Trainer, seconds: float) -> float:
    """Seconds until the run ends, if a batch takes so many."""
    steps = trainer.estimated_stepping_batches - trainer.global_step
    left = steps * trainer.accumulate_grad_batches * seconds
    timer = timer_of(trainer)
    return max(0.0, left if timer is None else min(left, timer.time_remaining()))


def to_go(seconds: float) -> str:
    return f"{timedelta(seconds=round(seconds))} to go" if seconds < math.inf else "no end is set"


def epoch_of(trainer: Trainer) -> str:
    last = f" of {trainer.max_epochs}" if (trainer.max_epochs or 0) > 0 else ""
    return f"epoch {trainer.current_epoch + 1}{last}"


def position(trainer: Trainer) -> str:
    step = f"step {trainer.global_step}"
    return f"{epoch_of(trainer)}, {step}" if trainer.state.fn == "fit" else step
