"""The ODE methods for training and evaluation, and how gradients are computed.

torchdiffeq integrates; this file says what it integrates, by which method and with which gradient.
"""

import contextlib
import math
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchdiffeq import odeint, odeint_adjoint

from rnode.choices import ADAPTIVE, FIXED_GRID, GRADIENTS, INTEGRALS, ONE_STEP
from rnode.dynamics import Dynamics, State
from rnode.errors import DivergenceError, one_line, require, require_choice
from rnode.quadrature import radau, simpson

QUADRATURES = {"simpson": simpson, "radau": radau}
T = 1.0  # final time of every piece; a longer time is the same as a larger f


@dataclass(frozen=True)
class Method:
    """A method of torchdiffeq with its options.

    Args:
        method: name of the method in torchdiffeq.
        integrals: how l, E and n are computed. `system` integrates them together with z. `simpson`
            and `radau` integrate z alone, from node to node of a quadrature rule, which costs one
            product εᵀ∇f per node instead of one per evaluation. Both need a one-step method and a
            gradient other than the adjoint, and Simpson's rule an even number of steps; else the
            system is integrated.
        step_size: step of a fixed grid, which divides T = 1 into whole steps; 0.25 by default.
        steps: number of steps of a fixed grid, instead of `step_size`.
        rtol: relative tolerance of an adaptive method.
        atol: absolute tolerance of an adaptive method.
        first_step: first step that an adaptive method tries.
        max_steps: most adaptive steps of a piece; beyond, the solve has diverged.
    """

    method: str
    integrals: str = "system"
    step_size: float | None = None
    steps: int | None = None
    rtol: float = 1e-5
    atol: float = 1e-5
    first_step: float = 0.3
    max_steps: int = 10000

    def __post_init__(self):
        require_choice("method", self.method, FIXED_GRID + ADAPTIVE)
        require_choice("integrals", self.integrals, INTEGRALS)
        both = self.step_size is not None and self.steps is not None
        given = f"step_size={self.step_size} and steps={self.steps}"
        require(not both, f"{given}: give one of the two, set the other to None (null)")
        require(self.steps is None or self.steps >= 1, f"steps={self.steps}: must be at least 1")
        if self.step_size is not None:
            count = T / self.step_size if self.step_size > 0 else 0.0
            whole = count >= 1 and math.isclose(count, round(count), rel_tol=1e-9)
            require(whole, f"step_size={self.step_size}: must divide 1 into whole steps, as 0.25")

    @property
    def adaptive(self) -> bool:
        return self.method in ADAPTIVE

    @property
    def grid_steps(self) -> int:
        """Number of steps of a fixed-grid method from 0 to T."""
        return self.steps or round(T / (self.step_size or 0.25))

    def uses_quadrature(self, gradient: str) -> bool:
        """Whether l, E and n are computed by a quadrature rule."""
        applies = self.method in ONE_STEP and gradient != "adjoint"
        even = self.grid_steps % 2 == 0
        return applies and (self.integrals == "radau" or (self.integrals == "simpson" and even))

    def odeint_options(self, norm: Callable) -> dict:
        """Keyword arguments of `odeint`; `norm` measures the error of adaptive methods."""
        if not self.adaptive:
            return {"method": self.method, "options": {"step_size": T / self.grid_steps}}
        options = {"first_step": self.first_step, "max_num_steps": self.max_steps, "norm": norm}
        return {"method": self.method, "rtol": self.rtol, "atol": self.atol, "options": options}


@dataclass(frozen=True)
class Solver:
    """The methods for training and evaluation, and how gradients are computed.

    Args:
        train: method in training mode.
        test: method in evaluation mode, and for inverses.
        gradient: `backprop` differentiates the solver's steps: the exact gradient of the discrete
            flow. `checkpoint` gives the same in less memory: the backward pass solves each piece
            again. `adjoint` solves the adjoint equations backwards in time, as the paper does.
        dtype: least precise dtype of z, l, E and n, `float32` or `float64`. The field computes in
            the dtype of its weights.
    """

    train: Method
    test: Method
    gradient: str = "backprop"
    dtype: str = "float32"

    def __post_init__(self):
        require_choice("gradient", self.gradient, GRADIENTS)
        require_choice("dtype", self.dtype, ("float32", "float64"))


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def error_norm(state: State) -> Tensor:
    """Error norm of z and l alone: E and n measure the flow and never shrink a step."""
    return torch.maximum(rms(state[0]), rms(state[1]))


