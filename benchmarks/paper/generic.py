"""The start of a generic flow, as FFJORD's: f is not zero, and chance bends the trajectories."""

from typing import Any

from torch import nn

from rnode import models
from rnode.flow import Flow


def restart(flow: Flow) -> Flow:
    """Give all layers torch's default weights, the last ones too."""
    for layer in flow.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.reset_parameters()
    return flow


def mlp(**options: Any) -> Flow:
    """`rnode.models.mlp` with this start."""
    return restart(models.mlp(**options))
