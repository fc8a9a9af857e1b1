"""The ODE methods for training and evaluation, and how gradients are computed.

`rnode.runge_kutta` integrates on a fixed grid, torchdiffeq with adaptive steps and by the adjoint.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchdiffeq import odeint, odeint_adjoint

from rnode.dynamics import Dynamics, State, T
from rnode.errors import Diverged, one_line, require, require_choice
from rnode.names import ADAPTIVE_METHODS, FIXED_GRID, GRADIENTS, INTEGRALS, NORMS
from rnode.quadrature import radau, simpson
from rnode.runge_kutta import Tensors, path, step, time

NORM_OF = {  # of errors (B, *shape)
    "rows": lambda x: x.square().reshape(len(x), -1).mean(1).max().sqrt(),
    "batch": lambda x: x.square().mean().sqrt(),
}
QUADRATURES = {"simpson": simpson, "radau": radau}
MAX_STEPS = 10_000  # adaptive steps of a piece; a solve that needs more has diverged


@dataclass(frozen=True)
class Method:
    """A method of torchdiffeq with its options.

    Args:
        method: name of the method in torchdiffeq. `auto` is dopri5, for which
            `rnode.evaluation.agreeing_grid` puts a fixed grid where many samples are evaluated.
        integrals: how l, E and n are computed. `system` integrates them together with z. `simpson`
            and `radau` integrate z alone, from node to node of a quadrature rule, which costs one
            vjp per node instead of one per evaluation. Both need a fixed grid. Simpson's rule needs
            an even number of steps.
        steps: number of equal steps of a fixed grid over [0, 1].
        rtol: relative tolerance of an adaptive method.
        atol: absolute tolerance of an adaptive method.
        first_step: first step that an adaptive method tries.
        norm: what an adaptive method keeps below its tolerance: the error of every sample (`rows`),
            or the root mean square over the batch (`batch`), as the paper does.
    """

    method: str
    integrals: str = "system"
    steps: int = 4
    rtol: float = 1e-5
    atol: float = 1e-5
    first_step: float = 0.3
    norm: str = "rows"
    times: tuple[float, ...] = field(init=False, repr=False)  # that a solve from 0 to T visits
    weights: tuple[float, ...] = field(init=False, repr=False)  # of the rule for l, E and n, if any

    def __post_init__(self):
        require_choice("method", self.method, FIXED_GRID + ADAPTIVE_METHODS)
        require_choice("integrals", self.integrals, INTEGRALS)
        require_choice("norm", self.norm, NORMS)
        require(self.steps >= 1, f"steps={self.steps}: must be at least 1")
        fixed = self.integrals == "system" or not self.adaptive
        require(fixed, f"integrals={self.integrals}: needs a method of {', '.join(FIXED_GRID)}")
        even = self.integrals != "simpson" or self.steps % 2 == 0
        require(even, f"steps={self.steps}: must be even for integrals=simpson")
        steps = 1 if self.adaptive else self.steps
        nodes, weights = np.linspace(0, 1, steps + 1), np.empty(0)
        if self.integrals != "system":
            nodes, weights = QUADRATURES[self.integrals](steps)
        object.__setattr__(self, "times", (*(T * nodes[:steps]).tolist(), T))
        object.__setattr__(self, "weights", tuple((T * weights).tolist()))

    @property
    def adaptive(self) -> bool:
        return self.method in ADAPTIVE_METHODS

    def odeint_options(self, dtype: torch.dtype) -> dict:
        """Keyword arguments of `odeint` for a state (z, …).

        The errors of z and l limit adaptive steps. E and n never shrink a step.
        """
        if not self.adaptive:
            return {"method": self.method, "options": {"step_size": T / self.steps}}
        options = {
            "first_step": self.first_step,
            "max_num_steps": MAX_STEPS,
            "norm": lambda state: max(map(NORM_OF[self.norm], state[:2])),
            "dtype": dtype,  # of times; torchdiffeq's own is float64, which some devices lack
        }
        method = "dopri5" if self.method == "auto" else self.method
        return {"method": method, "rtol": self.rtol, "atol": self.atol, "options": options}


@dataclass(frozen=True)
class Solver:
    """The methods for training and evaluation, and how gradients are computed.

    Args:
        train: method in training mode.
        test: method in evaluation mode, and for inverses.
        gradient: `backprop` differentiates the solver's steps: the exact gradient of the discrete
            flow. `checkpoint` computes the same gradient in less memory: the backward pass solves
            each piece again. `adjoint` solves the adjoint equations backwards in time, as the paper
            does; it needs integrals=system.
        dtype: least precise dtype of z, l, E and n, `float32` or `float64`. The field computes in
            the dtype of its weights.
    """

    train: Method
    test: Method
    gradient: str = "backprop"
    dtype: str = "float32"

    def __post_init__(self):
        require(self.train.method != "auto", "train.method=auto: is for evaluation alone")
        require_choice("gradient", self.gradient, GRADIENTS)
        require_choice("dtype", self.dtype, ("float32", "float64"))
        able = self.gradient != "adjoint" or self.train.integrals == "system"
        instead = f"integrals={self.train.integrals} saves memory by gradient=checkpoint"
        require(able, f"gradient=adjoint: needs integrals=system; {instead}")


@contextlib.contextmanager
def solver_errors() -> Generator[None]:
    """Raise torchdiffeq's assertions, with which an adaptive method gives up, as Diverged."""
    words = ("underflow in dt", "non-finite", "max_num_steps")
    try:
        yield
    except AssertionError as error:
        if not any(word in str(error) for word in words):
            raise
        raise Diverged(f"the adaptive solver gave up: {one_line(error)}") from None


