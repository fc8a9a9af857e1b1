"""CUDA graphs: the thousands of kernels of a piece's solve, recorded once, launched together."""

import gc
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call

from rnode.dynamics import Dynamics, State, VectorField
from rnode.flow import Piece
from rnode.solver import Method, integrate

Replay = Callable[..., tuple[Tensor, ...]]


class RecordedSolves:
    """`rnode.solver.integrate` as CUDA graphs, one for each field, for batches of `size` samples.

    A graph is recorded at the first call for a field, and again when the method changes. Batches of
    another size and calls without gradients are solved without one.
    """

    def __init__(self, size: int):
        self.size = size
        self.method: Method | None = None  # of the graphs
        self.graphs: dict[VectorField, tuple[Replay, int]] = {}  # with their evaluations of f

    def __call__(self, dynamics: Dynamics, z: Tensor, method: Method, gradient: str) -> State:
        if len(z) != self.size or not torch.is_grad_enabled():
            return integrate(dynamics, z, method, gradient)
        if method != self.method:
            self.method = method
            self.graphs = {}
            gc.collect()  # a graph refers to itself, and holds memory of the device
        inputs = (z, dynamics.c, dynamics.eps, *dynamics.field.parameters())
        if dynamics.field not in self.graphs:
            self.graphs[dynamics.field] = record(dynamics.field, inputs, method)
        replay, nfe = self.graphs[dynamics.field]
        dynamics.nfe += nfe
        return State(*replay(*inputs))


def record(field: VectorField, inputs: tuple[Tensor, ...], method: Method) -> tuple[Replay, int]:
    """Record a solve of z, c and eps, which are the first `inputs`; the others are the weights.

    Returns:
        A function from inputs to z, l, E and n, and the evaluations of f.
    """
    piece = Piece(field)
    nfe = 0
    names = [f"field.{name}" for name, _ in field.named_parameters()]

    def function(z: Tensor, c: Tensor, eps: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        nonlocal nfe
        by_name = dict(zip(names, weights, strict=True))
        solution = functional_call(piece, by_name, (z, c, eps, method, "backprop"))
        nfe = solution.nfe_forward
        return tuple(solution.state)

    samples = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs[:3]]
    # Other leaves of the same memory: the weights' own belong to the stream that trains.
    weights = [p.detach().requires_grad_(p.requires_grad) for p in inputs[3:]]
    kind = inputs[0].device.type
    precision = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    with torch.autocast(kind, *precision, cache_enabled=False):
        replay = torch.cuda.make_graphed_callables(
            function, (*samples, *weights), allow_unused_input=True
        )
    return replay, nfe
