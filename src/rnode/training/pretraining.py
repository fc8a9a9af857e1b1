"""A Lightning callback: flow matching first, equation (17) after it."""

from pytorch_lightning import Callback, Trainer

from rnode.matching import require_one_path
from rnode.training.limits import passed
from rnode.training.module import RNODE


class Pretraining(Callback):
    """Trains by flow matching for a `share` of a run, then by equation (17).

    The run is as long as the first of its limits allows: max_epochs, max_steps or max_time. The
    optimizer starts anew for equation (17), whose gradients have another scale, and so does the
    linear rise of the learning rate.
    """

    def __init__(self, share: float):
        self.share = share
        self.start: int | None = None  # the first step of equation (17)
        self.resumed = False

    def on_fit_start(self, trainer: Trainer, module: RNODE) -> None:
        require_one_path(module.flow)
        if trainer.ckpt_path is not None and not self.resumed:
            self.start = 0  # the run of the checkpoint had no flow matching
        module.matching = self.start is None
        module.start = self.start or 0

    def on_train_batch_start(self, trainer: Trainer, module: RNODE, *_) -> None:
        if not module.matching:
            return
        for stopping in trainer.early_stopping_callbacks:
            stopping.wait_count = 0  # patience begins with equation (17)
        if passed(trainer) < self.share:
            return
        module.matching, module.start, self.start = False, trainer.global_step, trainer.global_step
        trainer.optimizers[0].state.clear()
        module.apply_options()
        trainer.print(f"step {self.start}: flow matching ends, equation (17) begins")

    def state_dict(self) -> dict:
        return {"start": self.start}

    def load_state_dict(self, state: dict) -> None:
        self.start, self.resumed = state["start"], True
