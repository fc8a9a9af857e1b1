"""Runs that stop and resume as if nothing had happened, and the best checkpoint.

These are all places where a run reaches into the state of Lightning that is not its interface:

- `SaveAndStop.on_save_checkpoint` sets the counters of Lightning's loops in a checkpoint. Its own
  also count batches whose gradients were still being accumulated, and an epoch that max_steps cut
  short as a whole one.
- `BestCheckpoint.load_state_dict` sets what ModelCheckpoint knows of the best checkpoint. Lightning
  forgets it if the folder of the run has moved, and trusts the names that a checkpoint holds.
- `rnode.training.module.RNODE.logs` and `rnode.data.datamodule` read
  `trainer.fit_loop.epoch_loop.batch_progress`: no hook says whether a batch is the last of its
  epoch before it ends, or how many batches a resumed epoch has used.
"""

import contextlib
import signal
import threading
from pathlib import Path

import torch
from pytorch_lightning import Callback, Trainer, callbacks
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from rnode.errors import Stopped
from rnode.training.checkpoint import load_checkpoint
from rnode.training.module import RNODE


class SaveAndStop(Callback):
    """Writes last.ckpt every `every_n_steps` training steps, after an epoch and at a signal.

    After SIGINT, SIGTERM or SIGUSR1 it also raises Stopped, before the next training step. A second
    signal of the same kind has its usual effect.
    """

    def __init__(self, folder: str, every_n_steps: int):
        self.path = Path(folder) / "last.ckpt"
        self.every_n_steps = every_n_steps
        self.received = 0  # the signal that this process received
        self.step = self.saved = 0  # the last training step, and the one of the last checkpoint
        self.epoch = self.used = 0  # that step used the batches of this epoch up to `used`

    def on_train_start(self, trainer: Trainer, module: RNODE) -> None:
        self.step = self.saved = trainer.global_step
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            if threading.current_thread() is threading.main_thread():  # others get no signals
                signal.signal(number, self.receive)  # Lightning restores the handlers at the end
        if trainer.world_size > 1:  # on the CPU, so that no process waits for its accelerator
            self.group = torch.distributed.new_group(backend="gloo")

    def receive(self, number: int, frame: object) -> None:
        self.received = number
        with contextlib.suppress(RuntimeError):  # the signal came while another line was printed
            rank_zero_only(print)("stopping after this batch", flush=True)
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)

    def on_train_batch_end(self, trainer: Trainer, module: RNODE, *batch: object) -> None:
        if trainer.global_step > self.step:
            self.step, self.epoch = trainer.global_step, trainer.current_epoch
            self.used = batch[-1] + 1

    def on_train_batch_start(self, trainer: Trainer, *_) -> None:
        if self.step % self.every_n_steps == 0:
            self.save(trainer)  # the validation and the logs of the last step are complete here
        self.stop(trainer)

    def on_train_epoch_end(self, trainer: Trainer, *_) -> None:
        self.save(trainer)

    def on_train_epoch_start(self, trainer: Trainer, *_) -> None:
        self.stop(trainer)

    on_test_start = on_train_start
    on_test_batch_end = on_train_epoch_start

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint unless there is one of this step."""
        if self.step > self.saved and not trainer.fast_dev_run:
            self.saved = self.step
            trainer.save_checkpoint(self.path, weights_only=False)

    def on_save_checkpoint(self, trainer: Trainer, module: RNODE, checkpoint: dict) -> None:
        epoch = trainer.current_epoch
        used = self.used if self.epoch == epoch else 0
        if used < trainer.num_training_batches:
            count_batches(checkpoint["loops"]["fit_loop"], epoch, used, self.step)

    def stop(self, trainer: Trainer) -> None:
        """Raise Stopped, in all processes at the same step, if any of them received a signal."""
        received = torch.tensor(self.received)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX, group=self.group)
        if received:
            self.save(trainer)
            name = signal.Signals(int(received)).name
            raise Stopped(f"by {name} after {trainer.global_step} training steps", int(received))


def count_batches(loops: dict, epoch: int, used: int, step: int) -> None:
    """Set the counters of Lightning's loops to the state after batch `used` of `epoch`."""
    total = loops["epoch_progress"]["total"]
    total |= {"ready": epoch + 1, "started": epoch + 1, "processed": epoch, "completed": epoch}
    loops["epoch_progress"]["current"] = dict(total)
    progress = loops["epoch_loop.batch_progress"]
    before = progress["total"]["ready"] - progress["current"]["ready"]  # in earlier epochs
    for name, count in (("total", before + used), ("current", used)):
        # Lightning writes checkpoints before it counts a batch as completed.
        progress[name] = {"ready": count, "started": count, "processed": count}
        progress[name]["completed"] = count - 1
    progress["is_last_batch"] = False
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1


class BestCheckpoint(callbacks.ModelCheckpoint):
    """Keeps best.ckpt in the folder of this run, whatever folder a resumed checkpoint names."""

    @property
    def path(self) -> str:
        return str(Path(self.dirpath) / "best.ckpt")

    def load_state_dict(self, state_dict: dict) -> None:
        if Path(self.path).exists():
            score = load_checkpoint(self.path)["callbacks"][self.state_key]["current_score"]
            if score is not None:  # else the run ended before its first validation
                self.remember(score)

    def save_first(self, trainer: Trainer) -> None:
        """Write best.ckpt before training, after a validation of the flow as it starts."""
        self.current_score = trainer.callback_metrics["val/bits_per_dim"]
        trainer.save_checkpoint(self.path, weights_only=False)
        self.remember(self.current_score)

    def replace(self, trainer: Trainer) -> None:
        """Write best.ckpt anew after training, with another base.

        Its score stays that of training, with which a run that goes on compares its validations.
        """
        self.current_score = self.best_model_score
        trainer.save_checkpoint(self.path, weights_only=False)

    def remember(self, score: Tensor) -> None:
        self.best_model_path = self.kth_best_model_path = self.path
        self.best_model_score = self.kth_value = score
        self.best_k_models = {self.path: score}