@contextlib.contextmanager
def solver_errors() -> Generator[None]:
    """Raise torchdiffeq's assertions about a diverging solution as DivergenceError."""
    signs = {
        "underflow in dt": "the step size of the adaptive solver underflowed",
        "non-finite": "the state of the adaptive solver became NaN or infinite",
        "max_num_steps exceeded": "the adaptive solver took more than max_steps",
    }
    try:
        yield
    except AssertionError as error:
        for what in (signs[sign] for sign in signs if sign in str(error)):
            raise DivergenceError(f"{what} ({one_line(error)})") from None
        raise


def precision_of(method: Method, device: torch.device) -> contextlib.AbstractContextManager:
    """Return the current autocast state, which the backward pass enters again.

    It is off for adaptive methods: bfloat16 rounds f to 3 digits, an error that they would chase.
    """
    enabled = torch.is_autocast_enabled(device.type) and not method.adaptive
    return torch.autocast(device.type, torch.get_autocast_dtype(device.type), enabled=enabled)


def solve(
    dynamics: Dynamics, z: Tensor, method: Method, gradient: str, parameters: Iterable[Tensor] = ()
) -> State:
    """Integrate (RNODE) from z (B, *shape), with integrals of zero, from time 0 to time T.

    The adjoint equations compute gradients for `parameters`. An adaptive method that cannot reach T
    raises DivergenceError.
    """
    with solver_errors():
        if method.uses_quadrature(gradient):
            return solve_quadrature(dynamics, z, method, gradient)
        return solve_system(dynamics, z, method, gradient, tuple(parameters))


def solve_system(dynamics, z, method, gradient, parameters) -> State:
    """Integrate z, l, E and n together by torchdiffeq."""
    t = torch.tensor([0.0, T], device=z.device, dtype=z.dtype)
    options, precision = method.odeint_options(error_norm), precision_of(method, z.device)

    def right_hand_side(t: Tensor, state: tuple[Tensor, ...]) -> State:
        with precision:
            return dynamics(t, State(*state))

    def integrate(z: Tensor, odeint=odeint, **adjoint) -> State:
        paths = odeint(right_hand_side, State.initial(z), t, **adjoint, **options)
        return State(*(path[-1] for path in paths))

    if gradient == "adjoint":
        return integrate(z, odeint_adjoint, adjoint_params=parameters)
    return recompute_in_backward(integrate, z) if gradient == "checkpoint" else integrate(z)


def solve_quadrature(dynamics, z, method, gradient) -> State:
    """Integrate z from node to node, and l, E, n by quadrature of their rates at the nodes."""
    steps, precision = method.grid_steps, precision_of(method, z.device)
    nodes, weights = QUADRATURES[method.integrals](steps)
    t = T * torch.tensor([*nodes[:steps], 1.0], device=z.device, dtype=z.dtype)

    def step(z: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        rates = []

        def f(t: Tensor, z: Tensor) -> Tensor:
            with precision:
                if rates:
                    return dynamics.f(t, z)
                rates.append(dynamics(t, State.initial(z)))  # the first evaluation is at the node
                return rates[0].z

        return odeint(f, z, t, method=method.method)[-1], *rates[0][1:]

    rates, again = [], gradient == "checkpoint"
    for k in range(steps):
        arguments = (z, t[k : k + 2])
        z, *rate = recompute_in_backward(step, *arguments) if again else step(*arguments)
        rates.append(rate)
    if len(nodes) > steps:  # T is a node too
        with precision:
            rates.append(dynamics(t[-1], State.initial(z))[1:])

    def integral(rates: tuple[Tensor, ...]) -> Tensor:
        return sum(T * weight * rate for weight, rate in zip(weights, rates, strict=True))

    return State(z, *map(integral, zip(*rates, strict=True)))


def recompute_in_backward(function: Callable, *arguments: Tensor):
    """Call `function` without saving its graph; the backward pass calls it again."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def solve_back(f: Callable, z: Tensor, method: Method, intervals: int = 1) -> Tensor:
    """Integrate dz/dt = f(t, z) back: z(T) → z at `intervals` + 1 times from T to 0."""
    t = torch.linspace(T, 0, intervals + 1, device=z.device, dtype=z.dtype)
    with solver_errors(), precision_of(method, z.device):
        return odeint(f, z, t, **method.odeint_options(rms))
