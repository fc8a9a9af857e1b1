"""Lightning callbacks that change how a flow is solved while it trains: the grid, TF32."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from pytorch_lightning import Callback, Trainer

from rnode.data.datamodule import DataModule
from rnode.errors import Diverged
from rnode.evaluation import solve_and_measure
from rnode.flow import Flow
from rnode.solver import Solver
from rnode.training.module import RNODE

LARGEST_GRID = 32  # times the steps of the first grid


class RefineGrid(Callback):
    """Doubles the steps of the training grid when that changes bits/dim by more than `tolerance`.

    A network can learn to exploit the error of a coarse grid, and its training loss does not show
    it. So this measures a batch of validation images on both grids. (The paper chose its step by
    hand, section 6.) Twice the steps need twice the memory of backprop; where a device has less,
    `checkpoint` computes the gradient from there on. A flow that needs a grid LARGEST_GRID times as
    fine as the first has diverged: training it further would take hours. Adaptive methods have no
    grid and are left alone.
    """

    def __init__(self, tolerance: float):
        self.tolerance = tolerance
        self.steps: int | None = None  # of the refined grid
        self.gradient: str | None = None  # that of the refined grid, unless it is the run's

    def on_fit_start(self, trainer: Trainer, module: RNODE) -> None:
        self.most = LARGEST_GRID * module.flow.solver.train.steps
        if self.steps is not None:  # from a checkpoint
            module.flow.solver = with_steps(module.flow.solver, self.steps, self.gradient)

    def on_train_batch_start(self, trainer: Trainer, module: RNODE, *_) -> None:
        if module.pretraining.matching or module.flow.solver.train.adaptive:
            return
        bits = partial(self.bits, trainer.datamodule, module)
        for _ in range(doublings(trainer.global_step - module.pretraining.start)):
            change = refine(module.flow, bits, self.tolerance)
            if change is None:
                return
            self.steps = module.flow.solver.train.steps
            finer = f"a finer grid changes bits/dim by {change:+.2g}"
            if self.steps > self.most:
                where = f"at training step {trainer.global_step}"
                raise Diverged(f"{finer} {where}, and the grid has {self.most} steps already")
            line = f"step {trainer.global_step}: {finer}; from here on {self.steps} steps"
            if module.flow.solver.gradient == "backprop" and not fits_twice(module.device):
                self.gradient = "checkpoint"
                module.flow.solver = with_steps(module.flow.solver, self.steps, self.gradient)
                line += " and solver.gradient=checkpoint, as backprop would need too much memory"
            trainer.print(line)

    @torch.no_grad()
    def bits(self, data: DataModule, module: RNODE) -> float:
        """Mean bits/dim in training mode, of the same images, noise and probes each time."""
        index = torch.arange(min(data.batch_size, len(data.splits.val)))
        batch = data.transform.for_evaluation(*data.fetch("val", index), module.seed)
        batch = batch.to(module.device)
        return float(solve_and_measure(module.flow, batch, module.seed)[1].bits_per_dim.mean())

    def state_dict(self) -> dict:
        return {"steps": self.steps, "gradient": self.gradient}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def doublings(step: int) -> int:
    """How often the grid may be doubled at a step of equation (17).

    Flow matching leaves a flow that may need a grid several times as fine at step 0. Up to step 30,
    errors come and go, and a grid that is refined once stays so.
    """
    if step == 0:
        return 4
    return int(step >= 30 and step % (10 if step < 100 else 25) == 0)


def refine(flow: Flow, bits: Callable[[], float], tolerance: float) -> float | None:
    """Double the steps of the training grid if that changes `bits()` by more than `tolerance`.

    Returns:
        The change, or None if the grid stays as it is.
    """
    coarse, before = flow.solver, bits()
    flow.solver = with_steps(coarse, 2 * coarse.train.steps)
    change = bits() - before
    if abs(change) <= tolerance:
        flow.solver = coarse
        return None
    return change


def with_steps(solver: Solver, steps: int, gradient: str | None = None) -> Solver:
    """Return the solver with another number of training steps and, unless None, gradient."""
    train = replace(solver.train, steps=steps)
    return replace(solver, train=train, gradient=gradient or solver.gradient)


def fits_twice(device: torch.device) -> bool:
    """Whether a CUDA device has twice the memory that this process has needed so far."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    available = free + torch.cuda.memory_reserved(device)
    return 2 * torch.cuda.max_memory_reserved(device) <= available


class TF32(Callback):
    """Lets convolutions use TF32, on devices that have it, while a flow trains on a fixed grid.

    Its 10 mantissa bits suffice there. An adaptive method would chase the error, so it trains in
    full float32, as every method evaluates.
    """

    def on_fit_start(self, trainer: Trainer, module: RNODE) -> None:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        if module.device.type == "cuda" and not module.flow.solver.train.adaptive:
            trainer.print("TF32 is used for convolutions of training steps, float32 for all else")

    def on_train_batch_start(self, trainer: Trainer, module: RNODE, *_) -> None:
        torch.backends.cudnn.allow_tf32 = not module.flow.solver.train.adaptive

    def on_train_batch_end(self, *_) -> None:
        torch.backends.cudnn.allow_tf32 = False
