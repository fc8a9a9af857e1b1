"""The system (RNODE) of section 5: the state z and the three integrals l, E and n."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rnode.errors import require_choice
from rnode.names import DIVERGENCES

T = 1.0  # final time of every piece; a longer time is the same as a larger f


class State(NamedTuple):
    """z (B, *shape) and its integrals, (B,): l = ∫ div f in nats, E = ∫ ‖f‖², n = ∫ ‖∇f‖_F²."""

    z: Tensor
    l: Tensor
    E: Tensor
    n: Tensor

    @classmethod
    def initial(cls, z: Tensor) -> "State":
        """The state at time 0: z with integrals of zero."""
        zeros = z.new_zeros(z.shape[0])
        return cls(z, zeros, zeros, zeros)


class VectorField(Protocol):
    """A field f(z, t; c): `rnode.Field`, or any torch.nn.Module with this `forward`.

    c (B, k) are the numbers on which the density is conditioned; k = 0 without conditions. A field
    may also have

    - `vjp(t, z, eps, c)`, which returns what `vjp` below does;
    - `vjp_and_divergence(t, z, eps, c)`, which returns div f (B,) too, and is called in place of
      `vjp` if `has_divergence` is true. No probe then estimates the divergence;
    - `prepare(z)`, which is called once before a solve; every evaluation of the solve then gets its
      result as the keyword argument `weights`.
    """

    def parameters(self) -> Iterator[Tensor]:
        """The weights, as of a torch.nn.Module."""

    def __call__(self, t: Tensor, z: Tensor, c: Tensor) -> Tensor:
        """t (), z (B, *shape), c (B, k) → f(z, t; c) (B, *shape)."""


def vjp(field: VectorField, t: Tensor, z: Tensor, eps: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Compute f and εᵀ∇f by autograd, for a field without a product of its own.

    t (), z (B, *shape), eps (K, B, *shape), c (B, k) → f (B, *shape), εᵀ∇f (K, B, *shape).
    """
    differentiated = torch.is_grad_enabled()
    with torch.enable_grad():
        z = z if differentiated and z.requires_grad else z.detach().requires_grad_()
        f = field(t, z, c)
        products = [
            torch.autograd.grad(f, z, one, create_graph=differentiated, retain_graph=True)[0]
            for one in eps
        ]
    return f if differentiated else f.detach(), torch.stack(products)


def has_divergence(field: VectorField) -> bool:
    """Whether a field computes its divergence itself."""
    return getattr(field, "has_divergence", False)


class Probes:
    """Vectors ε with Σ_k ε_kᵀ∇f ε_k = div f and Σ_k ‖ε_kᵀ∇f‖² = ‖∇f‖_F², equations (5) and (16).

    This holds in expectation for `count` random vectors of covariance I/count, and exactly for the
    d unit vectors.

    Args:
        divergence: `gaussian` or `rademacher` (random), or `exact` (the unit vectors).
        count: number of random vectors per sample; `exact` ignores it.
    """

    def __init__(self, divergence: str = "gaussian", count: int = 1):
        require_choice("divergence", divergence, DIVERGENCES)
        self.divergence = divergence
        self.count = count

    def __str__(self) -> str:
        exact = self.divergence == "exact"
        return "exact" if exact else f"{self.count} {self.divergence} probe(s) a sample"

    def sample(
        self, z: Tensor, generators: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """Sample ε (K, B, *shape) for z (B, *shape), from one generator or one for each sample."""
        if self.divergence == "exact":
            d = math.prod(z.shape[1:])
            unit = torch.eye(d, device=z.device, dtype=z.dtype)
            return unit.view(d, 1, *z.shape[1:]).expand(d, *z.shape)
        if generators is None or isinstance(generators, torch.Generator):
            shape = (self.count, *z.shape)
            eps = torch.randn(shape, generator=generators, device=z.device, dtype=z.dtype)
        else:
            shape = (self.count, *z.shape[1:])
            samples = [torch.randn(shape, generator=g, dtype=torch.float32) for g in generators]
            eps = torch.stack(samples, dim=1).to(z)  # the same probes whatever the dtype of z
        if self.divergence == "rademacher":
            eps = torch.where(eps < 0, -1.0, 1.0).to(z.dtype)
        return eps / self.count**0.5


class Dynamics:
    """Right-hand side of (RNODE) for one piece and one solve. It counts its evaluations in `nfe`.

    Args:
        field: the vector field f.
        c: the numbers (B, k) on which the density is conditioned.
        eps: the probes (K, B, *shape), frozen for the whole solve; None if only `f` is called.
            Without a probe, K = 0, n stays 0; l is then that of a field that has its divergence.
    """

    def __init__(self, field: VectorField, c: Tensor, eps: Tensor | None = None):
        self.field: Any = field
        self.c = c
        self.eps: Any = eps
        self.nfe = 0
        self.prepared: dict[str, Any] = {}
        self.vjp = getattr(field, "vjp", partial(vjp, field))

    def prepare(self, z: Tensor) -> None:
        """Let the field compute once what all evaluations of a solve from z share."""
        if hasattr(self.field, "prepare"):
            self.prepared = {"weights": self.field.prepare(z)}

    def f(self, t: Tensor, z: Tensor) -> Tensor:
        """The right-hand side of (ODE): t (), z (B, *shape) → dz/dt (B, *shape)."""
        self.nfe += 1
        return self.field(t, z, self.c, **self.prepared)

    def __call__(self, t: Tensor, state: State) -> State:
        """The right-hand side of (RNODE): the time derivatives of z, l, E and n."""
        self.nfe += 1
        arguments = (t, state.z, self.eps, self.c)
        if has_divergence(self.field):
            f, eps_jac, div = self.field.vjp_and_divergence(*arguments, **self.prepared)
        else:
            f, eps_jac = self.vjp(*arguments, **self.prepared)  # f(z, t) and εᵀ∇f
            div = (eps_jac * self.eps).flatten(2).sum((0, 2))  # div f = εᵀ∇f ε
        return State(
            z=f,
            l=div,
            E=f.square().flatten(1).sum(1),  # ‖f‖²
            n=eps_jac.square().flatten(2).sum((0, 2)),  # ‖∇f‖_F² = ‖εᵀ∇f‖²
        )


class Reversed(Dynamics):
    """The same path from T to 0, dz/ds = −f(z, T − s; c), and the integrals of (RNODE) along it."""

    def f(self, t: Tensor, z: Tensor) -> Tensor:
        return -super().f(T - t, z)

    def __call__(self, t: Tensor, state: State) -> State:
        rates = super().__call__(T - t, state)
        return rates._replace(z=-rates.z)