def precision_of(method: Method, device: torch.device) -> torch.autocast:
    """Return the current autocast state, which the backward pass enters again.

    It is off for adaptive methods: bfloat16 rounds f to 3 digits, an error that they would chase.
    """
    enabled = torch.is_autocast_enabled(device.type) and not method.adaptive
    return torch.autocast(device.type, torch.get_autocast_dtype(device.type), enabled=enabled)


def integrate(dynamics: Dynamics, z: Tensor, method: Method, gradient: str) -> State:
    """Integrate (RNODE) from z (B, *shape), with integrals of zero, from time 0 to time T.

    An adaptive method that cannot reach T raises Diverged.
    """
    if z.numel() == 0:  # the error norm of nothing would be NaN
        return State.initial(z)
    with solver_errors():
        if method.integrals == "system":
            return integrate_system(dynamics, z, method, gradient)
        return integrate_by_quadrature(dynamics, z, method, gradient)


def integrate_system(dynamics: Dynamics, z: Tensor, method: Method, gradient: str) -> State:
    """Integrate z, l, E and n together."""

    @precision_of(method, z.device)
    def right_hand_side(t: Tensor, state: Tensors) -> State:
        return dynamics(t, State(*state))

    if gradient == "adjoint":  # it differentiates for the weights themselves, once an evaluation
        t = torch.linspace(0, T, 2, device=z.device, dtype=z.dtype)
        weights = tuple(p for p in dynamics.field.parameters() if p.requires_grad)
        options = method.odeint_options(z.dtype) | {"adjoint_params": weights}
        paths = odeint_adjoint(right_hand_side, State.initial(z), t, **options)
        return State(*FirstOrder.apply(*(path[-1] for path in paths)))
    dynamics.prepare(z)

    def solve(z: Tensor) -> State:
        return State(*solve_ode(right_hand_side, State.initial(z), method.times, method)[-1])

    return recompute_in_backward(solve, z) if gradient == "checkpoint" else solve(z)


def integrate_by_quadrature(dynamics: Dynamics, z: Tensor, method: Method, gradient: str) -> State:
    """Integrate z from node to node, and l, E, n by quadrature of their rates at the nodes."""
    dynamics.prepare(z)

    @precision_of(method, z.device)
    def rates_at(t: float, z: Tensor) -> State:
        return dynamics(time(t, z), State.initial(z))

    @precision_of(method, z.device)
    def f(t: Tensor, y: Tensors) -> Tensors:
        return (dynamics.f(t, *y),)

    def solve_step(z: Tensor, start: float, end: float) -> Tensors:
        slope, *rates = rates_at(start, z)
        (z,) = step(f, start, end - start, (z,), method.method, (slope,))
        return z, *rates

    rates = []
    for interval in itertools.pairwise(method.times):
        if gradient == "checkpoint":
            z, *rate = recompute_in_backward(solve_step, z, *interval)
        else:
            z, *rate = solve_step(z, *interval)
        rates.append(rate)
    if len(method.weights) > len(rates):  # T is a node too
        rates.append(rates_at(T, z)[1:])

    def integral(rates: Tensors) -> Tensor:
        first, *others = (w * rate for w, rate in zip(method.weights, rates, strict=True))
        return sum(others, first)

    return State(z, *map(integral, zip(*rates, strict=True)))


class FirstOrder(torch.autograd.Function):
    """The identity, which refuses second derivatives: torchdiffeq's adjoint returns zeros."""

    @staticmethod
    def forward(ctx, *tensors):
        return tensors

    @staticmethod
    def backward(ctx, *gradients):
        wrong = "gradient=adjoint has no second derivatives: use backprop or checkpoint"
        require(not torch.is_grad_enabled(), wrong)
        return gradients


def recompute_in_backward(function: Callable, *arguments: Any):
    """Call `function` without saving its graph; the backward pass calls it again."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def integrate_back(dynamics: Dynamics, z: Tensor, method: Method, intervals: int = 1) -> Tensor:
    """Integrate (ODE) back: z(T) (B, *shape) → z at `intervals` + 1 times from T to 0."""
    if z.numel() == 0:
        return z.expand(intervals + 1, *z.shape)
    dynamics.prepare(z)

    @precision_of(method, z.device)
    def right_hand_side(t: Tensor, y: Tensors) -> Tensors:
        return (dynamics.f(t, *y),)

    per_interval = 1 if method.adaptive else math.ceil(method.steps / intervals)
    steps = intervals * per_interval
    times = [T * k / steps for k in range(steps, -1, -1)]
    with solver_errors():
        states = solve_ode(right_hand_side, (z,), times, method)
    return torch.stack([z for (z,) in states[::per_interval]])


def solve_ode(f: Callable, y: Tensors, times: Sequence[float], method: Method) -> list[Tensors]:
    """Integrate dy/dt = f(t, y) from `times[0]` → y at each of the times."""
    if not method.adaptive:
        return path(f, y, times, method.method)
    t = y[0].new_tensor(times)
    return list(zip(*odeint(f, y, t, **method.odeint_options(t.dtype)), strict=True))
