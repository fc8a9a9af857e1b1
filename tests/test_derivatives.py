"""Derivatives of a flow's likelihood: second ones, and those of torch.func."""

import pytest
import torch

from helpers import make_flow
from rnode import InputError, Method, log_normal

TIGHT = Method("dopri5", rtol=1e-9, atol=1e-9)
FIXED = [Method("rk4", integrals, steps=4) for integrals in ("system", "simpson", "radau")]


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


@pytest.mark.parametrize("training", [True, False])
def test_the_adjoint_refuses_second_derivatives(training):
    flow = make_flow((2,), gradient="adjoint", divergence="exact").train(training)
    x = torch.randn(2, dtype=torch.float64)
    with pytest.raises(InputError, match="gradient=adjoint has no second derivatives"):
        torch.autograd.functional.hessian(flow.log_prob, x)


@pytest.mark.parametrize("method", FIXED, ids=["system", "simpson", "radau"])
def test_torch_func_transforms_a_dense_flow_with_a_fixed_grid(method):
    flow = make_flow((3,), train=method, test=method, divergence="exact")
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = score(flow, x)
    same = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(torch.func.vmap(flow.log_prob)(x), flow.log_prob(x), **same)
    gradient = torch.func.vmap(torch.func.grad(flow.log_prob))
    torch.testing.assert_close(gradient(x), expected, **same)
    jacobian = torch.func.jacrev(flow.log_prob)(x)
    torch.testing.assert_close(torch.einsum("iij->ij", jacobian), expected, **same)
    hessian = torch.func.hessian(flow.log_prob)(x[0])
    reference = torch.autograd.functional.hessian(flow.log_prob, x[0])
    torch.testing.assert_close(hessian, reference, **same)

    def likelihood(parameters):
        state = torch.func.functional_call(flow, parameters, (x,))
        return (log_normal(state.z) + state.l).sum()

    gradients = torch.func.grad(likelihood)(dict(flow.named_parameters()))
    flow.log_prob(x).sum().backward()
    for name, parameter in flow.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, **same)
    z = torch.randn(4, 1, 3, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(flow.inverse)(z)[:, 0], flow.inverse(z[:, 0]))
