"""Base distributions q(z | c) of a flow: the standard normal, a Gaussian, a mixture of Gaussians.

A flow whose field is zero has the density of its base, so it can start at the best density that has
a closed form. Equation (17) then improves on it.
"""

import math

import torch
from torch import Tensor, nn

from rnode.loss import log_normal


class Normal(nn.Module):
    """The standard normal in d dimensions, whatever c: the base of the paper."""

    def __init__(self, d: int):
        super().__init__()
        self.d = d

    def log_prob(self, z: Tensor, c: Tensor) -> Tensor:
        """z (B, d), c (B, k) → log q(z | c) in nats, (B,)."""
        return log_normal(z)

    def sample(
        self, c: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Sample z (B, d) for c (B, k), by a generator of the CPU; temperature scales the noise."""
        return temperature * torch.randn(len(c), self.d, generator=generator).to(c)


class Mixture(nn.Module):
    """A mixture of J Gaussians of (c, z), conditioned on c in closed form.

    With (c, z) = m + L u of a component, L = [[A, 0], [B, C]] and u = (v, w), its marginal of c is
    that of v and its conditional of z is that of w. The weights of the components given c are
    proportional to their weights times their densities of c.

    Args:
        weights: of the components (J,), whose sum is 1.
        means: m (J, k + d), of c first.
        covariances: L Lᵀ (J, k + d, k + d).
        k: number of the numbers c; without conditions it is 0.

    Raises:
        torch.linalg.LinAlgError: if a covariance is not positive definite.
    """

    log_weights: Tensor
    means: Tensor
    factors: Tensor

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor, k: int = 0):
        super().__init__()
        self.k = k
        self.d = means.shape[1] - k
        self.register_buffer("log_weights", weights.log())
        self.register_buffer("means", means)
        self.register_buffer("factors", torch.linalg.cholesky(covariances))

    def log_prob(self, z: Tensor, c: Tensor) -> Tensor:
        """z (B, d), c (B, k) → log q(z | c) in nats, (B,)."""
        u = self._standardize(torch.cat([c.to(z.dtype), z], dim=1))
        v, w = u[:, : self.k], u[:, self.k :]
        log_det = self._log_diagonal(w)[:, self.k :].sum(1, keepdim=True)
        constant = self.d / 2 * math.log(2 * math.pi)
        return (self._log_weights(v) - w.square().sum(1) / 2 - log_det).logsumexp(0) - constant

    def sample(
        self, c: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Sample z (B, d) for c (B, k), by a generator of the CPU; temperature scales the noise."""
        v = self._standardize(c)
        weights = self._log_weights(v).exp().T.cpu()
        component = torch.multinomial(weights, 1, generator=generator)[:, 0].to(c.device)
        noise = torch.randn(len(c), self.d, generator=generator).to(v)
        z = torch.empty_like(noise)
        for j in component.unique().tolist():
            chosen = component == j
            u = torch.cat([v[j, :, chosen].T, temperature * noise[chosen]], dim=1)
            z[chosen] = self.means[j, self.k :].to(u) + u @ self.factors[j, self.k :].to(u).T
        return z

    def _standardize(self, x: Tensor) -> Tensor:
        """The first n of (c, z), (B, n) → those of u for each component, (J, n, B)."""
        n = x.shape[1]
        difference = (x - self.means[:, None, :n].to(x)).mT
        factors = self.factors[:, :n, :n].to(x)
        return torch.linalg.solve_triangular(factors, difference, upper=False)

    def _log_weights(self, v: Tensor) -> Tensor:
        """v (J, k, B) of c → the logarithm of each component's weight given c, (J, B)."""
        log_det = self._log_diagonal(v)[:, : self.k].sum(1, keepdim=True)
        log_weights = self.log_weights[:, None].to(v) - v.square().sum(1) / 2 - log_det
        return log_weights.log_softmax(0)

    def _log_diagonal(self, like: Tensor) -> Tensor:
        return self.factors.diagonal(dim1=1, dim2=2).log().to(like)


class Gaussian(Mixture):
    """The Gaussian of (c, z) with `mean` (k + d,) and `covariance` (k + d, k + d), given c."""

    def __init__(self, mean: Tensor, covariance: Tensor, k: int = 0):
        super().__init__(torch.ones_like(mean[:1]), mean[None], covariance[None], k)
