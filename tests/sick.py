"""train.py with faults in the second process alone.

SICK is the kind, at step 12:

    nan         the batch is NaN
    forward     an adaptive solver gives up
    backward    an adaptive solver gives up in the backward pass, after a part of it was sent
"""

import os
from dataclasses import replace

from rnode import Method, solver
from rnode.app.cli import run
from rnode.training.module import RNODE

kind = os.environ["SICK"] if os.environ.get("LOCAL_RANK") == "1" else None
healthy = RNODE.training_step


def sick(self, batch, batch_idx):
    if self.global_step != 12 or kind is None:
        return healthy(self, batch, batch_idx)
    if kind == "nan":
        return healthy(self, batch._replace(y=batch.y * float("nan")), batch_idx)
    if kind == "forward":
        solver.MAX_STEPS = 1
        self.flow.solver = replace(self.flow.solver, train=Method("dopri5"))
        return healthy(self, batch, batch_idx)
    weight = next(self.flow.pieces[1].parameters())
    handle = weight.register_hook(lambda gradient: give_up(handle))
    return healthy(self, batch, batch_idx)


def give_up(handle):
    handle.remove()
    raise AssertionError("underflow in dt 0.0")  # the words of torchdiffeq


RNODE.training_step = sick

if __name__ == "__main__":
    run("train")
