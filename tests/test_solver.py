import itertools

import numpy as np
import pytest
import torch
from torchdiffeq import odeint

from helpers import DOPRI5, RK4, Linear, close, no_c
from rnode import Dynamics, InputError, Method, Piece, Probes, Solver, State
from rnode.names import ADAPTIVE, FIXED_GRID
from rnode.runge_kutta import TABLEAUS
from rnode.solver import error_norm, integrate

A = torch.tensor([[-0.3, 0.8, 0.1], [-0.5, 0.2, 0.4], [0.3, -0.2, 0.5]], dtype=torch.float64)
SIMPSON, RADAU = (Method("rk4", integrals, steps=4) for integrals in ("simpson", "radau"))
FINE = Method("rk4", steps=64)


def linear_truth(z):
    """z(1) = e^A z, l = tr A, n = ‖A‖² and E = ∫₀¹ ‖A e^{At} z‖² dt (by a fine quadrature)."""
    t, w = map(torch.from_numpy, np.polynomial.legendre.leggauss(20))
    t, w = (t + 1) / 2, w / 2
    speed = torch.stack([z @ torch.matrix_exp(A * s).T @ A.T for s in t])  # (20, B, 3)
    E = (w[:, None] * speed.square().sum(2)).sum(0)
    ones = torch.ones(len(z), dtype=z.dtype)
    return State(z @ torch.matrix_exp(A).T, A.trace() * ones, E, A.square().sum() * ones)


@pytest.fixture
def z():
    return torch.randn(5, 3, dtype=torch.float64)


def solve_linear(z, method, gradient="backprop"):
    eps = Probes("exact").sample(z)
    return Piece(Linear(A.clone()))(z, no_c(z), eps, method, gradient)


@pytest.mark.parametrize("gradient", ["backprop", "adjoint", "checkpoint"])
@pytest.mark.parametrize(
    ("method", "tolerance"),
    [(Method("rk4", steps=20), 1e-6), (Method("dopri5", rtol=1e-8, atol=1e-8), 1e-7)],
)
def test_linear_field_in_closed_form(z, method, tolerance, gradient):
    solution = solve_linear(z, method, gradient)
    assert torch.equal(solution.start, z)
    for name, value, truth in zip(State._fields, solution.state, linear_truth(z), strict=True):
        torch.testing.assert_close(value, truth, rtol=tolerance, atol=tolerance, msg=name)
    displacement = (linear_truth(z).z - z).square().sum(1)
    torch.testing.assert_close(solution.displacement, displacement, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FIXED_GRID + ADAPTIVE)
def test_every_method_solves_and_inverts(z, name):
    method = Method(name, steps=32)
    state = solve_linear(z, method).state
    assert close(state.z, linear_truth(z).z, 0.03)
    assert close(Piece(Linear(A)).inverse(state.z, no_c(z), method)[0][-1], z, 0.05)


@pytest.mark.parametrize("name", TABLEAUS)
def test_the_methods_on_a_fixed_grid_are_those_of_torchdiffeq(field_z_c, name):
    """Results and gradients of three steps, to rounding."""
    field, z, c = field_z_c
    method = Method(name, steps=3)
    dynamics = Dynamics(field, c, Probes().sample(z))
    t = torch.tensor([0.0, 1.0], dtype=z.dtype)
    options = method.odeint_options(error_norm, z.dtype)
    paths = odeint(lambda t, y: dynamics(t, State(*y)), State.initial(z), t, **options)
    results = []
    for state in (integrate(dynamics, z, method, "backprop"), [path[-1] for path in paths]):
        gradients = torch.autograd.grad(sum(part.sum() for part in state), field.parameters())
        results.append([*state, *gradients])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert set(FIXED_GRID) == set(TABLEAUS)


@pytest.mark.slow(reason="torch.compile takes half a minute")
@pytest.mark.parametrize("integrals", ["system", "simpson", "radau"])
def test_a_solve_on_a_fixed_grid_is_one_graph(field_z_c, integrals):
    field, z, c = field_z_c
    eps, method = Probes().sample(z), Method("rk4", integrals, steps=4)

    def run(z):
        return tuple(integrate(Dynamics(field, c, eps), z, method, "backprop"))

    for ours, expected in zip(torch.compile(run, fullgraph=True)(z), run(z), strict=True):
        torch.testing.assert_close(ours, expected)


def test_the_inverse_counts_its_evaluations_and_stops_at_equal_intervals(z):
    for intervals, nfe in ((4, 16), (3, 24)):  # the grid has whole steps in each interval
        path, evaluations = Piece(Linear(A)).inverse(z, no_c(z), RK4, intervals)
        assert evaluations == nfe
        times = torch.arange(intervals + 1) / intervals
        expected = torch.stack([z @ torch.matrix_exp(-A * t).T for t in times])
        assert close(path, expected, 1e-4)


