import dataclasses
import itertools

import numpy as np
import pytest
import torch

from conftest import DOPRI5, RK4, Linear, close
from rnode import DivergenceError, Dynamics, InputError, Method, Piece, Probes, Solver, State
from rnode.solver import ADAPTIVE, FIXED_GRID, error_norm, solve, solve_back

A = torch.tensor([[-0.3, 0.8, 0.1], [-0.5, 0.2, 0.4], [0.3, -0.2, 0.5]], dtype=torch.float64)


def linear_truth(z):
    """z(1) = e^A z, l = tr A, n = ‖A‖² and E = ∫₀¹ ‖A e^{At} z‖² dt (by a fine quadrature)."""
    t, w = map(torch.from_numpy, np.polynomial.legendre.leggauss(20))
    t, w = (t + 1) / 2, w / 2
    speed = torch.stack([z @ torch.matrix_exp(A * s).T @ A.T for s in t])  # (20, B, 3)
    E = (w[:, None] * speed.square().sum(2)).sum(0)
    ones = torch.ones(len(z), dtype=z.dtype)
    return State(z @ torch.matrix_exp(A).T, A.trace() * ones, E, A.square().sum() * ones)


@pytest.mark.parametrize("gradient", ["backprop", "adjoint", "checkpoint"])
@pytest.mark.parametrize(
    ("method", "tolerance"), [(Method("rk4", step_size=0.05), 1e-6), (Method("dopri5", rtol=1e-8, atol=1e-8), 1e-7)]
)
def test_linear_field_in_closed_form(method, tolerance, gradient):
    z = torch.randn(5, 3, dtype=torch.float64)
    state = Piece(Linear(A))(z, Probes("exact").draw(z), method, gradient)
    for name, value, truth in zip(State._fields, state, linear_truth(z), strict=True):
        torch.testing.assert_close(value, truth, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", FIXED_GRID + ADAPTIVE)
def test_every_method_solves_and_inverts(name):
    z = torch.randn(5, 3, dtype=torch.float64)
    method = Method(name, step_size=1 / 32)
    state = Piece(Linear(A))(z, Probes("exact").draw(z), method, "backprop")
    assert close(state.z, linear_truth(z).z, 0.03)
    assert close(solve_back(Linear(A), state.z, method)[-1], z, 0.05)


@pytest.mark.parametrize("step", [1.0, 0.5, 0.25, 0.1])
def test_rk4_takes_four_evaluations_a_step(step):
    z = torch.randn(5, 3, dtype=torch.float64)
    piece = Piece(Linear(A))
    piece(z, Probes().draw(z), Method("rk4", step_size=step), "backprop")
    assert piece.nfe_forward == round(4 / step)
    assert piece.nfe_backward == 0


def test_nfe_is_16_a_piece_and_backward_is_counted_apart():
    z = torch.randn(5, 3, dtype=torch.float64)
    for gradient, backward in (("backprop", 0), ("checkpoint", 16), ("adjoint", 16)):
        piece = Piece(Linear(A.clone()))
        piece(z, Probes().draw(z), RK4, gradient).z.sum().backward()
        assert (piece.nfe_forward, piece.nfe_backward) == (16, backward), gradient


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
@pytest.mark.parametrize("integrals", ["simpson", "radau"])
def test_quadratures_in_closed_form_are_of_fourth_order(integrals, gradient):
    """The error against the linear field's closed form falls by 2⁴ when the step is halved, and starts small."""
    z = torch.randn(5, 3, dtype=torch.float64)
    truth = linear_truth(z)
    errors = []
    for step in (1 / 4, 1 / 8, 1 / 16):
        method = Method("rk4", integrals, step_size=step)
        state = Piece(Linear(A))(z, Probes("exact").draw(z), method, gradient)
        torch.testing.assert_close(state.l, truth.l)  # constant rates: any quadrature is exact
        torch.testing.assert_close(state.n, truth.n)
        errors.append(torch.stack([(state.z - truth.z).norm(), (state.E - truth.E).norm()]))
    assert (errors[0] < 1e-3).all()
    for coarse, fine in itertools.pairwise(errors):
        assert ((coarse / fine > 11) & (coarse / fine < 24)).all()


@pytest.mark.parametrize("integrals", ["simpson", "radau"])
def test_quadratures_converge_to_the_system_with_its_gradient(field_and_z, integrals):
    fine = parameter_gradients(field_and_z, Method("rk4", step_size=1 / 64), "backprop")
    for gradient in ("backprop", "checkpoint"):
        quarter, eighth = (
            parameter_gradients(field_and_z, Method("rk4", integrals, step_size=s), gradient) for s in (1 / 4, 1 / 8)
        )
        assert close(quarter, fine, 2e-3)
        assert close(eighth, fine, 2e-4)
        assert not close(eighth, fine, 1e-12)


@pytest.mark.parametrize(
    ("method", "nfe", "products"),
    [
        (Method("rk4"), 16, 16),
        (Method("rk4", "simpson"), 17, 5),  # one product a step, and an evaluation with one at T
        (Method("rk4", "radau"), 16, 4),  # one a step
        (Method("rk4", "radau", step_size=1 / 3), 12, 3),
        (Method("rk4", "radau", step_size=1), 4, 1),
    ],
)
def test_products_and_evaluations(field_and_z, method, nfe, products):
    field, z = field_and_z
    taken = []
    vjp = field.vjp
    field.vjp = lambda *arguments: taken.append(1) or vjp(*arguments)
    piece = Piece(field)
    piece(z, Probes().draw(z), method, "backprop")
    assert (piece.nfe_forward, len(taken)) == (nfe, products)


def parameter_gradients(field_and_z, method, gradient):
    field, z = field_and_z
    field.zero_grad()
    z = z.clone().requires_grad_()
    torch.manual_seed(1)
    state = Piece(field)(z, Probes().draw(z), method, gradient)
    (state.z.square().sum() + state.l.sum() + 0.1 * state.E.sum() + 0.2 * state.n.sum()).backward()
    return torch.cat([p.grad.flatten() for p in field.parameters()] + [z.grad.flatten()])


def test_checkpoint_gives_the_gradient_of_backprop(field_and_z):
    for method in (RK4, DOPRI5, Method("rk4", "simpson"), Method("rk4", "radau")):
        backprop, again = (parameter_gradients(field_and_z, method, g) for g in ("backprop", "checkpoint"))
        torch.testing.assert_close(again, backprop, rtol=0, atol=0)


def test_adjoint_gives_the_gradient_of_backprop_in_the_limit(field_and_z):
    coarse, fine = (Method("rk4", step_size=s) for s in (0.25, 1 / 64))
    exact = parameter_gradients(field_and_z, fine, "backprop")
    assert close(parameter_gradients(field_and_z, fine, "adjoint"), exact, 1e-8)
    assert close(parameter_gradients(field_and_z, coarse, "adjoint"), exact, 1e-2)
    tight = Method("dopri5", rtol=1e-9, atol=1e-9)
    assert close(parameter_gradients(field_and_z, tight, "adjoint"), exact, 1e-7)


class Loud(Linear):
    """A field whose products, and with them n, are enormous, while l stays 0."""

    def vjp(self, t, z, eps):
        turn = torch.stack([-eps[..., 1], eps[..., 0], 0 * eps[..., 2]], dim=-1)
        return self(t, z), 1e4 * (1 + torch.sin(40 * t)) * turn


def test_the_error_is_controlled_by_z_and_l_alone():
    z = torch.randn(5, 3, dtype=torch.float64)
    state = State(z, z[:, 0], z[:, 1], z[:, 2])
    assert error_norm(state) == error_norm(state._replace(E=1e6 * state.E, n=1e6 * state.n))
    assert error_norm(state) < error_norm(state._replace(l=1e6 * state.l))
    nfe = []
    for field in (Linear(A), Loud(A)):
        piece = Piece(field)
        piece(z, Probes().draw(z), DOPRI5, "backprop")
        nfe.append(piece.nfe_forward)
    assert nfe[0] == nfe[1]


def test_a_state_that_blows_up_is_a_divergence_error():
    class Explodes(Linear):
        def vjp(self, t, z, eps):
            return z**3, eps

    z = 10 * torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(DivergenceError, match="underflow|finite"):
        Piece(Explodes(A))(z, Probes().draw(z), DOPRI5, "backprop")


def test_other_assertions_are_not_taken_for_divergence():
    class Broken(Linear):
        def vjp(self, t, z, eps):
            raise AssertionError("a bug")

    z = torch.randn(2, 3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="a bug"):
        Piece(Broken(A))(z, Probes().draw(z), DOPRI5, "backprop")


def test_bfloat16_stays_inside_f_and_out_of_adaptive_methods(field_and_z):
    field, z = field_and_z
    field, z = field.float(), z.float()
    eps = Probes().draw(z)
    results = {}
    for method in (RK4, DOPRI5):
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                state = Piece(field)(z, eps, method, "backprop")
            assert all(x.dtype == torch.float32 for x in state)
            results[method.method, autocast] = state
    assert close(results["rk4", True].z, results["rk4", False].z, 2e-2)
    assert not torch.equal(results["rk4", True].z, results["rk4", False].z)
    assert torch.equal(results["dopri5", True].z, results["dopri5", False].z)


def test_the_adjoint_and_checkpoint_enter_autocast_again_in_the_backward_pass(field_and_z):
    field, z = field_and_z
    field, z = field.float(), z.float()
    seen = []
    field.layers[0].register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    for gradient in ("adjoint", "checkpoint"):
        with torch.autocast("cpu", torch.bfloat16):
            state = Piece(field)(z, Probes().draw(z), RK4, gradient)
        seen.clear()
        state.z.sum().backward()
        assert seen, gradient
        assert all(seen), gradient


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "rk5"},
        {"method": "rk4", "step_size": 0.3},
        {"method": "rk4", "step_size": 0},
        {"method": "rk4", "step_size": -0.25},
        {"method": "rk4", "step_size": "small"},
        {"method": "rk4", "integrals": "trapezoid"},
        {"method": "dopri5", "rtol": 0},
        {"method": "dopri5", "atol": -1e-5},
        {"method": "dopri5", "first_step": float("nan")},
    ],
)
def test_bad_methods_are_refused(wrong):
    key = list(wrong)[-1]
    with pytest.raises(InputError, match=f"{key}={wrong[key]}: must be"):
        Method(**wrong)


