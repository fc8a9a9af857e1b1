"""CUDA graphs: the kernels of a piece's solve, recorded once and launched together.

A training step is thousands of small kernels. A device runs them faster than its host launches
them one by one.
"""

import torch
from pytorch_lightning import Callback, Trainer
from torch import Tensor, nn

from rnode.choices import ONE_STEP
from rnode.dynamics import Dynamics, State, VectorField
from rnode.flow import Flow
from rnode.solver import Method
from rnode.training.module import RNODE


class CUDAGraphs(Callback):
    """Replays the solves of training steps on a fixed grid as CUDA graphs.

    It leaves out accumulated gradients, which a replay would overwrite, and fields without a
    product εᵀ∇f of their own, which may do what cannot be recorded.
    """

    def on_fit_start(self, trainer: Trainer, module: RNODE) -> None:
        pieces, one_batch = module.flow.pieces, trainer.accumulate_grad_batches == 1
        own = all(hasattr(piece.field, "vjp") for piece in pieces)
        grid = module.flow.solver.train.method in ONE_STEP
        self.records = module.device.type == "cuda" and one_batch and own and grid
        if self.records:
            data = trainer.datamodule
            size = min(data.batch_size, len(data.splits.train) // trainer.world_size)
            record_solves(module.flow, size)
            trainer.print("the solves of training steps are recorded as CUDA graphs")

    def on_fit_end(self, trainer: Trainer, module: RNODE) -> None:
        for piece in module.flow.pieces if self.records else ():
            piece.solve = piece.solve.solve  # evaluation needs the memory


def record_solves(flow: Flow, size: int) -> None:
    """Record how pieces solve training batches of `size` samples, at the next call."""
    for piece in flow.pieces:
        piece.solve = RecordedSolve(piece.solve, size)


class RecordedSolve:
    """`solve` as a CUDA graph for batches of `size` samples, with gradients.

    It records at the first call and when the method changes. All else runs as it is: batches of
    another size and calls without gradients.
    """

    def __init__(self, solve, size: int):
        self.solve, self.size = solve, size
        self.method: Method | None = None  # of the recorded solve

    def __call__(self, dynamics: Dynamics, z: Tensor, method: Method, gradient: str) -> State:
        if len(z) != self.size or not torch.is_grad_enabled():
            return self.solve(dynamics, z, method, gradient)
        if self.method != method:
            self.method, self.replay = method, None  # which frees its memory
            self.record(dynamics, z, gradient)
        state = State(*self.replay(z, dynamics.eps, *dynamics.c))
        dynamics.nfe += self.nfe_forward
        state.z.register_hook(lambda _: self.count_backward(dynamics))
        return state

    def record(self, dynamics: Dynamics, z: Tensor, gradient: str) -> None:
        # Gradients would else be added up on the stream that records.
        parameters = [p for p in dynamics.field.parameters() if p.requires_grad]
        self.sums = [p.expand_as(p).grad_fn.next_functions[0][0] for p in parameters]
        solve = Solve(self.solve, dynamics.field, self.method, gradient)
        given = (z, dynamics.eps, *dynamics.c)
        given = tuple(part.detach().clone().requires_grad_(part.requires_grad) for part in given)
        precision = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        with torch.autocast("cuda", *precision, cache_enabled=False):
            self.replay = torch.cuda.make_graphed_callables(solve, given, allow_unused_input=True)
        self.nfe_forward = solve.nfe_forward
        self.nfe_backward = solve.dynamics.nfe - solve.nfe_forward

    def count_backward(self, dynamics: Dynamics) -> None:
        dynamics.nfe += self.nfe_backward


class Solve(nn.Module):
    """A solve as a module from tensors to tensors, which torch can record."""

    def __init__(self, solve, field: VectorField, method: Method, gradient: str):
        super().__init__()
        self.solve, self.field, self.how = solve, field, (method, gradient)

    def forward(self, z: Tensor, eps: Tensor, *c: Tensor) -> tuple[Tensor, ...]:
        self.dynamics = Dynamics(self.field, eps, *c)
        state = self.solve(self.dynamics, z, *self.how)
        self.nfe_forward = self.dynamics.nfe
        return tuple(state)
