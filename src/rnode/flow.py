"""One piece, and the flow made of pieces: from data to the normal variable and back.

A flow is a sequence of scales (Dinh et al., 2017): pieces, a squeeze that turns every 2×2 block of pixels into channels,
pieces, and half of the channels factored out as finished normal variables. The last scale is pieces alone; a flow for
vectors has no other.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnode.dynamics import Dynamics, Probes, State
from rnode.errors import SHAPE, DivergenceError, InputError, is_int, is_shape, require
from rnode.networks import Field, TimeConv2d, TimeLinear
from rnode.objective import log_normal
from rnode.solver import Method, Solver, solve, solve_back


class Piece(nn.Module):
    """The flow of one field over one stretch of time [0, T]: θ(t) is piecewise constant (section 6)."""

    def __init__(self, field: nn.Module):
        super().__init__()
        self.field = field
        self.last_solve: Dynamics | None = None
        self.nfe_forward = self.nfe_inverse = 0
        self.finite = torch.ones(4, dtype=torch.bool)  # whether z, l, E and n of the last solve were; on z's device

    def forward(self, z: Tensor, eps: Tensor, method: Method, gradient: str) -> State:
        """z (B, *shape), eps (K, B, *shape) → State at time T, its integrals over this piece."""
        dynamics = self.last_solve = Dynamics(self.field, eps)
        state = solve(dynamics, z, method, gradient, self.field.parameters())
        self.nfe_forward = dynamics.nfe
        self.finite = torch.stack([part.detach().isfinite().all() for part in state])
        return state

    def inverse(self, z: Tensor, method: Method, intervals: int = 1) -> Tensor:
        """z (B, *shape) at time T → z at `intervals` + 1 equal times from T to 0, (times, B, *shape)."""
        dynamics = Dynamics(self.field)
        path = solve_back(dynamics.f, z, method, intervals)
        self.nfe_inverse = dynamics.nfe
        return path

    @property
    def nfe_backward(self) -> int:
        """Evaluations of f in the backward pass of the last solve: by the adjoint, or by a checkpoint's second solve."""
        return self.last_solve.nfe - self.nfe_forward if self.last_solve else 0


