"""How much of a run has passed, by which the learning rate falls."""

import math

from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Timer


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
