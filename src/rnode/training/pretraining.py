"""Flow matching before equation (17), and how much of a run has passed."""

import math

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Timer

from rnode.matching import require_one_path


class Pretraining(Callback):
    """Decides which loss a step has: flow matching for a `share` of a run, then equation (17).

    The run ends at the first of max_epochs, max_steps and max_time. The optimizer starts anew for
    equation (17), whose gradients have another scale, and the learning rate rises anew.
    """

    def __init__(self, share: float = 0.0):
        self.share = share
        self.matching = share > 0  # whether the loss is that of flow matching
        self.start = 0  # the first step of equation (17); 0 while `matching`

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.share > 0:
            require_one_path(module.flow)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_) -> None:
        if self.matching and passed(trainer) >= self.share:
            self.matching = False
            self.start = trainer.global_step
            trainer.optimizers[0].state.clear()
            trainer.print(f"step {self.start}: flow matching ends, equation (17) begins")

    def state_dict(self) -> dict:
        return {"matching": self.matching, "start": self.start}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def steps_passed(trainer: Trainer) -> float:
    """Return how much of trainer.max_steps has passed, from 0 to 1; 0 if it is not set."""
    return trainer.global_step / trainer.max_steps if trainer.max_steps > 0 else 0.0


def decay_passed(trainer: Trainer) -> float:
    """Return how much of the run has passed, from 0 to 1, but for a max_steps beside max_epochs.

    Earlier epochs count as whole, however many batches they had before the run was resumed.
    """
    if trainer.max_epochs == -1:
        share = steps_passed(trainer)
    else:
        window = trainer.accumulate_grad_batches
        steps = math.ceil(trainer.num_training_batches / window)  # of an epoch
        done = trainer.current_epoch * steps + trainer.fit_loop.epoch_loop.batch_idx // window
        share = done / (trainer.max_epochs * steps)
    for timer in (each for each in trainer.callbacks if isinstance(each, Timer)):  # of max_time
        spent = timer.time_elapsed()
        spent_share = spent / (spent + max(timer.time_remaining(), 0.0))
        share = max(share, trainer.strategy.broadcast(spent_share))
    return share


def passed(trainer: Trainer) -> float:
    """Return how much of the run has passed, from 0 to 1."""
    return max(steps_passed(trainer), decay_passed(trainer))