@pytest.mark.parametrize("wrong", [{"gradient": "forward"}, {"dtype": "bfloat16"}])
def test_bad_solvers_are_refused(wrong):
    ((key, value),) = wrong.items()
    with pytest.raises(InputError, match=f"solver.{key}={value}: must be"):
        Solver(RK4, DOPRI5, **wrong)


@pytest.mark.parametrize(
    ("method", "gradient", "nfe"),
    [
        (Method("rk4", "simpson"), "adjoint", 16),
        (Method("rk4", "radau", step_size=1 / 3), "adjoint", 12),
        (Method("rk4", "simpson", step_size=0.2), "backprop", 20),
        (Method("explicit_adams", "simpson"), "backprop", None),
        (Method("dopri5", "simpson"), "backprop", None),
        (Method("explicit_adams", "radau"), "backprop", None),
    ],
)
def test_where_a_quadrature_does_not_apply_the_system_is_solved(field_and_z, method, gradient, nfe):
    field, z = field_and_z
    eps = Probes().draw(z)
    system = dataclasses.replace(method, integrals="system")
    piece, reference = Piece(field), Piece(field)
    for ours, expected in zip(piece(z, eps, method, gradient), reference(z, eps, system, gradient), strict=True):
        assert torch.equal(ours, expected)
    assert piece.nfe_forward == reference.nfe_forward
    assert nfe in (None, piece.nfe_forward)


def test_solving_from_plain_functions():
    z = torch.randn(4, 3, dtype=torch.float64)
    state = solve(Dynamics(Linear(A), Probes("exact").draw(z)), z, RK4, "backprop", ())
    assert close(state.z, linear_truth(z).z, 1e-3)
