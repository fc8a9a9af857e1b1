"""The limits of a run, and how much of it has passed."""

import math

from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Timer

from rnode.errors import require


class MaxTime(Timer):
    """Ends training after `duration`, [DD:]HH:MM:SS, as max_steps does, without a validation."""

    def __init__(self, duration: str):
        short = duration.count(":") == 2
        super().__init__(f"00:{duration}" if short else duration, interval="epoch", verbose=False)

    def on_train_batch_end(self, trainer: Trainer, *_) -> None:
        if trainer.strategy.broadcast(self.time_remaining() <= 0):
            trainer.fit_loop.epoch_loop.max_steps = trainer.global_step


def max_time(trainer: Trainer) -> MaxTime | None:
    return next((used for used in trainer.callbacks if isinstance(used, MaxTime)), None)


def time_passed(trainer: Trainer) -> float:
    """Return how much of trainer.max_time has passed, from 0 to 1; 0 if it is not set."""
    if (timer := max_time(trainer)) is None:
        return 0.0
    spent = timer.time_elapsed()
    return trainer.strategy.broadcast(spent / (spent + max(timer.time_remaining(), 0.0)))


def passed(trainer: Trainer) -> float:
    """Return how much of the run has passed, from 0 to 1."""
    steps = trainer.estimated_stepping_batches  # of max_epochs and max_steps
    needs = "trainer.max_epochs, trainer.max_steps or trainer.max_time must be set"
    has_end = steps < math.inf or max_time(trainer) is not None
    require(has_end, f"pretrain.share: the run has no end; {needs}")
    return max(trainer.global_step / steps, time_passed(trainer))
