"""The watch for NaN and infinity while a flow trains."""

import math
from collections.abc import Iterable

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from rnode.errors import DivergenceError
from rnode.flow import Flow, Solution

NEVER = torch.iinfo(torch.int64).max


class DivergenceWatch:
    """Records the first quantity that becomes NaN or infinite, and stops all processes together.

    The record is a tensor on the device, so watching does not wait for the device. `raise_if_diverged`
    does.

    Args:
        flow: the flow that trains.
    """

    def __init__(self, flow: Flow):
        self.pieces = flow.pieces
        numbers = range(1, 1 + len(self.pieces))
        self.names = [f"{quantity} of piece {i}" for i in numbers for quantity in "zlEn"]
        self.names += ["the loss", *(f"the gradient of piece {i}" for i in numbers)]
        self.first = torch.tensor(NEVER)  # step · len(names) + position in names
        self.message: str | None = None  # of a solver's error that this process holds

    def watch(self, step: int, solution: Solution | None, loss: Tensor) -> None:
        """Record what became NaN or infinite in a training step; without a solution, the loss did."""
        finite = [loss.detach().isfinite()]
        if solution is not None:
            states = [part for piece in solution.pieces for part in piece.state]
            finite = [part.detach().isfinite().all() for part in states] + finite
        else:
            finite = [torch.ones_like(finite[0])] * 4 * len(self.pieces) + finite
        for piece in self.pieces:
            gradients = [p.grad for p in piece.parameters() if p.grad is not None]
            finite.append(get_total_norm(gradients).isfinite())
        finite = torch.stack(finite)
        now = step * len(self.names) + finite.int().argmin()
        now = now.masked_fill(finite.all(), NEVER)
        self.first = torch.minimum(self.first.to(now.device), now)

    def raise_if_diverged(self, module: LightningModule) -> None:
        """Raise DivergenceError in all processes, with what any of them recorded first."""
        first = self.first.to(module.device, copy=True)
        first = int(module.trainer.strategy.reduce(first, reduce_op="min"))
        if first < NEVER:
            step, quantity = divmod(first, len(self.names))
            message = f"{self.names[quantity]} became NaN or infinite at training step {step}"
            self.raise_together(module, message, held=int(self.first) == first)

    def raise_together(self, module: LightningModule, message: str, held: bool = True) -> None:
        """Raise DivergenceError in all processes: the first error that one holds, or `message`."""
        messages = [self.message if held else None]
        if module.trainer.world_size > 1:
            messages = [None] * module.trainer.world_size
            torch.distributed.all_gather_object(messages, self.message if held else None)
        raise DivergenceError(next(filter(None, messages), message), shared=True)

    def hold(self, module: LightningModule, message: str, can_wait: bool = True) -> None:
        """Raise a solver's error, or hold it if other processes wait for this one's gradient.

        They get NaN instead (`nan_loss`), and all raise the error when they next check.
        """
        if module.trainer.world_size == 1 or not can_wait:
            raise DivergenceError(message) from None
        self.message = self.message or message

    def hold_backward(self, module: LightningModule, message: str, solution: Solution) -> None:
        """Raise or hold an error of the adjoint; parameters without a gradient get NaN."""
        # The backward pass visits the pieces from last to first: the first one that began has failed.
        solved = enumerate(solution.pieces, 1)
        piece = next(i for i, piece in solved if piece.nfe_backward > 0)
        # A parameter that has a gradient was sent already: in the first accumulated batch all are.
        unsent = [parameter for parameter in module.parameters() if parameter.grad is None]
        where = f"in the gradient of piece {piece} at training step {module.global_step}"
        self.hold(module, f"{message} {where}", can_wait=bool(unsent))
        nan_loss(unsent).backward()


def nan_loss(parameters: Iterable[nn.Parameter]) -> Tensor:
    """NaN, with NaN for the gradient of every parameter."""
    return math.nan * sum(parameter.sum() for parameter in parameters)