class Flow(nn.Module):
    """x (B, *shape) ↔ z (B, d), with l, E, n summed over the pieces.

    scales: for each scale but the last, its pieces before and after the squeeze. last: the pieces of the last scale, which
    work on z of `last_shape`.
    The solver is `solver.train` in training mode and `solver.test` in evaluation mode.
    """

    def __init__(
        self,
        shape: Sequence[int],
        scales: list[tuple[list[Piece], list[Piece]]],
        last: list[Piece],
        last_shape: Sequence[int],
        solver: Solver,
        probes: Probes,
    ):
        super().__init__()
        self.shape, self.last_shape = torch.Size(shape), torch.Size(last_shape)
        self.scales = nn.ModuleList(nn.ModuleList(map(nn.ModuleList, pair)) for pair in scales)
        self.last = nn.ModuleList(last)
        self.solver, self.probes = solver, probes

    @property
    def d(self) -> int:
        """Dimension of x, by which every term of the objective is divided."""
        return self.shape.numel()

    @property
    def pieces(self) -> list[Piece]:
        return [module for module in self.modules() if isinstance(module, Piece)]

    @property
    def method(self) -> Method:
        return self.solver.train if self.training else self.solver.test

    @property
    def nfe(self) -> tuple[int, int]:
        """Evaluations of f in the last forward pass and in the backward pass that followed, summed over the pieces."""
        return sum(p.nfe_forward for p in self.pieces), sum(p.nfe_backward for p in self.pieces)

    @property
    def nfe_inverse(self) -> int:
        """Evaluations of f in the last inverse, summed over the pieces."""
        return sum(p.nfe_inverse for p in self.pieces)

    def to_state(self, x: Tensor) -> Tensor:
        """x in a type at least as precise as the solver's."""
        return x.to(torch.promote_types(x.dtype, getattr(torch, self.solver.dtype)))

    def forward(self, x: Tensor, generators: Sequence[torch.Generator] | None = None) -> State:
        """x (B, *shape) → State(z (B, d), l, E, n (B,)). `generators`, one a sample, draw the probes if given."""
        require(x.shape[1:] == self.shape, "shape of x", tuple(x.shape[1:]), f"{tuple(self.shape)}")
        z = self.to_state(x)
        _, l, E, n = State.initial(z)

        def run(pieces: nn.ModuleList, z: Tensor) -> Tensor:
            nonlocal l, E, n
            for piece in pieces:
                eps = self.probes.draw(z, generators)
                try:
                    z, dl, dE, dn = piece(z, eps, self.method, self.solver.gradient)
                except DivergenceError as error:
                    raise DivergenceError(f"{error} in piece {1 + self.pieces.index(piece)}") from None
                l, E, n = l + dl, E + dE, n + dn
            return z

        finished = []
        for before, after in self.scales:
            z = F.pixel_unshuffle(run(before, z), 2)
            z, half = run(after, z).chunk(2, dim=1)
            finished.append(half.flatten(1))
        finished.append(run(self.last, z.reshape(-1, *self.last_shape)).flatten(1))
        return State(torch.cat(finished, dim=1), l, E, n)

    def inverse(self, z: Tensor) -> Tensor:
        """z (B, d) → x (B, *shape), with forward(inverse(z)).z = z up to the solver's error."""

        def run(pieces: nn.ModuleList, z: Tensor) -> Tensor:
            for piece in reversed(pieces):
                z = piece.inverse(z, self.method)[-1]
            return z

        return self.merge(self.to_state(z), run)

    def trajectory(self, z: Tensor, intervals: int = 1) -> Tensor:
        """z (B, d) → what becomes of it on the way to x, each in the arrangement of x: (pieces · intervals + 1, B, *shape).

        A frame shows the pieces still to come as the identity. The first is z, the last x = inverse(z).
        """
        paths, reached = {}, {}

        def solve(pieces: nn.ModuleList, z: Tensor) -> Tensor:
            for piece in reversed(pieces):
                paths[piece] = piece.inverse(z, self.method, intervals)
                z = paths[piece][-1]
            return z

        def show(pieces: nn.ModuleList, z: Tensor) -> Tensor:
            return next((reached[piece] for piece in pieces if piece in reached), z)

        z = self.to_state(z)
        self.merge(z, solve)
        frames = [self.merge(z, show)]
        for piece, path in paths.items():
            for z_t in path[1:]:
                reached[piece] = z_t
                frames.append(self.merge(z, show))
        return torch.stack(frames)

    def as_x(self, z: Tensor) -> Tensor:
        """z (B, d) in the arrangement of x, (B, *shape): the inverse of a flow whose pieces are the identity."""
        return self.merge(z, lambda pieces, z: z)

    def merge(self, z: Tensor, run: Callable[[nn.ModuleList, Tensor], Tensor]) -> Tensor:
        """Undo the squeezes and the factoring out: z (B, d) → (B, *shape), `run` undoing each stack of pieces."""
        require(z.shape[1:] == (self.d,), "shape of z", tuple(z.shape[1:]), f"({self.d},)")
        *halves, z = z.split([*(math.prod(s) for s in self.factored_shapes), self.last_shape.numel()], dim=1)
        z = run(self.last, z.unflatten(1, self.last_shape))
        for (before, after), half, shape in zip(
            reversed(self.scales), reversed(halves), reversed(self.factored_shapes), strict=True
        ):
            z = run(after, torch.cat([z, half.unflatten(1, shape)], dim=1))
            z = run(before, F.pixel_shuffle(z, 2))
        return z.reshape(-1, *self.shape)

    @property
    def factored_shapes(self) -> list[tuple[int, int, int]]:
        """Shapes of the halves that are factored out, (2^(k+1) C, H/2^(k+1), W/2^(k+1)) at scale k."""
        factors = [2 ** (k + 1) for k in range(len(self.scales))]
        return [(self.shape[0] * f, self.shape[1] // f, self.shape[2] // f) for f in factors]

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, equation (4): x (*batch, *shape) → (*batch); div f as the flow's probes estimate it."""
        batch = x.shape[: x.dim() - len(self.shape)]
        state = self(x.reshape(-1, *x.shape[len(batch) :]))
        return (log_normal(state.z) + state.l).reshape(batch)

    @torch.no_grad()
    def sample(self, batch: int | Sequence[int] = (), temperature: float = 1.0) -> Tensor:
        """Draw x (*batch, *shape): z from a normal of standard deviation `temperature`, carried back to time 0."""
        batch = (batch,) if isinstance(batch, int) else tuple(batch)
        parameter = next(self.parameters())
        z = temperature * torch.randn(math.prod(batch), self.d, device=parameter.device, dtype=parameter.dtype)
        return self.inverse(z).reshape(*batch, *self.shape)


def multiscale(
    shape: Sequence[int], solver: Solver, probes: Probes, hidden: int = 64, layers: int = 4, pieces: int = 2
) -> Flow:
    """The paper's flow for images of shape (channels, height, width).

    Scales go on while height and width are at least 4: 28×28 gives 10 pieces, 32×32 gives 14.
    """
    check_sizes(shape, hidden, layers, pieces)
    image = len(shape) == 3 and min(shape[1:]) >= 4
    require(image, "dataset.shape", list(shape), "[channels, height, width], 4 or more high and wide, for model=multiscale")
    channels, height, width = shape

    def stack(channels: int) -> list[Piece]:
        sizes = [channels, *[hidden] * (layers - 1), channels]
        return [Piece(Field(TimeConv2d, sizes)) for _ in range(pieces)]

    scales = []
    while min(height, width) >= 8:
        if height % 2 or width % 2:
            fits = [side - side % 2 ** (len(scales) + 1) for side in shape[1:]]
            raise InputError(
                f"dataset.shape={list(shape)}: model=multiscale halves images while both sides stay at least 4, and cannot "
                f"halve {height}×{width}; crop or pad them, to {fits[0]}×{fits[1]} for example"
            )
        scales.append((stack(channels), stack(4 * channels)))
        channels, height, width = 2 * channels, height // 2, width // 2
    return Flow(shape, scales, stack(channels), (channels, height, width), solver, probes)


def mlp(shape: Sequence[int], solver: Solver, probes: Probes, hidden: int = 64, layers: int = 4, pieces: int = 1) -> Flow:
    """A stack of dense pieces for vectors; images are flattened."""
    check_sizes(shape, hidden, layers, pieces)
    d = math.prod(shape)
    sizes = [d, *[hidden] * (layers - 1), d]
    return Flow(shape, [], [Piece(Field(TimeLinear, sizes)) for _ in range(pieces)], (d,), solver, probes)


def check_sizes(shape: Sequence[int], hidden: int, layers: int, pieces: int) -> None:
    require(is_shape(shape), "dataset.shape", list(shape) if isinstance(shape, tuple) else shape, SHAPE)
    for name, value, least, most in (("hidden", hidden, 1, 2**16), ("layers", layers, 2, 100), ("pieces", pieces, 1, 100)):
        whole = is_int(value, at_least=least) and value <= most
        require(whole, f"model.{name}", value, f"a whole number from {least} to {most}")
