"""train.py with a fault at step 12 in the second process alone. SICK says which:

nan         the batch is NaN
forward     an adaptive solver gives up
backward    an adaptive solver gives up in the backward pass, after a part of it was sent
"""

import os

from rnode.app.cli import run
from rnode.errors import Diverged
from rnode.training.module import RNODE

fault = os.environ["SICK"] if os.environ.get("LOCAL_RANK") == "1" else None
healthy = RNODE.training_step


def sick(self, batch, batch_idx):
    if self.global_step != 12 or fault is None:
        return healthy(self, batch, batch_idx)
    if fault == "nan":
        batch = batch._replace(y=batch.y * float("nan"))
    if fault == "forward":
        piece = self.flow.pieces[0]
        handle = piece.register_forward_pre_hook(lambda *_: give_up(handle, Diverged))
    if fault == "backward":
        weight = next(self.flow.pieces[1].parameters())
        handle = weight.register_hook(lambda _: give_up(handle, AssertionError))
    return healthy(self, batch, batch_idx)


def give_up(handle, error):
    handle.remove()
    raise error("underflow in dt 0.0")  # the words of torchdiffeq


RNODE.training_step = sick

if __name__ == "__main__":
    run("train")
