"""A generic flow: f is not zero at the start, and chance bends the trajectories."""

from typing import Any

from torch import nn

from rnode import models
from rnode.flow import Flow


def mlp(**options: Any) -> Flow:
    """`rnode.models.mlp`, whose last layers start by He's initialization as the others do."""
    flow = models.mlp(**options)
    for piece in flow.pieces:
        nn.init.kaiming_normal_(piece.field.layers[-1].weight)
    return flow
