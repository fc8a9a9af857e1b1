"""train.py with faults in the second process alone: SICK lists their kinds, one for each time that step 12 is come to.

nan: the batch is NaN. forward: an adaptive solver gives up. backward: so it does in the gradient, when a part of it is sent.
"""

import os
from dataclasses import replace

import cli
import train
from rnode import Method
from rnode.module import RNODE

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
    handle = next(self.flow.pieces[1].parameters()).register_hook(lambda gradient: give_up(handle))
    return healthy(self, batch, batch_idx)


def give_up(handle):
    handle.remove()
    raise AssertionError("underflow in dt 0.0")  # torchdiffeq's words


RNODE.training_step = sick

if __name__ == "__main__":
    cli.run(train.main, "train.py", "")
