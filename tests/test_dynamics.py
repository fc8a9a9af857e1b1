import pytest
import torch

from conftest import close
from rnode import Dynamics, InputError, Probes, State


def jacobians(field, t, z):
    return [torch.autograd.functional.jacobian(lambda x: field(t, x[None])[0].flatten(), row).flatten(1) for row in z]


def test_exact_divergence_and_norm_are_those_of_the_full_jacobian(field_and_z):
    field, z = field_and_z
    t = torch.tensor(0.2, dtype=torch.float64)
    rhs = Dynamics(field, Probes("exact").draw(z))(t, State.initial(z))
    full = jacobians(field, t, z)
    f = field(t, z)
    torch.testing.assert_close(rhs.z, f)
    torch.testing.assert_close(rhs.l, torch.stack([J.trace() for J in full]), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(rhs.E, f.flatten(1).norm(dim=1) ** 2)
    torch.testing.assert_close(rhs.n, torch.stack([torch.linalg.matrix_norm(J) ** 2 for J in full]), rtol=1e-11, atol=0)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("count", [1, 4])
def test_estimates_are_unbiased_two_sided(field_and_z, kind, count):
    field, z = field_and_z
    t = torch.tensor(0.2, dtype=torch.float64)
    z = z[:1].expand(20000 // count, *z.shape[1:])
    rhs = Dynamics(field, Probes(kind, count).draw(z))(t, State.initial(z))
    (J,) = jacobians(field, t, z[:1])
    for estimate, truth in ((rhs.l, J.trace()), (rhs.n, torch.linalg.matrix_norm(J) ** 2)):
        error = estimate.std() / len(estimate) ** 0.5
        assert abs(estimate.mean() - truth) < 4 * error
        assert error < 0.05 * torch.linalg.matrix_norm(J)  # or the line above says nothing


def test_each_estimate_is_the_product_with_its_own_probe(field_and_z):
    field, z = field_and_z
    t = torch.tensor(0.9, dtype=torch.float64)
    eps = Probes("gaussian", 3).draw(z)
    rhs = Dynamics(field, eps)(t, State.initial(z))
    for b, J in enumerate(jacobians(field, t, z)):
        rows = eps[:, b].flatten(1)
        torch.testing.assert_close(rhs.l[b], (rows @ J * rows).sum(), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(rhs.n[b], (rows @ J).square().sum(), rtol=1e-11, atol=1e-12)


def test_probes_have_the_covariance_they_promise():
    z = torch.zeros(50000, 3, dtype=torch.float64)
    for kind in ("gaussian", "rademacher"):
        eps = Probes(kind, 2).draw(z)
        covariance = sum(eps[k].T @ eps[k] for k in range(2)) / len(z)
        assert close(covariance, torch.eye(3, dtype=torch.float64), 0.03)
    assert set(Probes("rademacher").draw(z).unique().tolist()) == {-1.0, 1.0}


def test_probes_from_generators_do_not_depend_on_the_batch():
    def generators(seeds):
        return [torch.Generator().manual_seed(s) for s in seeds]

    z = torch.zeros(4, 2, 3, 3)
    together = Probes().draw(z, generators([5, 6, 7, 8]))
    apart = Probes().draw(z[:2], generators([7, 5]))
    torch.testing.assert_close(apart, together[:, [2, 0]], rtol=0, atol=0)


def test_evaluations_are_counted(field_and_z):
    field, z = field_and_z
    dynamics = Dynamics(field, Probes().draw(z))
    for _ in range(3):
        dynamics(torch.tensor(0.0, dtype=z.dtype), State.initial(z))
    assert dynamics.nfe == 3


@pytest.mark.parametrize("arguments", [("hutchinson",), ("gaussian", 0), ("gaussian", 1.5)])
def test_bad_probes_are_refused(arguments):
    with pytest.raises(InputError, match=str(arguments[-1])):
        Probes(*arguments)
