"""The watch for NaN and infinity while a flow trains."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from rnode.distributed import gather_lists
from rnode.errors import Diverged
from rnode.flow import Flow, Solution

NEVER = torch.iinfo(torch.int64).max


class DivergenceWatch:
    """Records the first quantity that becomes NaN or infinite, and stops all processes together.

    The record is a tensor on the device, so `watch` does not wait for the device. Where a solver
    gives up, the loss is NaN and `message` says why.
    """

    def __init__(self, flow: Flow):
        self.pieces = flow.pieces
        numbers = range(1, 1 + len(self.pieces))
        self.names = [f"{quantity} of piece {i}" for i in numbers for quantity in "zlEn"]
        self.names += ["the loss", *(f"the gradient of piece {i}" for i in numbers)]
        self.first = torch.tensor(NEVER)  # step · len(names) + position in names
        self.message: str | None = None  # of a solver that gave up in this process

    def watch(self, step: int, solution: Solution | None, loss: Tensor) -> Tensor:
        """Record what became NaN or infinite in a step; without a solution, the loss did.

        Returns:
            The norm of the gradient, ().
        """
        states = [part for piece in solution.pieces for part in piece.state] if solution else []
        finite = [part.detach().isfinite().all() for part in (*states, loss)]
        gradients = ([p.grad for p in q.parameters() if p.grad is not None] for q in self.pieces)
        norms = torch.stack([get_total_norm(of_piece) for of_piece in gradients])
        finite = torch.stack([*finite, *norms.isfinite()])
        now = step * len(self.names) + len(self.names) - len(finite) + finite.int().argmin()
        now = now.masked_fill(finite.all(), NEVER)
        self.first = torch.minimum(self.first.to(now.device), now)
        return norms.square().sum().sqrt()

    def gave_up(self, message: str) -> None:
        """Keep the reason why a solver gave up. Later reasons follow from the first."""
        self.message = self.message or message

    def raise_if_diverged(self) -> None:
        """Raise Diverged in all processes, with what any of them recorded first."""
        first = int(self.first)
        step, position = divmod(first, len(self.names))
        message = f"{self.names[position]} became NaN or infinite at training step {step}"
        records = gather_lists([(first, self.message is None, self.message or message)])
        if min(records)[0] < NEVER:
            raise Diverged(min(records)[-1])


def nan_loss(parameters: Iterable[nn.Parameter]) -> Tensor:
    """NaN, with NaN for the gradient of every parameter."""
    return math.nan * sum(parameter.sum() for parameter in parameters)
