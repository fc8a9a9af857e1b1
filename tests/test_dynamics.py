import pytest
import torch
from torch import nn

from helpers import DOPRI5, RK4
from rnode import Dynamics, Piece, Probes, State

T = torch.tensor(0.2, dtype=torch.float64)


def jacobians(field, z, c):
    """The full Jacobian of each sample, (B, d, d), by autograd: samples do not interact."""
    jacobian = torch.autograd.functional.jacobian(lambda x: field(T, x, c).sum(0), z)
    return jacobian.view(z[0].numel(), len(z), -1).transpose(0, 1)


def test_rates_are_those_of_the_full_jacobian(field_z_c):
    """The divergence and the norm exactly, and the product of each estimate with its own probe."""
    field, z, c = field_z_c
    f, full = field(T, z, c), jacobians(field, z, c)
    exact = Dynamics(field, c, Probes("exact").sample(z))(T, State.initial(z))
    torch.testing.assert_close(exact.z, f)
    torch.testing.assert_close(exact.E, f.flatten(1).norm(dim=1) ** 2)
    eps = Probes("gaussian", 3).sample(z)
    estimates = Dynamics(field, c, eps)(T, State.initial(z))
    tight = {"rtol": 1e-11, "atol": 1e-12}
    for b, J in enumerate(full):
        torch.testing.assert_close(exact.l[b], J.trace(), **tight)
        torch.testing.assert_close(exact.n[b], J.square().sum(), **tight)
        rows = eps[:, b].flatten(1)
        torch.testing.assert_close(estimates.l[b], (rows @ J * rows).sum(), **tight)
        torch.testing.assert_close(estimates.n[b], (rows @ J).square().sum(), **tight)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("count", [1, 4])
def test_estimates_are_unbiased(field_z_c, kind, count):
    field, z, c = field_z_c
    (J,) = jacobians(field, z[:1], c[:1])
    batch = 20000 // count
    z, c = z[:1].expand(batch, *z.shape[1:]), c[:1].expand(batch, -1)
    rates = Dynamics(field, c, Probes(kind, count).sample(z))(T, State.initial(z))
    for estimate, truth in ((rates.l, J.trace()), (rates.n, J.square().sum())):
        error = estimate.std() / len(estimate) ** 0.5
        assert abs(estimate.mean() - truth) < 4 * error
        assert error < 0.05 * J.norm()  # otherwise the line above says nothing


class WithoutVjp(nn.Module):
    """A field of a user's, which has no product of its own."""

    def __init__(self, field):
        super().__init__()
        self.inner = field

    def forward(self, t, z, c):
        return self.inner(t, z, c)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_any_module_is_a_field(field_z_c, gradient):
    """Its solution, all its gradients and their gradients are those of the written-out product."""
    field, z, c = field_z_c
    eps, results = Probes("gaussian", 2).sample(z), []
    for used in (field, WithoutVjp(field)):
        x = z.clone().requires_grad_()
        state = Piece(used)(x, c, eps, RK4, gradient).state
        loss = state.l.sum() + state.E.sum() + state.n.sum() + state.z.square().sum()
        inputs = (x, *field.parameters())
        gradients = torch.autograd.grad(loss, inputs, create_graph=gradient == "backprop")
        results.append([*state, *gradients])
        if gradient == "backprop":
            results[-1] += torch.autograd.grad(gradients[0].square().sum(), inputs)
        with torch.no_grad():
            for method in (RK4, DOPRI5):
                results[-1] += Piece(used)(z, c, eps, method, gradient).state
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


def test_probes_belong_to_their_generators():
    def generators(seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    z = torch.zeros(4, 2, 3, 3)
    together = Probes(count=2).sample(z, generators([5, 6, 7, 8]))
    apart = Probes(count=2).sample(z[:2], generators([7, 5]))
    assert torch.equal(apart, together[:, [2, 0]])
    first, again, other = (Probes().sample(z, one) for one in generators([5, 5, 6]))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert set(Probes("rademacher").sample(z).unique().tolist()) == {-1.0, 1.0}
