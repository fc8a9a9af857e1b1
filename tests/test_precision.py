"""The dtypes of a solve: bfloat16 inside f alone, and float64 nowhere unless asked for."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import DOPRI5, RK4, close, make_flow
from rnode import Method, Piece, Probes, objective


def test_bfloat16_stays_inside_f_and_out_of_adaptive_methods(field_z_c):
    field, z, c = (part.float() for part in field_z_c)
    eps = Probes().sample(z)
    results = {}
    for method in (RK4, DOPRI5):
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                state = Piece(field)(z, c, eps, method, "backprop").state
            assert all(part.dtype == torch.float32 for part in state)
            results[method.method, autocast] = state.z
    assert close(results["rk4", True], results["rk4", False], 2e-2)
    assert not torch.equal(results["rk4", True], results["rk4", False])
    assert torch.equal(results["dopri5", True], results["dopri5", False])


def test_the_backward_pass_of_adjoint_and_checkpoint_enters_autocast_again(field_z_c):
    field, z, c = (part.float() for part in field_z_c)
    enabled = []

    def note(*_):
        enabled.append(torch.is_autocast_enabled("cpu"))

    field.layers[0].register_forward_hook(note)
    for gradient in ("adjoint", "checkpoint"):
        with torch.autocast("cpu", torch.bfloat16):
            state = Piece(field)(z, c, Probes().sample(z), RK4, gradient).state
        enabled.clear()
        state.z.sum().backward()
        assert set(enabled) == {True}, gradient


class Float64(TorchDispatchMode):
    """Counts the results of operators that are float64."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.count += any(tensor.dtype == torch.float64 for tensor in tensors)
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
        flow.inverse(torch.randn(2, flow.d))
        flow.trajectory(torch.randn(2, flow.d), intervals=2)
    assert watch.count == 0
