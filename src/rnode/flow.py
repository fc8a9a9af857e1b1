"""The flow: a flat list of invertible layers from data to the normal variable.

The layers are pieces, which solve an ODE, and the multiscale permutations of Dinh et al. (2017).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from rnode.bases import Mixture, Normal
from rnode.dynamics import Dynamics, Probes, Reversed, State, VectorField, has_divergence
from rnode.errors import Diverged, require
from rnode.solver import Method, Solver, integrate, integrate_back
from rnode.variational import VariationalDequantization


@dataclass
class PieceSolution:
    """The result of one solve of one piece: z, l, E and n at time T, and evaluations of f."""

    start: Tensor  # z at time 0, (B, *shape)
    state: State
    dynamics: Dynamics  # goes on counting in the backward pass
    nfe_forward: int

    @property
    def nfe_backward(self) -> int:
        """Evaluations of f in the backward pass so far, by the adjoint or by `checkpoint`."""
        return self.dynamics.nfe - self.nfe_forward

    @property
    def displacement(self) -> Tensor:
        """‖z(T) − z(0)‖², (B,)."""
        return (self.state.z - self.start).square().flatten(1).sum(1)


class Solution(NamedTuple):
    """The result of a whole flow, and the solutions of its pieces, over which NFE are summed."""

    state: State  # z (B, d) and l, E, n (B,); n is NaN where no probe measures it
    log_q: Tensor  # of z under the base, (B,)
    pieces: list[PieceSolution]

    @property
    def nfe_forward(self) -> int:
        return sum(piece.nfe_forward for piece in self.pieces)

    @property
    def nfe_backward(self) -> int:
        return sum(piece.nfe_backward for piece in self.pieces)


Integrate = Callable[[Dynamics, Tensor, Method, str], State]  # rnode.solver.integrate, or a record


class Piece(nn.Module):
    """The flow of one field, a torch module, over [0, T] (section 6)."""

    def __init__(self, field: VectorField):
        super().__init__()
        self.field = field

    def forward(
        self,
        z: Tensor,
        c: Tensor,
        eps: Tensor,
        method: Method,
        gradient: str,
        integrate: Integrate = integrate,
    ) -> PieceSolution:
        """z (B, *shape) at time 0, c (B, k), eps (K, B, *shape) → the solution at time T."""
        dynamics = Dynamics(self.field, c, eps)
        state = integrate(dynamics, z, method, gradient)
        return PieceSolution(z, state, dynamics, dynamics.nfe)

    def inverse(
        self, z: Tensor, c: Tensor, method: Method, intervals: int = 1
    ) -> tuple[Tensor, int]:
        """z (B, *shape) at T, c (B, k) → z at `intervals` + 1 times from T to 0, and the NFE."""
        dynamics = Dynamics(self.field, c)
        return integrate_back(dynamics, z, method, intervals), dynamics.nfe


class Flatten(nn.Module):
    """z (B, *shape) → (B, d)."""

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.shape = torch.Size(shape)

    def forward(self, z: Tensor, factored: list[Tensor]) -> Tensor:
        return z.flatten(1)

    def inverse(self, z: Tensor, factored: list[Tensor]) -> Tensor:
        return z.unflatten(1, self.shape)


class Squeeze(nn.Module):
    """z (B, C, H, W) → (B, 4C, H/2, W/2)."""

    def forward(self, z: Tensor, factored: list[Tensor]) -> Tensor:
        if len(z) == 0:  # F.pixel_unshuffle would give another shape
            return z.reshape(0, 4 * z.shape[1], z.shape[2] // 2, z.shape[3] // 2)
        return F.pixel_unshuffle(z, 2)

    def inverse(self, z: Tensor, factored: list[Tensor]) -> Tensor:
        return F.pixel_shuffle(z, 2)


class FactorOut(nn.Module):
    """z (B, C, H, W) → its first C/2 channels; the others are appended to `factored`."""

    def forward(self, z: Tensor, factored: list[Tensor]) -> Tensor:
        z, half = z.chunk(2, dim=1)
        factored.append(half)
        return z

    def inverse(self, z: Tensor, factored: list[Tensor]) -> Tensor:
        return torch.cat([z, factored.pop()], dim=1)


Layer = VariationalDequantization | Piece | Flatten | Squeeze | FactorOut
SHAPE_PRESERVING = (VariationalDequantization, Piece)


class Flow(nn.Module):
    """An invertible map x (B, *shape) ↔ z (B, d) with a density, equations (2) and (4).

    A flow of k > 0 conditions models p(x | c): its methods then need c, one for all samples (k,) or
    one for each (B, k).

    Args:
        shape: shape of one sample x.
        layers: the layers from x to z.
        solver: its method `train` solves in training mode, `test` in evaluation mode.
        probes: the probes of every piece's estimates. In evaluation mode, a field that computes its
            divergence has none.
        k: number of the numbers c on which the density is conditioned.
        base: distribution q of z; None: the standard normal.
    """

    layers: Sequence[Layer]

    def __init__(
        self,
        shape: Sequence[int],
        layers: list[Layer],
        solver: Solver,
        probes: Probes,
        k: int = 0,
        base: Normal | Mixture | None = None,
    ):
        super().__init__()
        self.shape = torch.Size(shape)
        self.k = k
        self.base = base or Normal(self.d)
        self.layers = nn.ModuleList(layers)  # ty: ignore[invalid-assignment]
        self.solver = solver
        self.probes = probes
        self.test_probes = probes  # in evaluation mode
        parts = self._arrange(torch.empty(1, *shape, device="meta"))
        self.z_shapes = [part.shape[1:] for part in parts]  # of the parts of z, in order

    @property
    def d(self) -> int:
        """Dimension of x, by which every term of the objective is divided."""
        return self.shape.numel()

    @property
    def exact(self) -> bool:
        """Whether no probe estimates the divergence in evaluation mode."""
        closed = all(has_divergence(piece.field) for piece in self.pieces)
        return closed or self.test_probes.divergence == "exact"

    @property
    def pieces(self) -> list[Piece]:
        return [layer for layer in self.layers if isinstance(layer, Piece)]

    @property
    def method(self) -> Method:
        return self.solver.train if self.training else self.solver.test

    def forward(self, x: Tensor, c: Tensor | None = None) -> State:
        """x (B, *shape) → z (B, d) and l, E, n (B,), the integrals summed over the pieces."""
        return self.solve(x, c).state

    def solve(
        self,
        x: Tensor,
        c: Tensor | None = None,
        generators: torch.Generator | Sequence[torch.Generator] | None = None,
        integrate: Integrate = integrate,
    ) -> Solution:
        """Map x (B, *shape) to z; `generators` sample the probes, one for all or for each sample.

        A Diverged error names the piece whose solver could not reach T.
        """
        fits = x.shape[1:] == self.shape
        require(fits, f"x of shape {tuple(x.shape)}: must be (B, {str(tuple(self.shape))[1:]}")
        z = self._to_state(x)
        c = self._conditions(c, x).expand(len(x), -1)
        _, l, E, n = State.initial(z)
        factored = []
        solutions = []
        for layer in self.layers:
            if isinstance(layer, VariationalDequantization):
                z, dl = layer(z)
                l = l + dl
            elif isinstance(layer, Piece):
                exact = has_divergence(layer.field) and not self.training
                eps = self._sample_probes(z, exact, generators)
                try:
                    solution = layer(z, c, eps, self.method, self.solver.gradient, integrate)
                except Diverged as error:
                    raise Diverged(f"{error} in piece {len(solutions) + 1}") from None
                z, dl, dE, dn = solution.state
                l, E, n = l + dl, E + dE, n + (math.nan if exact else dn)
                solutions.append(solution)
            else:
                z = layer(z, factored)
        z = flatten([*factored, z])
        return Solution(State(z, l, E, n), self.base.log_prob(z, c), solutions)

    def inverse(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """z (B, d) → x (B, *shape), with forward(inverse(z)).z = z up to the solver's error."""
        return self.solve_inverse(z, c)[0][-1]

    def trajectory(self, z: Tensor, c: Tensor | None = None, intervals: int = 1) -> Tensor:
        """Follow z (B, d) to x = inverse(z), in frames (pieces · intervals + 1, B, *shape).

        A frame is arranged like x: it shows the pieces still to come as the identity.
        """
        return torch.stack(self.solve_inverse(z, c, intervals)[0])

    def solve_inverse(
        self, z: Tensor, c: Tensor | None = None, intervals: int = 1
    ) -> tuple[list[Tensor], int]:
        """The frames of `trajectory`, and the evaluations of f, summed over the pieces."""
        c = self._conditions(c, z).expand(len(z), -1)
        z, factored = self._split(z)
        frames = [self._rearrange(z, factored, len(self.layers))]
        nfe = 0
        for i, layer in reversed(list(enumerate(self.layers))):
            if isinstance(layer, Piece):
                path, evaluations = layer.inverse(z, c, self.method, intervals)
                frames += [self._rearrange(z_t, factored, i) for z_t in path[1:]]
                z = path[-1]
                nfe += evaluations
            else:
                z = layer.inverse(z, factored)
        return frames, nfe

    def as_z(self, x: Tensor) -> Tensor:
        """x (B, *shape) → (B, d): z with every piece the identity."""
        return flatten(self._arrange(x))

    def as_x(self, z: Tensor) -> Tensor:
        """z (B, d) → (B, *shape): the inverse with every piece the identity."""
        return self._rearrange(*self._split(z), len(self.layers))

    def log_prob(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """x (*batch, *shape), c (*batch, k) → log p(x | c) in nats, (4), (*batch).

        The batch shapes of x and c broadcast.
        """
        c = self._conditions(c, x)
        batch = torch.broadcast_shapes(x.shape[: x.dim() - len(self.shape)], c.shape[:-1])
        x = x.expand(*batch, *self.shape).reshape(-1, *self.shape)
        solution = self.solve(x, c.expand(*batch, self.k).reshape(len(x), self.k))
        return (solution.log_q + solution.state.l).reshape(batch)

    @torch.no_grad()
    def sample(
        self,
        batch: int | Sequence[int] = (),
        c: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Sample x (*batch, *shape), from z whose noise is scaled by `temperature`."""
        batch, c = self._batch_of_samples(batch, c)
        return self.inverse(self.base.sample(c, temperature), c).reshape(*batch, *self.shape)

    def rsample_and_log_prob(
        self, batch: int | Sequence[int] = (), c: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sample x (*batch, *shape) with log p(x | c) in nats (*batch), by one solve from z to x.

        Both are differentiable in the weights of the fields. A field that computes its divergence
        has no probes, in training mode either.
        """
        batch, c = self._batch_of_samples(batch, c)
        z = self.base.sample(c)
        log_prob = self.base.log_prob(z, c)
        z, factored = self._split(z)
        for layer in reversed(self.layers):
            if isinstance(layer, Piece):
                eps = self._sample_probes(z, has_divergence(layer.field))
                dynamics = Reversed(layer.field, c, eps)
                z, l, _, _ = integrate(dynamics, z, self.method, self.solver.gradient)
                log_prob = log_prob + l
            else:
                z = layer.inverse(z, factored)
            if isinstance(layer, VariationalDequantization):
                log_prob = log_prob + layer(z)[1]
        return z.reshape(*batch, *self.shape), log_prob.reshape(batch)

    def distribution(self, c: Tensor | None = None) -> "FlowDistribution":
        """c (*batch, k) → p(x | c), one of torch.distributions."""
        return FlowDistribution(self, c)

    def _arrange(self, x: Tensor) -> list[Tensor]:
        """x (B, *shape) → the parts of z in order, with every piece the identity."""
        factored = []
        for layer in self.layers:
            x = x if isinstance(layer, SHAPE_PRESERVING) else layer(x, factored)
        return [*factored, x]

    def _split(self, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        """z (B, d) → what the last layer returned, and the parts that were factored out."""
        require(z.shape[1:] == (self.d,), f"z of shape {tuple(z.shape)}: must be (B, {self.d})")
        parts = self._to_state(z).split([*map(math.prod, self.z_shapes)], dim=1)
        pairs = zip(parts, self.z_shapes, strict=True)
        *factored, z = (part.unflatten(1, shape) for part, shape in pairs)
        return z, factored

    def _rearrange(self, z: Tensor, factored: list[Tensor], end: int) -> Tensor:
        """Undo the layers before `end`, with every piece the identity."""
        factored = list(factored)
        for layer in reversed(self.layers[:end]):
            z = z if isinstance(layer, Piece) else layer.inverse(z, factored)
        return z

    def _sample_probes(
        self,
        z: Tensor,
        exact: bool,
        generators: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """The probes of a piece that starts at z (B, *shape); none of an `exact` divergence."""
        probes = self.probes if self.training else self.test_probes
        return z.new_empty(0, *z.shape) if exact else probes.sample(z, generators)

    def _conditions(self, c: Tensor | None, like: Tensor) -> Tensor:
        """c (…, k); None stands for k = 0."""
        c = like.new_empty(0) if c is None else c
        fits = c.shape[-1:] == (self.k,)
        require(fits, f"c of shape {tuple(c.shape)}: must be (…, {self.k}) for this flow")
        return c

    def _batch_of_samples(
        self, batch: int | Sequence[int], c: Tensor | None
    ) -> tuple[Sequence[int], Tensor]:
        """`batch` as a shape, and c (B, k) for its samples, from c (…, k), which broadcasts."""
        batch = (batch,) if isinstance(batch, int) else batch
        c = self._conditions(c, next(self.parameters())).expand(*batch, self.k)
        return batch, c.reshape(math.prod(batch), self.k)

    def _to_state(self, x: Tensor) -> Tensor:
        """x in a dtype at least as precise as the solver's."""
        return x.to(torch.promote_types(x.dtype, getattr(torch, self.solver.dtype)))


class FlowDistribution(Distribution):
    """p(x | c) of a flow, for c (*batch_shape, k); None stands for k = 0.

    The mode of the flow, training or evaluation, decides which method solves it.
    """

    arg_constraints: ClassVar[dict] = {}
    has_rsample = True

    def __init__(self, flow: Flow, c: Tensor | None = None, validate_args: bool | None = None):
        self.flow = flow
        self.c = next(flow.parameters()).new_empty(0) if c is None else c
        super().__init__(torch.Size(self.c.shape[:-1]), flow.shape, validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: None = None) -> "FlowDistribution":
        """The same distribution with a batch shape to which its own broadcasts."""
        return FlowDistribution(self.flow, self.c.expand(*batch_shape, -1), self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """x (*batch, *event_shape), which broadcasts with batch_shape → log p(x | c), (*batch)."""
        if self._validate_args:
            self._validate_sample(value)
        return self.flow.log_prob(value, self.c)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Sample x (*sample_shape, *batch_shape, *event_shape) without a gradient."""
        return self.flow.sample((*sample_shape, *self.batch_shape), self.c)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Sample x, differentiable in the weights of the fields."""
        return self.flow.rsample_and_log_prob((*sample_shape, *self.batch_shape), self.c)[0]


def flatten(parts: list[Tensor]) -> Tensor:
    """Tensors (B, …) → one (B, d)."""
    return torch.cat([part.flatten(1) for part in parts], dim=1)
