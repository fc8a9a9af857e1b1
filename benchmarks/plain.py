"""The plain recipe, written independently of the package, as the reference for its results.

It calls torchdiffeq's `odeint_adjoint` on a right-hand side that concatenates time as a channel and
calls `autograd.grad` with `create_graph`, as the papers of FFJORD and RNODE describe it.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torchdiffeq import odeint_adjoint

import rnode


class PlainNet(nn.Module):
    """The network of a rnode.Field, with copies of its weights.

    Its convolutions see softplus(a). Those of a Field see softplus(a) − log 2, and the bias makes
    up for that.
    """

    def __init__(self, field):
        super().__init__()
        self.weights = nn.ParameterList(layer.weight.detach().clone() for layer in field.layers)
        self.biases = nn.ParameterList(layer.bias.detach().clone() for layer in field.layers)

    def forward(self, t, z, c):
        image = z.dim() == 4
        c = c[:, :, None, None].expand(*c.shape, *z.shape[2:]) if image else c
        time = t.expand(len(z), 1, *z.shape[2:])
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            z = torch.cat([time, c, z], 1)  # time and c as the first channels
            if image and i > 0:
                bias = bias - shift(weight, 1 + c.shape[1])
            z = F.conv2d(z, weight, bias, padding=1) if image else F.linear(z, weight, bias)
            if i < len(self.weights) - 1:
                z = F.softplus(z)
        return z


def shift(weight, first=1):
    """The output of a layer for inputs of softplus(0) = log 2, from its input number `first` on."""
    return math.log(2) * weight[:, first:].flatten(1).sum(1)


class PlainODE(nn.Module):
    """The right-hand side for z, l, E and n. It counts its evaluations in `nfe`."""

    def __init__(self, net, eps):
        super().__init__()
        self.net, self.eps = net, eps
        self.nfe = 0

    def forward(self, t, state):
        self.nfe += 1
        z = state[0]
        with torch.enable_grad():
            z = z.requires_grad_(True)
            f = self.net(t, z, z.new_empty(len(z), 0))
            product = torch.autograd.grad(f, z, self.eps, create_graph=True)[0]
        div = (product * self.eps).flatten(1).sum(1)
        return f, div, f.flatten(1).pow(2).sum(1), product.flatten(1).pow(2).sum(1)


def plain_solve(ode, z, **options):
    """Integrate (z, 0, 0, 0) from time 0 to 1 by the adjoint method."""
    zero = torch.zeros(len(z), dtype=z.dtype, device=z.device)
    t = torch.tensor([0.0, 1.0], dtype=z.dtype, device=z.device)
    path = odeint_adjoint(ode, (z, zero, zero, zero), t, **options)
    return [part[-1] for part in path]


def squeeze(z):
    """z (B, C, H, W) → (B, 4C, H/2, W/2), written out as a permutation."""
    b, c, h, w = z.shape
    z = z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return z.reshape(b, 4 * c, h // 2, w // 2)


def unsqueeze(z):
    """z (B, 4C, H, W) → (B, C, 2H, 2W), the inverse of `squeeze`."""
    b, c, h, w = z.shape
    z = z.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
    return z.reshape(b, c // 4, 2 * h, 2 * w)


class PlainFlow(nn.Module):
    """The layers of a rnode.Flow, with copies of its weights, solved by the adjoint method.

    Args:
        flow: the flow to copy.
        **options: keyword arguments of `odeint_adjoint`.
    """

    def __init__(self, flow, **options):
        super().__init__()
        self.nets = nn.ModuleList(PlainNet(piece.field) for piece in flow.pieces)
        nets = iter(self.nets)
        # A list, not a ModuleList: parameters are registered once and in the order of the pieces.
        self.layers = [next(nets) if isinstance(m, rnode.Piece) else m for m in flow.layers]
        self.options = options

    def forward(self, x):
        """x (B, *shape) → z (B, d) and l, E, n (B,); probes are sampled in order of the pieces."""
        z, finished, integrals = x, [], [0, 0, 0]
        for layer in self.layers:
            if isinstance(layer, PlainNet):
                ode = PlainODE(layer, torch.randn_like(z))
                z, *parts = plain_solve(ode, z, **self.options)
                integrals = [total + part for total, part in zip(integrals, parts, strict=True)]
            elif isinstance(layer, rnode.Squeeze):
                z = squeeze(z)
            elif isinstance(layer, rnode.FactorOut):
                half = z.shape[1] // 2
                z, done = z[:, :half], z[:, half:]
                finished.append(done.flatten(1))
            else:
                z = z.flatten(1)
        return torch.cat([*finished, z.flatten(1)], 1), *integrals

    def loss(self, x, lambda_k, lambda_j):
        """Equation (17), in nats per dimension."""
        z, l, E, n = self(x)
        log_q = -0.5 * z.pow(2).sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi)
        return (-log_q - l + lambda_k * E + lambda_j * n).mean() / z.shape[1]


class PlainPiece(rnode.Piece):
    """A piece of the program that is solved by the plain recipe."""

    def forward(self, z, c, eps, method, gradient, integrate=None):
        ode = PlainODE(self.field, eps[0])
        state = rnode.State(*plain_solve(ode, z, **method.odeint_options(torch.float32)))
        return rnode.PieceSolution(z, state, ode, ode.nfe)


def multiscale(*arguments, **keywords):
    """rnode.multiscale with plain pieces, to train in the same program.

    Train it with PYTHONPATH=benchmarks and the overrides model._target_=plain.multiscale and
    solver=rk4.
    """
    flow = rnode.multiscale(*arguments, **keywords)
    for i, layer in enumerate(flow.layers):
        if isinstance(layer, rnode.Piece):
            flow.layers[i] = PlainPiece(PlainNet(layer.field))
    return flow
