"""The plain recipe, written independently of the package: what its results are held against.

torchdiffeq's `odeint_adjoint` over a right-hand side that concatenates time as a channel and calls `autograd.grad` with
`create_graph`, as FFJORD's and RNODE's papers describe it.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torchdiffeq import odeint_adjoint

import rnode
from rnode.solver import error_norm


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
        self.nfe = 0

    def forward(self, t, state):
        self.nfe += 1
        z = state[0]
        with torch.enable_grad():
            z = z.requires_grad_(True)
            f = self.net(t, z)
            product = torch.autograd.grad(f, z, self.eps, create_graph=True)[0]
        div = (product * self.eps).flatten(1).sum(1)
        return f, div, f.flatten(1).pow(2).sum(1), product.flatten(1).pow(2).sum(1)


class PlainFlow(nn.Module):
    """The same multi-scale or dense flow as a rnode.Flow, from copies of its weights, solved by the adjoint method."""

    def __init__(self, flow, **arguments):
        super().__init__()
        self.scales = [
            ([PlainNet(p.field) for p in before], [PlainNet(p.field) for p in after]) for before, after in flow.scales
        ]
        self.last = [PlainNet(p.field) for p in flow.last]
        # In the order of the flow's own pieces, so that parameters can be compared one by one.
        self.nets = nn.ModuleList([net for scale in self.scales for nets in scale for net in nets] + self.last)
        self.arguments = arguments

    def forward(self, x):
        """x (B, *shape) → z (B, d) and l, E, n (B,); probes are drawn in the order of the pieces."""
        integrals = [0, 0, 0]

        def run(nets, z):
            for net in nets:
                z, *parts = self.solve(net, z, torch.randn_like(z))
                integrals[:] = [total + part for total, part in zip(integrals, parts, strict=True)]
            return z

        z, finished = x, []
        for before, after in self.scales:
            z = run(before, z)
            b, c, h, w = z.shape  # the squeeze, as a permutation written out
            z = z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)
            z = run(after, z)
            finished.append(z[:, 2 * c :].flatten(1))
            z = z[:, : 2 * c]
        finished.append(run(self.last, z).flatten(1))
        return torch.cat(finished, 1), *integrals

    def solve(self, net, z, eps):
        zero = torch.zeros(len(z), dtype=z.dtype, device=z.device)
        t = torch.tensor([0.0, 1.0], dtype=z.dtype, device=z.device)
        path = odeint_adjoint(PlainODE(net, eps), (z, zero, zero, zero), t, **self.arguments)
        return [p[-1] for p in path]

    def loss(self, x, lambda_k, lambda_j):
        z, l, E, n = self(x)
        log_q = -0.5 * z.pow(2).sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi)
        return (-log_q - l + lambda_k * E + lambda_j * n).mean() / z.shape[1]


class PlainPiece(rnode.Piece):
    """A piece of the program itself, solved the plain way: everything around it is as in any other run."""

    def forward(self, z, eps, method, gradient):
        ode = self.last_solve = PlainODE(self.field, eps[0])
        zero = z.new_zeros(len(z))
        t = torch.tensor([0.0, 1.0], dtype=z.dtype, device=z.device)
        path = odeint_adjoint(ode, (z, zero, zero, zero), t, **method.arguments(error_norm))
        self.nfe_forward = ode.nfe
        return rnode.State(*(p[-1] for p in path))


def multiscale(*arguments, **keywords):
    """rnode.multiscale of plain pieces: PYTHONPATH=benchmarks python src/train.py model._target_=plain.multiscale
    solver=rk4 trainer.inference_mode=false (autograd.grad does not work in inference mode)."""
    flow = rnode.multiscale(*arguments, **keywords)
    for pieces in [half for scale in flow.scales for half in scale] + [flow.last]:
        for k, piece in enumerate(pieces):
            pieces[k] = PlainPiece(PlainNet(piece.field))
    return flow
