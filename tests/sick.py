"""train.py in whose second process alone a solver gives up at step 12."""

import os

from rnode.app.cli import run
from rnode.errors import Diverged
from rnode.training.module import RNODE

healthy = RNODE.training_step


def sick(self, batch, batch_idx):
    if self.global_step == 12 and os.environ.get("LOCAL_RANK") == "1":
        self.flow.pieces[0].register_forward_pre_hook(give_up)
    return healthy(self, batch, batch_idx)


def give_up(*_):
    raise Diverged("underflow in dt 0.0")


RNODE.training_step = sick
if __name__ == "__main__":
    run("train")
