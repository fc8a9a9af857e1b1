"""The exact divergence of dense fields with two hidden layers."""

import pytest
import torch

from helpers import make_flow, randomize
from rnode import Dynamics, Field, Method, Probes, State, TimeLinear

T = torch.tensor(0.7, dtype=torch.float64)


@pytest.fixture(params=[0, 2], ids=["k=0", "k=2"])
def field_z_c(request):
    field = randomize(Field(TimeLinear, [5, 7, 6, 5], request.param)).double()
    return field, torch.randn(4, 5).double(), torch.randn(4, request.param).double()


def unit(z):
    return Probes("exact").sample(z)


def divergence(field, z, c):
    return field.vjp_and_divergence(T, z, z.new_empty(0, *z.shape), c)[2]


def test_it_is_the_trace_of_autograds_jacobian(field_z_c):
    field, z, c = field_z_c
    eps = torch.randn(2, *z.shape, dtype=torch.float64)
    f, eps_jac, div = field.vjp_and_divergence(T, z, eps, c)
    traces = [
        torch.func.jacrev(lambda x, i=i: field(T, x[None], c[i, None])[0])(z[i]).trace()
        for i in range(len(z))
    ]
    torch.testing.assert_close(div, torch.stack(traces))
    for actual, expected in zip((f, eps_jac), field.vjp(T, z, eps, c), strict=True):
        torch.testing.assert_close(actual, expected)


def test_its_derivatives_are_those_of_the_sum_over_unit_probes(field_z_c):
    field, z, c = field_z_c

    def by_unit_probes(z):
        return (field.vjp(T, z, unit(z), c)[1] * unit(z)).sum((0, 2))

    both = []
    for function in (lambda z: divergence(field, z, c), by_unit_probes):
        x = z.clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(x).sin().sum(), x, create_graph=True)
        gradients = torch.autograd.grad(slope.square().sum(), [x, *field.parameters()][:-1])
        both.append([slope, *gradients])
    for actual, expected in zip(*both, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_only_dense_fields_with_two_hidden_layers_have_it():
    sizes = {3: False, 4: True, 5: False}
    for layers, has in sizes.items():
        assert Field(TimeLinear, [2] * layers).has_divergence is has


def test_the_dynamics_take_l_from_it_and_n_from_the_probe(field_z_c):
    field, z, c = field_z_c
    eps = torch.randn(1, *z.shape, dtype=torch.float64)
    rates = Dynamics(field, c, eps)(T, State.initial(z))
    torch.testing.assert_close(rates.l, divergence(field, z, c))
    torch.testing.assert_close(rates.n, field.vjp(T, z, eps, c)[1][0].square().sum(1))


@pytest.mark.parametrize("integrals", ["system", "radau"])
def test_the_likelihood_of_a_flow_has_no_error_of_probes(integrals):
    method = Method("rk4", integrals, steps=8)
    flow = make_flow((3,), train=method, test=method, layers=3)
    x = torch.randn(6, 3, dtype=torch.float64)
    first, second = flow.log_prob(x), flow.log_prob(x)
    assert torch.equal(first, second)
    assert flow.exact
    state = flow.eval()(x)
    assert state.n.isnan().all()
    jacobian = torch.autograd.functional.jacobian(lambda y: flow(y).z.sum(0), x)
    log_det = torch.linalg.slogdet(jacobian.transpose(0, 1)).logabsdet
    torch.testing.assert_close(state.l, log_det, rtol=1e-4, atol=1e-4)
