"""What a run shows while it trains: what it is, how long it will take, how far it is."""

import math
import platform
import time

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import RichProgressBar
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from rnode.data.datamodule import SPLIT_NAMES
from rnode.flow import Flow
from rnode.training.limits import timer_of
from rnode.training.module import RNODE

SHOWN = {"bits/dim": "train/bits_per_dim", "NFE": "train/nfe_forward"}
MATCHING = {"loss of flow matching": "train/loss"}
SMOOTH = 0.8  # weight of earlier batches in the bar's bits/dim
TIMED = 3  # steps, of which the first is not timed
MINUTE = 60.0  # seconds from one line to the next where there is no terminal
LONG = 24 * 3600.0  # seconds of a run that is worth a warning
SHORTER = "a smaller model.hidden, model.pieces or dataset.resize shortens it"


class Bar(RichProgressBar):
    """A bar on a terminal, with a moving average of bits/dim, and NFE of the last log step."""

    def __init__(self):
        super().__init__(refresh_rate=4)
        self.step, self.mean, self.shown = 0, math.nan, {}

    def get_metrics(self, trainer: Trainer, module: RNODE) -> dict:
        # To read metrics in every step, the host would wait for the device.
        step = trainer.global_step
        if step > self.step and step % (trainer.log_every_n_steps or 1) == 0:
            self.step, now = step, shown(trainer, module)
            if (bits := now.get("bits/dim")) is not None:
                old = bits if math.isnan(self.mean) else self.mean
                self.mean = now["bits/dim"] = SMOOTH * old + (1 - SMOOTH) * bits
            self.shown = {name: f"{value:.4g}" for name, value in now.items()}
        return self.shown

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        counts = MofNCompleteColumn(), TimeRemainingColumn()
        return [TextColumn("{task.description}"), BarColumn(bar_width=15), *counts]

    # One row at a time: rows that move up and down would leave their traces in the run's log.
    def on_validation_start(self, trainer: Trainer, module: RNODE) -> None:
        super().on_validation_start(trainer, module)
        self.show_training(False)

    def on_validation_end(self, trainer: Trainer, module: RNODE) -> None:
        super().on_validation_end(trainer, module)
        self.show_training(True)

    def show_training(self, visible: bool) -> None:
        if self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, visible=visible)

    def _get_train_description(self, current_epoch: int) -> str:
        return epoch(self.trainer)


class Report(Callback):
    """Prints lines: the data, the flow and the device; the time a run will take; validations.

    Where no `bar` shows how far the run is, it prints a line each minute too.
    """

    def __init__(self, bar: bool):
        self.bar, self.steps = bar, 0  # steps of this process, in this part of the run
        self.part = 0  # its first step
        self.start = self.printed = 0.0  # times: after the first step, and of the last line

    def on_fit_start(self, trainer: Trainer, module: RNODE) -> None:
        splits, flow = trainer.datamodule.splits, module.flow
        sizes = [f"{len(getattr(splits, s)):,} for {n}" for s, n in SPLIT_NAMES.items()]
        devices = f"{trainer.world_size} × {module.device}" * (trainer.world_size > 1)
        precision = trainer.precision
        trainer.print(f"samples of shape {list(flow.shape)}: {', '.join(sizes)}")
        trainer.print(
            f"{count_weights(flow):,} weights in {len(flow.pieces)} piece(s), "
            f"on {devices or module.device}, precision={precision}"
        )
        if "bf16" in precision and module.device.type == "cpu" and not has_bfloat16():
            trainer.print("this processor emulates bfloat16, which may be slower than float32")

    def on_train_batch_end(self, trainer: Trainer, module: RNODE, *_) -> None:
        self.steps = self.steps + 1 if self.part == module.start else 1
        self.part = module.start
        if self.steps in (1, TIMED) and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        now = time.monotonic()
        if self.steps == 1:
            self.start = now
        elif self.steps == TIMED:
            self.printed, step = now, (now - self.start) / (TIMED - 1)
            left = seconds_left(trainer, step)
            matching = " of flow matching" * module.matching
            line = f"a step{matching} takes {module.nfe} NFE and {duration(step)}, an epoch"
            line += f" {duration(step * trainer.num_training_batches)}, {to_go(left)}"
            line += "; those of equation (17) will take longer" * module.matching
            trainer.print(line + f"; {SHORTER}" * (LONG < left < math.inf))
        elif not self.bar and now > self.printed + MINUTE and self.steps > TIMED:
            self.printed, step = now, (now - self.start) / (self.steps - 1)
            metrics = shown(trainer, module).items()
            measured = ", ".join(f"{name} {value:.4g}" for name, value in metrics)
            left = to_go(seconds_left(trainer, step))
            trainer.print(f"{where(trainer)}: {measured}; {left}")

    def on_validation_end(self, trainer: Trainer, module: RNODE) -> None:
        metrics, best = trainer.callback_metrics, None
        if trainer.checkpoint_callback is not None:
            best = trainer.checkpoint_callback.best_model_score
        bits, error = (float(metrics[f"val/bits_per_dim{end}"]) for end in ("", "_se"))
        better = "" if best is not None and bits >= best else ", the best so far"
        trainer.print(f"{where(trainer)}: validation {bits:.4f} ± {error:.4f} bits/dim{better}")


def count_weights(flow: Flow) -> int:
    return sum(parameter.numel() for parameter in flow.parameters())


def shown(trainer: Trainer, module: RNODE) -> dict[str, float]:
    names, metrics = MATCHING if module.matching else SHOWN, trainer.callback_metrics
    return {short: float(metrics[name]) for short, name in names.items() if name in metrics}


def seconds_left(trainer: Trainer, step: float) -> float:
    """Seconds until the run ends, if a batch takes `step` seconds."""
    window = trainer.accumulate_grad_batches  # batches of an optimizer step
    batches = trainer.max_steps * window if trainer.max_steps >= 0 else math.inf
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        batches = min(batches, trainer.max_epochs * trainer.num_training_batches)
    timer = timer_of(trainer)
    time_left = math.inf if timer is None else timer.time_remaining()
    return max(0, min(step * (batches - trainer.global_step * window), time_left))


def to_go(seconds: float) -> str:
    return f"{duration(seconds)} to go" if seconds < math.inf else "no end is set"


def epoch(trainer: Trainer) -> str:
    limited = trainer.max_epochs is not None and trainer.max_epochs > 0
    return f"epoch {trainer.current_epoch + 1}" + f" of {trainer.max_epochs}" * limited


def where(trainer: Trainer) -> str:
    during = f"{epoch(trainer)}, " * (trainer.state.fn == "fit")
    return f"{during}step {trainer.global_step}"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them, to about two digits."""
    units = ("days", 86400), ("h", 3600), ("min", 60), ("s", 1)
    unit, length = next((u for u in units if seconds >= 2 * u[1]), units[-1])
    count = seconds / length
    return f"{count:.0f} {unit}" if count >= 10 else f"{count:.2g} {unit}"


def has_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16; true where that is not known."""
    if platform.machine() != "x86_64":
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
