"""train.py with faults in the second process alone.

SICK lists their kinds, one for each time that the run reaches step 12:

    nan         the batch is NaN
    forward     an adaptive solver gives up
    backward    an adaptive solver gives up in the backward pass, after a part of it was sent
"""

import os
from dataclasses import replace

from rnode import Method
from rnode.app.cli import run
from rnode.training.module import RNODE

kinds = os.environ["SICK"].split() if os.environ.get("LOCAL_RANK") == "1" else []
healthy = RNODE.training_step


def sick(self, batch, batch_idx):
    if self.global_step != 12 or not kinds:
        return healthy(self, batch, batch_idx)
    kind = kinds.pop(0)
    if kind == "nan":
        return healthy(self, batch._replace(y=batch.y * float("nan")), batch_idx)
    if kind == "forward":
        solver = self.flow.solver
        self.flow.solver = replace(solver, train=Method("dopri5", max_steps=1))
        try:
            return healthy(self, batch, batch_idx)
        finally:
            self.flow.solver = solver
    weight = next(self.flow.pieces[1].parameters())
    handle = weight.register_hook(lambda gradient: give_up(handle))
    return healthy(self, batch, batch_idx)


def give_up(handle):
    handle.remove()
    raise AssertionError("underflow in dt 0.0")  # the words of torchdiffeq


RNODE.training_step = sick

if __name__ == "__main__":
    run("train")
