import itertools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchdiffeq import odeint

from helpers import DOPRI5, RK4, TIGHT, Linear, close, make_flow, no_c
from rnode import Dynamics, InputError, Method, Piece, Probes, Solver, State, log_normal, objective
from rnode.names import ADAPTIVE_METHODS, FIXED_GRID
from rnode.runge_kutta import TABLEAUS
from rnode.solver import integrate

A = torch.tensor([[-0.3, 0.8, 0.1], [-0.5, 0.2, 0.4], [0.3, -0.2, 0.5]], dtype=torch.float64)
SIMPSON, RADAU = (Method("rk4", integrals, steps=4) for integrals in ("simpson", "radau"))
SIMPSON_8, RADAU_8 = (Method("rk4", integrals, steps=8) for integrals in ("simpson", "radau"))
FINE = Method("rk4", steps=64)
FIXED = [RK4, SIMPSON, RADAU]


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
@pytest.mark.parametrize(("method", "tolerance"), [(Method("rk4", steps=20), 1e-6), (TIGHT, 1e-7)])
def test_linear_field_in_closed_form(z, method, tolerance, gradient):
    solution = solve_linear(z, method, gradient)
    truth = linear_truth(z)
    torch.testing.assert_close(solution.state, truth, rtol=tolerance, atol=tolerance)
    displacement = (truth.z - z).square().sum(1)
    torch.testing.assert_close(solution.displacement, displacement, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FIXED_GRID + ADAPTIVE_METHODS)
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
    options = method.odeint_options(z.dtype)
    paths = odeint(lambda t, y: dynamics(t, State(*y)), State.initial(z), t, **options)
    results = []
    for state in (integrate(dynamics, z, method, "backprop"), [path[-1] for path in paths]):
        gradients = torch.autograd.grad(sum(part.sum() for part in state), field.parameters())
        results.append([*state, *gradients])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    assert set(FIXED_GRID) == set(TABLEAUS)


@pytest.mark.slow(reason="torch.compile takes half a minute")
@pytest.mark.parametrize("integrals", ["system", "simpson", "radau"])
def test_a_solve_on_a_fixed_grid_is_one_graph(field_z_c, integrals):
    field, z, c = field_z_c
    eps, method = Probes().sample(z), Method("rk4", integrals, steps=4)

    def run(z):
        return tuple(integrate(Dynamics(field, c, eps), z, method, "backprop"))

    torch.testing.assert_close(torch.compile(run, fullgraph=True)(z), run(z))


def test_the_inverse_counts_its_evaluations_and_stops_at_equal_intervals(z):
    for intervals, nfe in ((4, 16), (3, 24)):  # the grid has whole steps in each interval
        path, evaluations = Piece(Linear(A)).inverse(z, no_c(z), RK4, intervals)
        assert evaluations == nfe
        times = torch.arange(intervals + 1) / intervals
        expected = torch.stack([z @ torch.matrix_exp(-A * t).T for t in times])
        assert close(path, expected, 1e-4)


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
    z = z.clone().requires_grad_()
    torch.manual_seed(1)
    state = Piece(field)(z, c, Probes().sample(z), method, gradient).state
    integrals = state.l.sum() + 0.1 * state.E.sum() + 0.2 * state.n.sum()
    total = state.z.square().sum() + integrals
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, [z, *field.parameters()])])


