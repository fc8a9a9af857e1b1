"""Explicit Runge–Kutta methods on a fixed grid.

They give the results of torchdiffeq's methods of the same names to rounding. Unlike torchdiffeq,
they never read the device, work under torch.func.vmap and can be traced into one graph.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
TABLEAUS = {  # Butcher's tableaus: nodes and rows of the stages after the first, and weights
    "euler": ((), (), (1,)),
    "midpoint": ((1 / 2,), ((1 / 2,),), (0, 1)),
    "heun2": ((1,), ((1,),), (1 / 2, 1 / 2)),
    "heun3": ((1 / 3, 2 / 3), ((1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4)),
    "rk4": (  # the 3/8 rule
        (1 / 3, 2 / 3, 1),
        ((1 / 3,), (-1 / 3, 1), (1, -1, 1)),
        (1 / 8, 3 / 8, 3 / 8, 1 / 8),
    ),
}


def step(
    f: Callable[[Tensor, Tensors], Tensors],
    t: float,
    h: float,
    y: Tensors,
    method: str,
    slopes: Tensors | None = None,
) -> Tensors:
    """Step from y(t) to y(t + h) by dy/dt = f(t, y); `slopes` are f(t, y) where it is known."""
    nodes, rows, weights = TABLEAUS[method]

    def advance(weights: Sequence[float]) -> Tensors:
        parts = y
        for weight, slopes in zip(weights, stages, strict=True):
            if weight:
                pairs = zip(parts, slopes, strict=True)
                parts = tuple(torch.add(part, slope, alpha=h * weight) for part, slope in pairs)
        return parts

    stages = [f(time(t, y[0]), y) if slopes is None else slopes]
    for node, row in zip(nodes, rows, strict=True):
        stages.append(f(time(t + node * h, y[0]), advance(row)))
    return advance(weights)


def path(f: Callable, y: Tensors, times: Sequence[float], method: str) -> list[Tensors]:
    """Integrate dy/dt = f(t, y) from `times[0]`, with one step to each of the other times."""
    states = [y]
    for start, end in itertools.pairwise(times):
        states.append(step(f, start, end - start, states[-1], method))
    return states


def time(t: float, like: Tensor) -> Tensor:
    """t as a tensor (), made on the device and not copied to it."""
    return like.new_full((), t)