def test_evaluations_backward_are_counted_apart(z):
    for gradient, backward in (("backprop", 0), ("checkpoint", 16), ("adjoint", 16)):
        solution = solve_linear(z, RK4, gradient)
        assert (solution.nfe_forward, solution.nfe_backward) == (16, 0), gradient
        solution.state.z.sum().backward()
        assert (solution.nfe_forward, solution.nfe_backward) == (16, backward), gradient


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
@pytest.mark.parametrize("integrals", ["simpson", "radau"])
def test_quadratures_in_closed_form_are_of_fourth_order(z, integrals, gradient):
    """The error against the closed form falls by 2⁴ when the step is halved."""
    truth, errors = linear_truth(z), []
    for steps in (4, 8, 16):
        state = solve_linear(z, Method("rk4", integrals, steps=steps), gradient).state
        torch.testing.assert_close(state.l, truth.l)  # any quadrature is exact for constant rates
        torch.testing.assert_close(state.n, truth.n)
        errors.append(torch.stack([(state.z - truth.z).norm(), (state.E - truth.E).norm()]))
    assert (errors[0] < 1e-3).all()
    for coarse, fine in itertools.pairwise(errors):
        assert ((coarse / fine > 11) & (coarse / fine < 24)).all()


def gradients(field_z_c, method, gradient):
    """The gradient, with respect to the weights and z(0), of a function of all four results."""
    field, z, c = field_z_c
    field.zero_grad()
    z = z.clone().requires_grad_()
    torch.manual_seed(1)
    state = Piece(field)(z, c, Probes().sample(z), method, gradient).state
    integrals = state.l.sum() + 0.1 * state.E.sum() + 0.2 * state.n.sum()
    (state.z.square().sum() + integrals).backward()
    return torch.cat([p.grad.flatten() for p in field.parameters()] + [z.grad.flatten()])


@pytest.mark.parametrize("integrals", ["simpson", "radau"])
def test_quadratures_converge_to_the_system_with_its_gradient(field_z_c, integrals):
    fine = gradients(field_z_c, FINE, "backprop")
    quarter, eighth = (
        gradients(field_z_c, Method("rk4", integrals, steps=steps), "backprop") for steps in (4, 8)
    )
    assert close(quarter, fine, 2e-3)
    assert close(eighth, fine, 2e-4)
    assert not close(eighth, fine, 1e-12)


def test_checkpoint_computes_the_gradient_of_backprop(field_z_c):
    for method in (RK4, DOPRI5, SIMPSON, RADAU):
        backprop = gradients(field_z_c, method, "backprop")
        checkpoint = gradients(field_z_c, method, "checkpoint")
        torch.testing.assert_close(checkpoint, backprop, rtol=0, atol=0)


def test_adjoint_computes_the_gradient_of_backprop_in_the_limit(field_z_c):
    exact = gradients(field_z_c, FINE, "backprop")
    adaptive = Method("dopri5", rtol=1e-9, atol=1e-9)
    for method, tolerance in ((FINE, 1e-8), (RK4, 1e-2), (adaptive, 1e-7)):
        assert close(gradients(field_z_c, method, "adjoint"), exact, tolerance)


@pytest.mark.parametrize(
    ("method", "nfe", "products"),
    [
        (RK4, 16, 16),
        (SIMPSON, 17, 5),  # one product a step, and one evaluation with a product at T
        (RADAU, 16, 4),  # one product a step
        (Method("rk4", "radau", steps=3), 12, 3),
    ],
)
def test_evaluations_and_products(field_z_c, method, nfe, products):
    field, z, c = field_z_c
    calls, vjp = [], field.vjp
    field.vjp = lambda *arguments, **weights: calls.append(1) or vjp(*arguments, **weights)
    solution = Piece(field)(z, c, Probes().sample(z), method, "backprop")
    assert (solution.nfe_forward, len(calls)) == (nfe, products)


class Loud(Linear):
    """A field with enormous products and with them an enormous n, while l stays 0."""

    def vjp(self, t, z, eps, c):
        turn = torch.stack([-eps[..., 1], eps[..., 0], 0 * eps[..., 2]], dim=-1)
        return self(t, z, c), 1e4 * (1 + torch.sin(40 * t)) * turn


def test_the_error_is_controlled_by_z_and_l_alone(z):
    state = State(z, z[:, 0], z[:, 1], z[:, 2])
    assert error_norm(state) == error_norm(state._replace(E=1e6 * state.E, n=1e6 * state.n))
    assert error_norm(state) < error_norm(state._replace(l=1e6 * state.l))
    eps = Probes().sample(z)
    quiet, loud = (Piece(f)(z, no_c(z), eps, DOPRI5, "backprop") for f in (Linear(A), Loud(A)))
    assert quiet.nfe_forward == loud.nfe_forward


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Method("rk5"), "method=rk5: must be one of euler, "),
        (lambda: Method("rk4", "trapezoid"), "integrals=trapezoid: must be"),
        (lambda: Method("rk4", steps=0), "steps=0: must be at least 1"),
        (lambda: Method("rk4", "simpson", steps=5), "steps=5: must be even"),
        (lambda: Method("dopri5", "radau"), "integrals=radau: needs a method of euler, "),
        (lambda: Solver(RK4, DOPRI5, gradient="forward"), "gradient=forward: must be"),
        (lambda: Solver(RK4, DOPRI5, dtype="bfloat16"), "dtype=bfloat16: must be"),
        (lambda: Solver(RADAU, DOPRI5, "adjoint"), "needs integrals=system.*gradient=checkpoint"),
    ],
)
def test_bad_methods_and_solvers_are_refused(build, message):
    with pytest.raises(InputError, match=message):
        build()
