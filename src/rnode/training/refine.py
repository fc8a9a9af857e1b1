"""Lightning callbacks that change how a flow is solved while it trains: the grid, TF32."""

from collections.abc import Callable
from dataclasses import replace

import torch
from pytorch_lightning import Callback, Trainer

from rnode.errors import Diverged
from rnode.evaluation import solve_and_measure
from rnode.flow import Flow
from rnode.solver import Solver
from rnode.training.module import RNODE

LARGEST_GRID = 32  # times the steps of the first grid


class RefineGrid(Callback):
    """Doubles the steps of the training grid when that changes bits/dim by more than `tolerance`.

    A network can learn to exploit the error of a coarse grid, which its training loss does not
    show: a batch of validation data is measured on both grids. (The paper chose its step by hand,
    section 6.) A flow that needs more than LARGEST_GRID times the first steps has diverged.
    """

    def __init__(self, tolerance: float):
        self.tolerance = tolerance
        self.steps: int | None = None  # of the refined grid

    def on_fit_start(self, trainer: Trainer, module: RNODE) -> None:
        self.most = LARGEST_GRID * module.flow.solver.train.steps
        if self.steps is not None:  # from a checkpoint
            module.flow.solver = with_steps(module.flow.solver, self.steps)

    def on_train_batch_start(self, trainer: Trainer, module: RNODE, *_) -> None:
        step = trainer.global_step
        adaptive = module.flow.solver.train.adaptive  # it has no grid
        if adaptive or doublings(step) == 0:
            return
        data = trainer.datamodule
        index = torch.arange(min(data.batch_size, len(data.splits.val)))
        batch = data.transform.for_evaluation(*data.fetch("val", index), module.seed)
        batch = batch.to(module.device)

        @torch.no_grad()
        def bits() -> float:  # in training mode, with the same probes each time
            measures = solve_and_measure(module.flow, batch, module.seed)[1]
            return float(measures.bits_per_dim.mean())

        for _ in range(doublings(step)):
            change = refine(module.flow, bits, self.tolerance)
            if change is None:
                return
            self.steps = module.flow.solver.train.steps
            line = f"step {trainer.global_step}: a finer grid changes bits/dim by {change:+.2g}"
            if self.steps > self.most:
                raise Diverged(f"{line}, and the grid has {self.most} steps already")
            trainer.print(f"{line}; from here on {self.steps} steps")

    def state_dict(self) -> dict:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]


def doublings(step: int) -> int:
    """How often the grid may be doubled at a step.

    Up to step 30, errors come and go.
    """
    if step == 0:
        return 4
    return int(step >= 30 and step % (10 if step < 100 else 25) == 0)


def refine(flow: Flow, bits: Callable[[], float], tolerance: float) -> float | None:
    """Double the steps if that changes `bits()` by more than `tolerance`; return the change."""
    coarse, before = flow.solver, bits()
    flow.solver = with_steps(coarse, 2 * coarse.train.steps)
    change = bits() - before
    if abs(change) <= tolerance:
        flow.solver = coarse
        return None
    return change


def with_steps(solver: Solver, steps: int) -> Solver:
    return replace(solver, train=replace(solver.train, steps=steps))


class TF32(Callback):
    """Lets convolutions use TF32, on devices that have it, while a flow trains on a fixed grid.

    Its 10 mantissa bits suffice there. An adaptive method would chase the error, so it trains in
    full float32, as every method evaluates.
    """

    def on_train_batch_start(self, trainer: Trainer, module: RNODE, *_) -> None:
        torch.backends.cudnn.allow_tf32 = not module.flow.solver.train.adaptive

    def on_train_batch_end(self, *_) -> None:
        torch.backends.cudnn.allow_tf32 = False

    on_fit_start = on_train_batch_end
