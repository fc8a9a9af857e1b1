"""Conditional flow matching (Lipman et al., 2023): f learns straight lines without a solver.

A regression of f on the velocity of lines from data to noise is no likelihood, but a step of it is
several times cheaper than one of equation (17). It is used to pre-train.
"""

from functools import partial

import torch
from torch import Tensor
from torch.func import vmap

from rnode.dynamics import VectorField
from rnode.errors import require
from rnode.flow import Flatten, Flow, Piece
from rnode.solver import T


def require_one_path(flow: Flow) -> None:
    """Raise InputError if the pieces of a flow do not follow one another on the same space."""
    others = {type(layer).__name__ for layer in flow.layers if not isinstance(layer, Piece)}
    names = " and ".join(sorted(others - {Flatten.__name__}))
    why = f"the flow has {names}, so no straight line leads from data to noise"
    require(not names, f"flow matching: {why}")


def flow_matching(
    flow: Flow, x: Tensor, c: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Regress the fields of a flow on the velocity of lines from samples to noise.

    The line of a sample is z_s = (1 − s) x + s ε for s in [0, 1], with ε from the standard normal.
    The K pieces share it equally: piece k, which integrates over [0, T], follows it from k/K to
    (k + 1)/K, at the velocity (ε − x) / (K T). Each piece has its own times and noise.

    Args:
        flow: a flow of pieces on the same space, as `mlp` makes them.
        x: samples (B, *shape).
        c: the numbers (B, k) on which the density is conditioned.
        generator: samples noise and times.

    Returns:
        The mean squared error per dimension, summed over the pieces, ().
    """
    for layer in flow.layers:
        x = layer(x, []) if isinstance(layer, Flatten) else x
    count = len(flow.pieces)
    loss = x.new_zeros(())
    for k, piece in enumerate(flow.pieces):
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        share = torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype)
        s = ((k + share) / count).view(-1, *[1] * (x.dim() - 1))
        f = vmap(partial(one_sample, piece.field))(T * share, (1 - s) * x + s * noise, c)
        loss = loss + (f - (noise - x) / (count * T)).square().mean()
    return loss


def one_sample(field: VectorField, t: Tensor, z: Tensor, c: Tensor) -> Tensor:
    """f(z, t; c) of one sample, (*shape): a field takes one time for all samples of a batch."""
    return field(t, z[None], c[None])[0]
