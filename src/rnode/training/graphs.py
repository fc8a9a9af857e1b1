"""CUDA graphs: the kernels of a piece's solve, recorded once and launched together.

A training step launches thousands of small kernels. A device runs them faster than its host can
launch them one by one.
"""

import gc
from collections.abc import Callable

import torch
from pytorch_lightning import Callback, Trainer
from torch import Tensor, nn
from torch.func import functional_call

from rnode.dynamics import Dynamics, State, VectorField
from rnode.errors import require
from rnode.names import ONE_STEP
from rnode.networks import Field
from rnode.solver import Method, integrate
from rnode.training.module import RNODE


class CUDAGraphs(Callback):
    """Replays the solves of training steps as CUDA graphs.

    Unless `required`, it does nothing where it cannot, or where graphs are untried: on several
    devices, and for a user's own field, which a graph may not be able to record.
    """

    def __init__(self, required: bool):
        self.required = required

    def on_fit_start(self, trainer: Trainer, module: RNODE) -> None:
        solver, data = module.flow.solver, trainer.datamodule
        able = module.device.type == "cuda" and trainer.accumulate_grad_batches == 1
        able = able and solver.train.method in ONE_STEP and solver.gradient == "backprop"
        needs = "a CUDA device, a one-step method on a fixed grid, solver.gradient=backprop"
        needs = f"{needs} and trainer.accumulate_grad_batches=1"
        # A replay writes to the same gradients again, so they cannot be accumulated.
        require(able or not self.required, f"cuda_graphs=true: needs {needs}")
        ours = all(isinstance(piece.field, Field) for piece in module.flow.pieces)
        tried = trainer.world_size == 1 and ours
        if not (able and (tried or self.required)):
            return
        size = min(data.batch_size, len(data.splits.train) // trainer.world_size)
        module.integrate = RecordedSolves(size)
        trainer.print("the first step records the solves of training steps as CUDA graphs")

    def on_fit_end(self, trainer: Trainer, module: RNODE) -> None:
        module.integrate = integrate  # the test needs the memory


class RecordedSolves:
    """`integrate`, with a record for each field of a flow."""

    def __init__(self, size: int):
        self.size = size
        self.records: dict[VectorField, RecordedSolve] = {}

    def __call__(self, dynamics: Dynamics, z: Tensor, method: Method, gradient: str) -> State:
        record = self.records.setdefault(dynamics.field, RecordedSolve(self.size))
        return record(dynamics, z, method, gradient)


class RecordedSolve:
    """`solve` on a fixed grid by backprop, as a CUDA graph for batches of `size` samples.

    It records at the first call, and again when the method changes. Batches of another size, calls
    without gradients and other gradients than backprop are solved as usual.
    """

    def __init__(self, size: int):
        self.size = size
        self.recorded: tuple[Method, str] | None = None  # method and gradient of the last record
        self.replay: Callable[..., tuple[Tensor, ...]] | None = None

    def __call__(self, dynamics: Dynamics, z: Tensor, method: Method, gradient: str) -> State:
        if len(z) != self.size or not torch.is_grad_enabled():
            return integrate(dynamics, z, method, gradient)
        field = dynamics.field
        inputs = (z, dynamics.eps, dynamics.c, *field.parameters())
        if self.recorded != (method, gradient):
            if self.replay is not None:
                self.replay = None
                gc.collect()  # the earlier record refers to itself, and holds memory of the device
            self.recorded = method, gradient
            if gradient == "backprop":
                self.replay = self.record(field, inputs, method)
        if self.replay is None:
            return integrate(dynamics, z, method, gradient)
        dynamics.nfe += self.nfe
        return State(*self.replay(*inputs))

    def record(self, field: VectorField, inputs: tuple[Tensor, ...], method: Method) -> Callable:
        piece = Solve(field, method)
        names = [f"field.{name}" for name, _ in field.named_parameters()]
        given = len(inputs) - len(names)

        def function(*inputs: Tensor) -> tuple[Tensor, ...]:
            weights = dict(zip(names, inputs[given:], strict=True))
            return functional_call(piece, weights, inputs[:given])

        # Other leaves of the same memory: the weights' own belong to the stream that trains.
        weights = [p.detach().requires_grad_(p.requires_grad) for p in inputs[given:]]
        samples = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs[:given]]
        kind = inputs[0].device.type
        precision = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        with torch.autocast(kind, *precision, cache_enabled=False):
            samples = (*samples, *weights)
            replay = torch.cuda.make_graphed_callables(function, samples, allow_unused_input=True)
        self.nfe = piece.nfe
        return replay


class Solve(nn.Module):
    """A solve as a module from tensors to tensors."""

    def __init__(self, field: VectorField, method: Method):
        super().__init__()
        self.field, self.method = field, method

    def forward(self, z: Tensor, eps: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        dynamics = Dynamics(self.field, c, eps)
        state = integrate(dynamics, z, self.method, "backprop")
        self.nfe = dynamics.nfe
        return tuple(state)