def test_all_methods_and_gradients_agree(field_z_c):
    """Checkpoint equals backprop; the adjoint and quadratures converge to the system's gradient."""
    fine = gradients(field_z_c, FINE, "backprop")
    assert close(gradients(field_z_c, FINE, "adjoint"), fine, 1e-8)
    for method, tolerance in ((SIMPSON, 2e-3), (RADAU, 2e-3), (SIMPSON_8, 2e-4), (RADAU_8, 2e-4)):
        coarse = gradients(field_z_c, method, "backprop")
        assert close(coarse, fine, tolerance)
        assert not close(coarse, fine, 1e-12)
    for method in (RK4, DOPRI5, SIMPSON, RADAU):
        backprop = gradients(field_z_c, method, "backprop")
        checkpoint = gradients(field_z_c, method, "checkpoint")
        torch.testing.assert_close(checkpoint, backprop, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("method", "gradient", "nfe", "products", "backward"),
    [
        (RK4, "backprop", 16, 16, 0),
        (RK4, "checkpoint", 16, 16, 16),
        (RK4, "adjoint", 16, 16, 16),
        (SIMPSON, "backprop", 17, 5, 0),  # one product a step, and an evaluation with one at T
        (RADAU, "backprop", 16, 4, 0),  # one product a step
        (Method("rk4", "radau", steps=3), "checkpoint", 12, 3, 12),
    ],
)
def test_evaluations_and_products(field_z_c, method, gradient, nfe, products, backward):
    field, z, c = field_z_c
    calls, vjp = [], field.vjp
    field.vjp = lambda *arguments, **weights: calls.append(1) or vjp(*arguments, **weights)
    solution = Piece(field)(z, c, Probes().sample(z), method, gradient)
    assert (solution.nfe_forward, len(calls), solution.nfe_backward) == (nfe, products, 0)
    solution.state.z.sum().backward()
    assert (solution.nfe_forward, solution.nfe_backward) == (nfe, backward)


class Loud(Linear):
    """A field with enormous products and with them an enormous n, while l stays 0."""

    def vjp(self, t, z, eps, c):
        turn = torch.stack([-eps[..., 1], eps[..., 0], 0 * eps[..., 2]], dim=-1)
        return self(t, z, c), 1e4 * (1 + torch.sin(40 * t)) * turn


def test_the_error_is_controlled_by_z_and_l_alone(z):
    eps = Probes().sample(z)
    quiet, loud = (Piece(f)(z, no_c(z), eps, DOPRI5, "backprop") for f in (Linear(A), Loud(A)))
    assert quiet.nfe_forward == loud.nfe_forward


@pytest.mark.parametrize("norm", ["rows", "batch"])
def test_a_rare_row_has_the_same_result_alone_and_among_many(norm):
    """The mean over a batch hides its error: only norm=rows bounds that of each row."""
    stiff = Linear(torch.diag(torch.tensor([-40.0, 0.5], dtype=torch.float64)))
    rare = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    common = torch.cat([rare, 1e-3 * torch.randn(2000, 2, dtype=torch.float64)])
    method = Method("dopri5", rtol=1e-4, atol=1e-4, norm=norm)
    alone, among = (
        Piece(stiff)(z, no_c(z), Probes("exact").sample(z), method, "backprop").state.z[0]
        for z in (rare, common)
    )
    same = (alone - among).abs().max() < 1e-4
    assert bool(same) == (norm == "rows")


