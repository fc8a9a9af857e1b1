"""train.py with a fault at step 12 in the second process alone.

SICK says which: the batch is NaN (nan), or an adaptive solver gives up (forward).
"""

import os

from rnode.app.cli import run
from rnode.errors import Diverged
from rnode.training.module import RNODE

fault = os.environ["SICK"] if os.environ.get("LOCAL_RANK") == "1" else None
healthy = RNODE.training_step


def sick(self, batch, batch_idx):
    if self.global_step == 12 and fault == "nan":
        batch = batch._replace(y=batch.y * float("nan"))
    if self.global_step == 12 and fault == "forward":
        self.flow.pieces[0].register_forward_pre_hook(give_up)
    return healthy(self, batch, batch_idx)


def give_up(*_):
    raise Diverged("underflow in dt 0.0")


RNODE.training_step = sick
if __name__ == "__main__":
    run("train")
