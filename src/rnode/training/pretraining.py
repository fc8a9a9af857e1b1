"""Flow matching first, equation (17) after it; and how much of a run has passed."""

import math

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Timer

from rnode.errors import require
from rnode.matching import require_one_path


class Pretraining(Callback):
    """Decides which loss a step has: flow matching for a `share` of a run, then equation (17).

    The run is as long as the first of its limits allows: max_epochs, max_steps or max_time. The
    optimizer starts anew for equation (17), whose gradients have another scale, and so does the
    linear rise of the learning rate. With a share of 0 every step has equation (17).
    """

    def __init__(self, share: float = 0.0):
        self.share = share
        self.start: int | None = None if share > 0 else 0  # the first step of equation (17)
        self.resumed = False

    @property
    def matching(self) -> bool:
        """Whether the loss is that of flow matching."""
        return self.start is None

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.share == 0:
            return
        require_one_path(module.flow)
        if trainer.ckpt_path is not None and not self.resumed:
            self.start = 0  # the run of the checkpoint had no flow matching

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_) -> None:
        if self.matching and passed(trainer) >= self.share:
            self.start = trainer.global_step
            module.restart_optimizer()
            trainer.print(f"step {self.start}: flow matching ends, equation (17) begins")

    def state_dict(self) -> dict:
        return {"start": self.start}

    def load_state_dict(self, state: dict) -> None:
        self.start, self.resumed = state["start"], True


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
    require(
        steps < math.inf or timer_of(trainer) is not None,
        "pretrain=flow_matching: the run has no end; trainer.max_epochs, trainer.max_steps or "
        "trainer.max_time must be set",
    )
    return max(trainer.global_step / steps, time_passed(trainer))
