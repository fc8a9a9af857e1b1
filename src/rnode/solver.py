"""How an initial-value problem is solved and differentiated; the integration itself is torchdiffeq's."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchdiffeq import odeint, odeint_adjoint

from rnode.dynamics import Dynamics, State
from rnode.errors import DivergenceError, is_number, require

FIXED_GRID = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams")
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
GRADIENTS = ("backprop", "adjoint", "checkpoint")
T = 1.0  # final time of every piece: a longer one is a larger f


@dataclass(frozen=True)
class Method:
    """One of torchdiffeq's methods. Fixed-grid methods take step_size; adaptive ones rtol, atol and first_step."""

    method: str
    step_size: float = 0.25
    rtol: float = 1e-5
    atol: float = 1e-5
    first_step: float = 1e-2

    def __post_init__(self):
        require(self.method in FIXED_GRID + ADAPTIVE, "method", self.method, f"one of {', '.join(FIXED_GRID + ADAPTIVE)}")
        step = self.step_size
        divides = is_number(step) and 0 < step <= T and math.isclose(T / step, round(T / step), rel_tol=1e-9)
        require(divides, "step_size", step, f"a positive number that divides T = {T:g} into whole steps, such as 0.25")
        for name, value in (("rtol", self.rtol), ("atol", self.atol), ("first_step", self.first_step)):
            require(is_number(value) and value > 0, name, value, "a positive number, such as 1e-5")

    @property
    def adaptive(self) -> bool:
        return self.method in ADAPTIVE

    def arguments(self, norm: Callable) -> dict:
        """Keyword arguments of torchdiffeq's odeint. `norm` measures the error that an adaptive method controls."""
        if self.adaptive:
            options = {"first_step": self.first_step, "norm": norm}
            return {"method": self.method, "rtol": self.rtol, "atol": self.atol, "options": options}
        return {"method": self.method, "options": {"step_size": self.step_size}}


@dataclass(frozen=True)
class Solver:
    """How a flow is solved while it trains and when it is evaluated, and how its gradient is had.

    gradient: `backprop` through the solver's steps (the exact gradient of the discrete flow), `checkpoint` (the same
    gradient, each piece solved once more in the backward pass instead of being kept) or `adjoint` (the paper's: the
    adjoint equations solved backwards in time).
    dtype: the least precise floating-point type of z, l, E and n; the field keeps that of its weights.
    """

    train: Method
    test: Method
    gradient: str = "backprop"
    dtype: str = "float32"

    def __post_init__(self):
        require(self.gradient in GRADIENTS, "solver.gradient", self.gradient, " or ".join(GRADIENTS))
        require(self.dtype in ("float32", "float64"), "solver.dtype", self.dtype, "float32 or float64")


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def error_norm(state: State) -> Tensor:
    """Adaptive steps are controlled by z and l alone: E and n measure the flow, they must never shrink a step."""
    return torch.maximum(rms(state[0]), rms(state[1]))


@contextlib.contextmanager
def solver_errors() -> Iterator[None]:
    """Turn torchdiffeq's assertions about a solution that blows up into a DivergenceError."""
    try:
        yield
    except AssertionError as error:
        if not any(sign in str(error) for sign in ("underflow in dt", "non-finite")):
            raise
        message = f"the adaptive solver's step size underflowed or its state left the finite numbers ({error})"
        raise DivergenceError(message) from None


def precision_of(method: Method, device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast as it is now, to be entered again in a backward pass; off for adaptive methods.

    bfloat16 rounds f to 3 digits, noise that an adaptive method asked for 1e-5 would chase with ever smaller steps.
    """
    enabled = torch.is_autocast_enabled(device.type) and not method.adaptive
    return torch.autocast(device.type, torch.get_autocast_dtype(device.type), enabled=enabled)


def solve(dynamics: Dynamics, z: Tensor, method: Method, gradient: str, parameters: Iterable[nn.Parameter]) -> State:
    """(z, 0, 0, 0) at time 0 → State at time T. `parameters` are those the adjoint equations give gradients to."""
    t = torch.tensor([0.0, T], device=z.device, dtype=z.dtype)
    arguments = method.arguments(error_norm)

    def right_hand_side(t: Tensor, state: tuple[Tensor, ...]) -> State:
        with precision_of_solve:
            return dynamics(t, State(*state))

    def integrate(z: Tensor) -> State:
        return State(*(path[-1] for path in odeint(right_hand_side, State.initial(z), t, **arguments)))

    precision_of_solve = precision_of(method, z.device)
    with solver_errors():
        if gradient == "adjoint":
            initial = State.initial(z)
            paths = odeint_adjoint(right_hand_side, initial, t, adjoint_params=tuple(parameters), **arguments)
            return State(*(path[-1] for path in paths))
        if gradient == "checkpoint" and torch.is_grad_enabled():
            return checkpoint(integrate, z, use_reentrant=False, preserve_rng_state=False)
        return integrate(z)


def solve_back(field: nn.Module, z: Tensor, method: Method) -> Tensor:
    """z at time T → z at time 0: the (ODE) alone, without the integrals."""
    t = torch.tensor([T, 0.0], device=z.device, dtype=z.dtype)
    with solver_errors(), precision_of(method, z.device):
        return odeint(field, z, t, **method.arguments(rms))[-1]
