import pytest
import torch
from torch import nn

from helpers import DOPRI5, RK4, close
from rnode import Dynamics, InputError, Piece, Probes, Solver, State


def jacobians(field, t, z):
    """The full Jacobian of each sample, (d, d), by autograd."""
    return [
        torch.autograd.functional.jacobian(lambda x: field(t, x[None])[0].flatten(), row).flatten(1)
        for row in z
    ]


def test_exact_divergence_and_norm_are_those_of_the_full_jacobian(field_and_z):
    field, z = field_and_z
    t = torch.tensor(0.2, dtype=torch.float64)
    rates = Dynamics(field, Probes("exact").sample(z))(t, State.initial(z))
    full, f = torch.stack(jacobians(field, t, z)), field(t, z)
    div, squares = full.diagonal(dim1=1, dim2=2).sum(1), full.square().sum((1, 2))
    torch.testing.assert_close(rates.z, f)
    torch.testing.assert_close(rates.l, div, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(rates.E, f.flatten(1).norm(dim=1) ** 2)
    torch.testing.assert_close(rates.n, squares, rtol=1e-11, atol=0)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("count", [1, 4])
def test_estimates_are_unbiased(field_and_z, kind, count):
    field, z = field_and_z
    t = torch.tensor(0.2, dtype=torch.float64)
    z = z[:1].expand(20000 // count, *z.shape[1:])
    rates = Dynamics(field, Probes(kind, count).sample(z))(t, State.initial(z))
    (J,) = jacobians(field, t, z[:1])
    for estimate, truth in ((rates.l, J.trace()), (rates.n, J.square().sum())):
        error = estimate.std() / len(estimate) ** 0.5
        assert abs(estimate.mean() - truth) < 4 * error
        assert error < 0.05 * J.norm()  # otherwise the line above says nothing


def test_each_estimate_is_the_product_with_its_own_probe(field_and_z):
    field, z = field_and_z
    t = torch.tensor(0.9, dtype=torch.float64)
    eps = Probes("gaussian", 3).sample(z)
    rates = Dynamics(field, eps)(t, State.initial(z))
    for b, J in enumerate(jacobians(field, t, z)):
        rows = eps[:, b].flatten(1)
        torch.testing.assert_close(rates.l[b], (rows @ J * rows).sum(), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(rates.n[b], (rows @ J).square().sum(), rtol=1e-11, atol=1e-12)


class Plain(nn.Module):
    """A field of a user's, which has no product of its own."""

    def __init__(self, field):
        super().__init__()
        self.inner = field

    def forward(self, t, z):
        return self.inner(t, z)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_any_module_is_a_field(field_and_z, gradient):
    """Its solution, all its gradients and their gradients are those of the written-out product."""
    field, z = field_and_z
    solver, measured = Solver(RK4, DOPRI5, gradient), []
    eps = Probes("gaussian", 2).sample(z)
    for used in (field, Plain(field)):
        x = z.clone().requires_grad_()
        state = Piece(used)(x, eps, solver.train, gradient).state
        loss = state.l.sum() + state.E.sum() + state.n.sum() + state.z.square().sum()
        inputs = (x, *field.parameters())
        gradients = torch.autograd.grad(loss, inputs, create_graph=gradient == "backprop")
        measured.append([*state, *gradients])
        if gradient == "backprop":
            second = torch.autograd.grad(gradients[0].square().sum(), inputs)
            measured[-1] += second
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():
                    for method in (solver.train, solver.test):
                        measured[-1] += Piece(used)(z, eps, method, gradient).state
    torch.testing.assert_close(*measured, rtol=1e-9, atol=1e-10)


def test_probes_have_the_covariance_they_promise():
    z = torch.zeros(50000, 3, dtype=torch.float64)
    for kind in ("gaussian", "rademacher"):
        eps = Probes(kind, 2).sample(z)
        covariance = sum(vectors.T @ vectors for vectors in eps) / len(z)
        assert close(covariance, torch.eye(3, dtype=torch.float64), 0.03)
    assert set(Probes("rademacher").sample(z).unique().tolist()) == {-1.0, 1.0}


def test_probes_from_generators_do_not_depend_on_the_batch():
    def generators(seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    z = torch.zeros(4, 2, 3, 3)
    together = Probes(count=2).sample(z, generators([5, 6, 7, 8]))
    apart = Probes(count=2).sample(z[:2], generators([7, 5]))
    assert torch.equal(apart, together[:, [2, 0]])


def test_evaluations_are_counted(field_and_z):
    field, z = field_and_z
    dynamics, t = Dynamics(field, Probes().sample(z)), torch.tensor(0.0, dtype=z.dtype)
    for _ in range(3):
        dynamics(t, State.initial(z))
    dynamics.f(t, z)
    assert dynamics.nfe == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hutchinson",), "divergence=hutchinson: must be one of gaussian, rademacher, exact"),
        (("gaussian", 0), "count=0: must be at least 1"),
    ],
)
def test_bad_probes_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Probes(*arguments)
