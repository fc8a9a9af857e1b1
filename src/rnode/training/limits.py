"""The limits of a run, and how much of it has passed."""

import math

from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Timer

from rnode.errors import require


def timer_of(trainer: Trainer) -> Timer | None:
    """Return what ends a run after trainer.max_time. Lightning then validates the last weights."""
    return next((used for used in trainer.callbacks if isinstance(used, Timer)), None)


def time_passed(trainer: Trainer) -> float:
    """Return how much of trainer.max_time has passed, from 0 to 1; 0 if it is not set."""
    if (timer := timer_of(trainer)) is None:
        return 0.0
    spent = timer.time_elapsed()
    return trainer.strategy.broadcast(spent / (spent + max(timer.time_remaining(), 0.0)))


def passed(trainer: Trainer) -> float:
    """Return how much of the run has passed, from 0 to 1."""
    steps = trainer.estimated_stepping_batches  # of max_epochs and max_steps
    needs = "trainer.max_epochs, trainer.max_steps or trainer.max_time must be set"
    has_end = steps < math.inf or timer_of(trainer) is not None
    require(has_end, f"pretrain.share: the run has no end; {needs}")
    return max(trainer.global_step / steps, time_passed(trainer))
