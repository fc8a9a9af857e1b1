"""The plain recipe, written independently of the package: what its results are held against.

torchdiffeq's `odeint_adjoint` over a right-hand side that concatenates time as a channel and calls `autograd.grad` with
`create_graph`, as FFJORD's and RNODE's papers describe it.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchdiffeq import odeint_adjoint


class PlainNet(nn.Module):
    """The same network as rnode.Field, from copies of its weights."""

    def __init__(self, field):
        super().__init__()
        self.weights = nn.ParameterList(layer.weight.detach().clone() for layer in field.layers)
        self.biases = nn.ParameterList(layer.bias.detach().clone() for layer in field.layers)

    def forward(self, t, z):
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if z.dim() == 4:
                z = F.conv2d(torch.cat([t.expand(z.shape[0], 1, *z.shape[2:]), z], 1), weight, bias, padding=1)
            else:
                z = F.linear(torch.cat([t.expand(z.shape[0], 1), z], 1), weight, bias)
            if i < len(self.weights) - 1:
                z = F.softplus(z)
        return z


class PlainODE(nn.Module):
    def __init__(self, net, eps):
        super().__init__()
        self.net, self.eps = net, eps

    def forward(self, t, state):
        z = state[0]
        with torch.enable_grad():
            z = z.requires_grad_(True)
            f = self.net(t, z)
            product = torch.autograd.grad(f, z, self.eps, create_graph=True)[0]
        div = (product * self.eps).flatten(1).sum(1)
        return f, div, f.flatten(1).pow(2).sum(1), product.flatten(1).pow(2).sum(1)


def plain_solve(net, z, eps, **arguments):
    zero = torch.zeros(len(z), dtype=z.dtype)
    t = torch.tensor([0.0, 1.0], dtype=z.dtype)
    path = odeint_adjoint(PlainODE(net, eps), (z, zero, zero, zero), t, **arguments)
    return [p[-1] for p in path]
