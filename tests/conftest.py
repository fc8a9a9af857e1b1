import pytest
import torch
from torch import nn

from rnode import Field, Method, Probes, Solver, TimeConv2d, TimeLinear, mlp, multiscale

torch.set_num_threads(1)  # the tests' tensors are small, and pytest-xdist runs one process a core


class Linear(nn.Module):
    """f(t, z) = A z: everything about its flow is known in closed form."""

    def __init__(self, A):
        super().__init__()
        self.A = nn.Parameter(A)

    def forward(self, t, z):
        return z @ self.A.T

    def vjp(self, t, z, eps):
        return self(t, z), eps @ self.A


def randomize(module, scale=1.0):
    """Weights as PyTorch would initialize them, in the layers that start at zero too."""
    for layer in module.modules():
        if isinstance(layer, TimeConv2d | TimeLinear):
            fan_in = layer.weight[0].numel()
            nn.init.uniform_(layer.weight, -scale * fan_in**-0.5, scale * fan_in**-0.5)
            nn.init.uniform_(layer.bias, -scale * fan_in**-0.5, scale * fan_in**-0.5)
    return module


RK4 = Method("rk4", step_size=0.25)
DOPRI5 = Method("dopri5")


def make_flow(shape, *, train=RK4, test=DOPRI5, gradient="backprop", divergence="gaussian", probes=1, **sizes):
    solver = Solver(train, test, gradient)
    build = multiscale if len(shape) == 3 else mlp
    return randomize(build(shape, solver, Probes(divergence, probes), hidden=8, **sizes).double())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["conv", "dense"])
def field_and_z(request):
    """A field with random weights and a batch for it, float64."""
    layer, sizes, shape = {"conv": (TimeConv2d, [2, 7, 5, 2], (2, 4, 3)), "dense": (TimeLinear, [6, 9, 9, 6], (6,))}[
        request.param
    ]
    field = randomize(Field(layer, sizes).double())
    return field, torch.randn(3, *shape, dtype=torch.float64)


def close(a, b, rtol):
    """Relative error of two tensors as a whole, in both directions."""
    return bool((a - b).norm() <= rtol * torch.maximum(a.norm(), b.norm()))
