"""The flows of the paper: multiscale for images, and a stack of dense pieces for vectors."""

import math
from collections.abc import Sequence

from rnode.dynamics import Probes
from rnode.errors import InputError, require
from rnode.flow import FactorOut, Flatten, Flow, Layer, Piece, Squeeze
from rnode.networks import Field, TimeConv2d, TimeLinear
from rnode.solver import Solver


def multiscale(
    shape: Sequence[int],
    solver: Solver,
    probes: Probes,
    hidden: int = 64,
    layers: int = 4,
    pieces: int = 2,
) -> Flow:
    """The paper's flow for images.

    A scale is pieces, a squeeze, pieces and a factoring out. Scales go on while height and width
    are at least 4: 28×28 gives 10 pieces, 32×32 gives 14. The last scale is pieces alone.

    Args:
        shape: (channels, height, width).
        solver: how the pieces are solved.
        probes: how div f and the Jacobian norm are estimated.
        hidden: channels of the inner layers of a piece.
        layers: convolutions of a piece.
        pieces: pieces before and after each squeeze, and in the last scale.

    Raises:
        InputError: if the shape cannot be halved as often as the scales need.
    """
    image = len(shape) == 3 and min(shape) >= 1 and min(shape[1:]) >= 4
    size = f"shape={list(shape)}: must be [channels, height, width], 4 or more high and wide"
    require(image, f"{size}; the mlp flow takes any shape")
    channels, height, width = shape

    def stack(channels: int) -> list[Layer]:
        sizes = [channels, *[hidden] * (layers - 1), channels]
        return [Piece(Field(TimeConv2d, sizes)) for _ in range(pieces)]

    flow: list[Layer] = []
    scale = 1
    while min(height, width) >= 8:
        if height % 2 or width % 2:
            fit = "×".join(str(side - side % (2 * scale)) for side in shape[1:])
            raise InputError(
                f"shape={list(shape)}: the multiscale flow halves both sides while they stay at "
                f"least 4, and cannot halve {height}×{width}; crop or pad the images, to {fit} for "
                "example"
            )
        flow += [*stack(channels), Squeeze(), *stack(4 * channels), FactorOut()]
        channels, height, width, scale = 2 * channels, height // 2, width // 2, 2 * scale
    return Flow(shape, [*flow, *stack(channels)], solver, probes)


def mlp(
    shape: Sequence[int],
    solver: Solver,
    probes: Probes,
    hidden: int = 64,
    layers: int = 4,
    pieces: int = 1,
) -> Flow:
    """A stack of dense pieces, for vectors; images are flattened. Arguments as for `multiscale`."""
    require(len(shape) > 0 and min(shape) >= 1, f"shape={list(shape)}: must be positive sizes")
    d = math.prod(shape)
    sizes = [d, *[hidden] * (layers - 1), d]
    flow: list[Layer] = [Flatten(shape)] if len(shape) > 1 else []
    flow += [Piece(Field(TimeLinear, sizes)) for _ in range(pieces)]
    return Flow(shape, flow, solver, probes)