def score(flow, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(flow.log_prob(x).sum(), x)[0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
@pytest.mark.parametrize("method", [*FIXED, TIGHT], ids=["system", "simpson", "radau", "dopri5"])
def test_second_derivatives(method, gradient, training):
    options = {"train": method, "test": method, "gradient": gradient, "divergence": "exact"}
    flow = make_flow((2,), **options).train(training)
    x = torch.randn(2, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(flow.log_prob, x)
    steps = 1e-5 * torch.eye(2, dtype=torch.float64)
    differences = torch.stack([score(flow, x + s) - score(flow, x - s) for s in steps], dim=1)
    torch.testing.assert_close(hessian, differences / 2e-5, rtol=1e-5, atol=1e-6)


def test_the_adjoint_refuses_second_derivatives():
    flow = make_flow((2,), gradient="adjoint", divergence="exact")
    x = torch.randn(2, dtype=torch.float64)
    with pytest.raises(InputError, match="gradient=adjoint has no second derivatives"):
        torch.autograd.functional.hessian(flow.log_prob, x)


@pytest.mark.parametrize("method", FIXED, ids=["system", "simpson", "radau"])
def test_torch_func_transforms_a_dense_flow_with_a_fixed_grid(method):
    flow = make_flow((3,), train=method, test=method, divergence="exact")
    x = torch.randn(4, 3, dtype=torch.float64)
    same = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(torch.func.vmap(flow.log_prob)(x), flow.log_prob(x), **same)
    gradient = torch.func.vmap(torch.func.grad(flow.log_prob))
    torch.testing.assert_close(gradient(x), score(flow, x), **same)
    hessian = torch.func.hessian(flow.log_prob)(x[0])
    reference = torch.autograd.functional.hessian(flow.log_prob, x[0])
    torch.testing.assert_close(hessian, reference, **same)

    def likelihood(parameters):
        state = torch.func.functional_call(flow, parameters, (x,))
        return (log_normal(state.z) + state.l).sum()

    parameters = dict(flow.named_parameters())
    expected = torch.autograd.grad(flow.log_prob(x).sum(), parameters.values())
    found = torch.func.grad(likelihood)(parameters)
    torch.testing.assert_close(tuple(found.values()), expected, **same)
    z = torch.randn(4, 1, 3, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(flow.inverse)(z)[:, 0], flow.inverse(z[:, 0]))


def test_bfloat16_stays_inside_f_and_out_of_adaptive_methods(field_z_c):
    """The backward pass of checkpoint and of the adjoint enters autocast again."""
    field, z, c = (part.float() for part in field_z_c)
    eps, results, enabled = Probes().sample(z), {}, []
    field.layers[0].register_forward_hook(
        lambda *_: enabled.append(torch.is_autocast_enabled("cpu"))
    )
    for method, autocast in itertools.product((RK4, DOPRI5), (False, True)):
        for gradient in ("checkpoint", "adjoint"):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                state = Piece(field)(z, c, eps, method, gradient).state
            assert all(part.dtype == torch.float32 for part in state)
            results[method.method, autocast] = state.z
            enabled.clear()
            state.z.sum().backward()
            assert set(enabled) == {autocast and method is RK4}
    assert close(results["rk4", True], results["rk4", False], 2e-2)
    assert not torch.equal(results["rk4", True], results["rk4", False])
    assert torch.equal(results["dopri5", True], results["dopri5", False])


class Float64(TorchDispatchMode):
    """Counts the results of operators that are float64."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves(result)
        self.count += any(getattr(leaf, "dtype", None) == torch.float64 for leaf in leaves)
        return result


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize("name", ["rk4", "dopri5"])
def test_a_float32_flow_makes_nothing_float64(name, gradient):
    """Some accelerators do not have float64."""
    method = Method(name)
    flow = make_flow((1, 8, 8), train=method, test=method, gradient=gradient, pieces=1).float()
    x = torch.randn(2, 1, 8, 8)
    with Float64() as watch:
        objective(flow(x), 0.1, 0.1).backward()
        flow.eval()
        flow.log_prob(x)
        flow.trajectory(torch.randn(2, flow.d), intervals=2)
    assert watch.count == 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Method("rk5"), "method=rk5: must be one of euler, "),
        (lambda: Method("rk4", steps=0), "steps=0: must be at least 1"),
        (lambda: Method("rk4", "simpson", steps=5), "steps=5: must be even"),
        (lambda: Method("dopri5", "radau"), "integrals=radau: needs a method of euler, "),
        (lambda: Solver(RK4, DOPRI5, gradient="forward"), "gradient=forward: must be"),
        (lambda: Solver(RK4, DOPRI5, dtype="bfloat16"), "dtype=bfloat16: must be"),
        (lambda: Probes("hutch"), "divergence=hutch: must be one of gaussian, rademacher"),
        (lambda: Solver(RADAU, DOPRI5, "adjoint"), "needs integrals=system.*gradient=checkpoint"),
    ],
)
def test_arguments_out_of_range_are_refused(build, message):
    with pytest.raises(InputError, match=message):
        build()
