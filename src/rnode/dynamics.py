"""The system (RNODE) of section 5: the state z and the three integrals that run beside it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rnode.errors import is_int, require


class State(NamedTuple):
    """z (B, *shape) and its integrals so far, each (B,): l = ∫ div f, E = ∫ ‖f‖², n = ∫ ‖∇f‖_F²."""

    z: Tensor
    l: Tensor
    E: Tensor
    n: Tensor

    @classmethod
    def initial(cls, z: Tensor) -> "State":
        zeros = z.new_zeros(z.shape[0])
        return cls(z, zeros, zeros, zeros)


class Probes:
    """How div f and ‖∇f‖_F² are had from vector-Jacobian products, equations (5) and (16).

    Σ_k ε_kᵀ∇f ε_k = div f and Σ_k ‖ε_kᵀ∇f‖² = ‖∇f‖_F², in expectation for `count` random vectors of covariance I/count
    (gaussian, rademacher), exactly for the d unit vectors (exact: d products instead of `count`).
    """

    def __init__(self, divergence: str = "gaussian", count: int = 1):
        kinds = ("gaussian", "rademacher", "exact")
        require(divergence in kinds, "divergence", divergence, " or ".join(kinds))
        require(is_int(count, at_least=1), "probes", count, "a whole number, 1 or more")
        self.divergence, self.count = divergence, count

    def draw(self, z: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Probes for z (B, *shape): (K, B, *shape). `generators`, one a sample, replace torch's global random state."""
        if self.divergence == "exact":
            d = z[0].numel()
            unit = torch.eye(d, device=z.device, dtype=z.dtype)
            return unit.view(d, 1, *z.shape[1:]).expand(d, *z.shape)
        if generators is None:
            eps = torch.randn(self.count, *z.shape, device=z.device, dtype=z.dtype)
        else:
            shape = (self.count, *z.shape[1:])
            eps = torch.stack([torch.randn(shape, generator=g, dtype=z.dtype) for g in generators], dim=1).to(z.device)
        if self.divergence == "rademacher":
            eps = torch.where(eps < 0, -1.0, 1.0).to(z.dtype)
        return eps / self.count**0.5


class Dynamics:
    """Right-hand side of (RNODE) for one piece and one solve, with its probes frozen; counts its evaluations.

    Without probes it is that of (ODE) alone, `f`.
    """

    def __init__(self, field: nn.Module, eps: Tensor | None = None):
        self.field, self.eps = field, eps
        self.nfe = 0

    def f(self, t: Tensor, z: Tensor) -> Tensor:
        """The right-hand side of (ODE) alone."""
        self.nfe += 1
        return self.field(t, z)

    def __call__(self, t: Tensor, state: State) -> State:
        self.nfe += 1
        f, eps_jac = self.field.vjp(t, state.z, self.eps)  # f(z, t) and εᵀ∇f
        return State(
            z=f,
            l=(eps_jac * self.eps).flatten(2).sum((0, 2)),  # div f = εᵀ∇f ε
            E=f.square().flatten(1).sum(1),  # ‖f‖²
            n=eps_jac.square().flatten(2).sum((0, 2)),  # ‖∇f‖_F² = ‖εᵀ∇f‖²
        )
