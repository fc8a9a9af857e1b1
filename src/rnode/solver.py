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
from rnode.errors import DivergenceError, is_int, is_number, one_line, require
from rnode.quadrature import radau, simpson

ONE_STEP = ("euler", "midpoint", "heun2", "heun3", "rk4")
FIXED_GRID = (*ONE_STEP, "explicit_adams", "implicit_adams")
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
GRADIENTS = ("backprop", "adjoint", "checkpoint")
QUADRATURES = {"simpson": simpson, "radau": radau}
INTEGRALS = ("system", *QUADRATURES)
MOST_STEPS = 10_000  # of a fixed grid
T = 1.0  # final time of every piece: a longer one is a larger f


@dataclass(frozen=True)
class Method:
    """One of torchdiffeq's methods. Fixed-grid methods take step_size; adaptive ones the four that follow it.

    integrals: `system` solves (RNODE) as it stands, z, l, E and n together. The other two solve z alone and have the
    integrals by quadrature at points of its grid, for one product εᵀ∇f a point instead of one an evaluation: l, E and n
    never feed back into z. `simpson` takes the method's equal steps and Simpson's rule, of fourth order as rk4 is; it needs
    an even number of steps. `radau` lays as many steps between the nodes of Radau's quadrature: uneven steps (step_size is
    their mean), and l, E and n of higher order. Both apply to one-step methods on a grid; other methods, and the adjoint
    gradient, solve the system all the same.
    """

    method: str
    integrals: str = "system"
    step_size: float = 0.25
    rtol: float = 1e-5
    atol: float = 1e-5
    first_step: float = 0.3
    max_steps: int = 10000

    def __post_init__(self):
        require(self.method in FIXED_GRID + ADAPTIVE, "method", self.method, f"one of {', '.join(FIXED_GRID + ADAPTIVE)}")
        step = self.step_size
        divides = is_number(step) and T / MOST_STEPS <= step <= T and math.isclose(T / step, round(T / step), rel_tol=1e-9)
        right = f"a positive number that divides T = {T:g} into whole steps, {MOST_STEPS} at most, such as 0.25"
        require(divides, "step_size", step, right)
        require(self.integrals in INTEGRALS, "integrals", self.integrals, " or ".join(INTEGRALS))
        for name, value in (("rtol", self.rtol), ("atol", self.atol), ("first_step", self.first_step)):
            require(is_number(value) and value > 0, name, value, "a positive number, such as 1e-5")
        whole = is_int(self.max_steps, at_least=1) and self.max_steps < 2**31  # torchdiffeq counts in 32 bits
        require(whole, "max_steps", self.max_steps, "a whole number from 1 to 2^31 - 1")

    @property
    def adaptive(self) -> bool:
        return self.method in ADAPTIVE

    @property
    def steps(self) -> int:
        """Steps of a fixed-grid method from 0 to T."""
        return round(T / self.step_size)

    def by_quadrature(self, gradient: str) -> bool:
        """Whether l, E and n are had by quadrature."""
        possible = self.method in ONE_STEP and gradient != "adjoint"
        return possible and (self.integrals == "radau" or (self.integrals == "simpson" and self.steps % 2 == 0))

    def arguments(self, norm: Callable) -> dict:
        """Keyword arguments of torchdiffeq's odeint. `norm` measures the error that an adaptive method controls."""
        if self.adaptive:
            options = {"first_step": self.first_step, "max_num_steps": self.max_steps, "norm": norm}
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
        for name in ("train", "test"):
            method = getattr(self, name)
            require(
                isinstance(method, Method), f"solver.{name}", method, "a section with a method, as in conf/solver/rk4.yaml"
            )
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
        signs = {
            "underflow in dt": "the adaptive solver's step size underflowed",
            "non-finite": "the adaptive solver's state left the finite numbers",
            "max_num_steps exceeded": "the adaptive solver took more than max_steps",
        }
        what = next((what for sign, what in signs.items() if sign in str(error)), None)
        if what is None:
            raise
        raise DivergenceError(f"{what} ({one_line(error)})") from None


def precision_of(method: Method, device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast as it is now, to be entered again in a backward pass; off for adaptive methods.

    bfloat16 rounds f to 3 digits, noise that an adaptive method asked for 1e-5 would chase with ever smaller steps.
    """
    enabled = torch.is_autocast_enabled(device.type) and not method.adaptive
    return torch.autocast(device.type, torch.get_autocast_dtype(device.type), enabled=enabled)


def solve(dynamics: Dynamics, z: Tensor, method: Method, gradient: str, parameters: Iterable[nn.Parameter]) -> State:
    """(z, 0, 0, 0) at time 0 → State at time T. `parameters` are those the adjoint equations give gradients to."""
    precision = precision_of(method, z.device)
    integrate = solve_quadrature if method.by_quadrature(gradient) else solve_system
    with solver_errors():
        return integrate(dynamics, z, method, gradient, precision, tuple(parameters))


def solve_system(dynamics, z, method, gradient, precision, parameters) -> State:
    """(RNODE) as it stands: torchdiffeq integrates all four."""
    t = torch.tensor([0.0, T], device=z.device, dtype=z.dtype)
    arguments = method.arguments(error_norm)

    def right_hand_side(t: Tensor, state: tuple[Tensor, ...]) -> State:
        with precision:
            return dynamics(t, State(*state))

    def integrate(z: Tensor) -> State:
        return State(*(path[-1] for path in odeint(right_hand_side, State.initial(z), t, **arguments)))

    if gradient == "adjoint":
        paths = odeint_adjoint(right_hand_side, State.initial(z), t, adjoint_params=parameters, **arguments)
        return State(*(path[-1] for path in paths))
    return again_in_backward(integrate, z) if gradient == "checkpoint" else integrate(z)


def solve_quadrature(dynamics, z, method, gradient, precision, parameters) -> State:
    """z by the method, in steps from node to node; l, E and n by quadrature, from their rates where each step begins."""
    nodes, weights = QUADRATURES[method.integrals](method.steps)
    t = T * torch.tensor([*nodes[: method.steps], 1.0], device=z.device, dtype=z.dtype)

    def step(z: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        rates = []

        def f(t: Tensor, z: Tensor) -> Tensor:
            with precision:
                if rates:
                    return dynamics.f(t, z)
                rates.append(dynamics(t, State.initial(z)))  # a step's first evaluation is at the node
                return rates[0].z

        return odeint(f, z, t, method=method.method)[-1], *rates[0][1:]

    rates = []
    for k in range(method.steps):
        z, *rate = again_in_backward(step, z, t[k : k + 2]) if gradient == "checkpoint" else step(z, t[k : k + 2])
        rates.append(rate)
    if len(nodes) > method.steps:  # T is a node too
        with precision:
            rates.append(dynamics(t[-1], State.initial(z))[1:])
    integrals = (sum(T * w * r for w, r in zip(weights, rate, strict=True)) for rate in zip(*rates, strict=True))
    return State(z, *integrals)


def again_in_backward(function: Callable, *arguments: Tensor):
    """Call `function` without keeping its graph, and once more in the backward pass."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def solve_back(f: Callable[[Tensor, Tensor], Tensor], z: Tensor, method: Method, intervals: int = 1) -> Tensor:
    """z at time T → z at `intervals` + 1 equal times from T to 0, (times, B, *shape): (ODE) alone, without the integrals."""
    t = torch.linspace(T, 0, intervals + 1, device=z.device, dtype=z.dtype)
    with solver_errors(), precision_of(method, z.device):
        return odeint(f, z, t, **method.arguments(rms))
