"""What a run prints while it trains: what it is, how long an epoch takes, and validations."""

import math
import time
from datetime import timedelta

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import Timer

from rnode.data.splits import SPLIT_NAMES
from rnode.training.module import RNODE
from rnode.training.pretraining import epochs_passed, steps_passed
from rnode.transforms import TableTransform

ESTIMATE_STEP = 3  # step after which the duration is estimated; the first step is not timed


class Progress(Callback):
    """Prints the data, the flow and the device, the time of an epoch, and validations."""

    steps = 0  # steps of this process by the current loss
    start = 0  # the first step of equation (17)
    began = 0.0  # time after the first step
    line = ""  # of the last validation, if it is not printed
    printed = -math.inf  # time of the last line

    def on_fit_start(self, trainer: Trainer, module: RNODE) -> None:
        splits, flow = trainer.datamodule.splits, module.flow
        sizes = [f"{len(getattr(splits, s)):,} for {n}" for s, n in SPLIT_NAMES.items()]
        trainer.print(f"samples of shape {list(flow.shape)}: {', '.join(sizes)}")
        weights = sum(parameter.numel() for parameter in flow.parameters())
        trainer.print(
            f"{weights:,} weights in {len(flow.pieces)} piece(s), on {trainer.world_size} × "
            f"{module.device}, precision={trainer.precision}"
        )

    def on_train_batch_end(self, trainer: Trainer, module: RNODE, *_) -> None:
        self.steps = self.steps + 1 if self.start == module.pretraining.start else 1
        self.start = module.pretraining.start
        if self.steps in (1, ESTIMATE_STEP) and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        if self.steps == 1:
            self.began = time.monotonic()
        if self.steps == ESTIMATE_STEP:
            seconds = (time.monotonic() - self.began) / (ESTIMATE_STEP - 1)
            loss = "flow matching" if module.pretraining.matching else "equation (17)"
            epoch = timedelta(seconds=round(seconds * trainer.num_training_batches))
            cost = f"{module.nfe} NFE and {seconds:.2g} s, an epoch {epoch}"
            share = max(steps_passed(trainer), epochs_passed(trainer))
            steps = (1 - share) * trainer.estimated_stepping_batches
            ends = [seconds * steps * trainer.accumulate_grad_batches]
            ends += [c.time_remaining() for c in trainer.callbacks if isinstance(c, Timer)]
            left = f", {timedelta(seconds=round(min(ends)))} to go" if min(ends) < math.inf else ""
            trainer.print(f"a step of {loss} takes {cost}{left}")

    def on_validation_end(self, trainer: Trainer, module: RNODE) -> None:
        metrics, best = trainer.callback_metrics, None
        if trainer.checkpoint_callback is not None:
            best = trainer.checkpoint_callback.best_model_score
        bits, error = (float(metrics[f"val/bits_per_dim{end}"]) for end in ("", "_se"))
        better = "" if best is not None and bits >= best else ", the best so far"
        last = f" of {trainer.max_epochs}" if trainer.max_epochs > 0 else ""
        place = f"epoch {trainer.current_epoch + 1}{last}, step {trainer.global_step}"
        measured = f"{bits:.4f} ± {error:.4f} bits/dim"
        if isinstance(trainer.datamodule.transform, TableTransform):
            scale = math.log(2) * module.flow.d
            measured = f"{scale * bits:.4f} ± {scale * error:.4f} nats ({bits:.4f} bits/dim)"
        self.line = f"{place}: validation {measured}{better if trainer.state.fn == 'fit' else ''}"
        if time.monotonic() - self.printed >= 1:
            self.print_line(trainer)

    def print_line(self, trainer: Trainer, *_) -> None:
        """Print the line of the last validation, unless it has been printed."""
        if self.line:
            trainer.print(self.line)
        self.line, self.printed = "", time.monotonic()

    on_fit_end = on_exception = print_line  # the lines of a run of short epochs are a second apart
