"""What a run prints while it trains: what it is, how long it takes, and validations."""

import math
import time
from datetime import timedelta

import torch
from pytorch_lightning import Callback, Trainer

from rnode.data.splits import SPLIT_NAMES
from rnode.training.module import RNODE
from rnode.training.schedule import passed
from rnode.transforms import TableTransform


class Progress(Callback):
    """Prints the data, the flow and the device, the time of an epoch, and validations.

    The time is that of two steps after the first batch.
    """

    batches = 0  # of this process
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
        self.batches += 1
        timed = 2 * trainer.accumulate_grad_batches
        if self.batches not in (1, 1 + timed):
            return
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        now, share = time.monotonic(), passed(trainer)
        if self.batches > 1:
            seconds = (now - self.began) / timed
            epoch = timedelta(seconds=round(seconds * trainer.num_training_batches))
            line = f"a step takes {module.nfe} NFE and {seconds:.2g} s, an epoch {epoch}"
            if share > self.share:  # the run has a limit
                left = (now - self.began) * (1 - share) / (share - self.share)
                line += f", {timedelta(seconds=round(left))} to go"
            trainer.print(line)
        self.began, self.share = now, share

    def on_validation_end(self, trainer: Trainer, module: RNODE) -> None:
        metrics = trainer.callback_metrics
        bits, error = (float(metrics[f"val/bits_per_dim{end}"]) for end in ("", "_se"))
        best = getattr(trainer.checkpoint_callback, "best_model_score", None)
        training = trainer.state.fn == "fit"
        better = ", the best so far" if training and (best is None or bits < best) else ""
        last = f" of {trainer.max_epochs}" if trainer.max_epochs > 0 else ""
        place = f"epoch {trainer.current_epoch + 1}{last}, " if training else ""
        measured = f"{bits:.4f} ± {error:.4f} bits/dim"
        if isinstance(trainer.datamodule.transform, TableTransform):
            scale = math.log(2) * module.flow.d
            measured = f"{scale * bits:.4f} ± {scale * error:.4f} nats ({bits:.4f} bits/dim)"
        self.line = f"{place}step {trainer.global_step}: validation {measured}{better}"
        if time.monotonic() - self.printed >= 1:
            self.print_line(trainer)

    def print_line(self, trainer: Trainer, *_) -> None:
        """Print the line of the last validation, unless it has been printed."""
        if self.line:
            trainer.print(self.line)
        self.line = ""
        self.printed = time.monotonic()

    on_fit_end = on_exception = print_line  # the lines of a run of short epochs are a second apart
