"""The flows of the paper: multiscale for images, and dense pieces in sequence for vectors."""

import math
from collections.abc import Sequence

from rnode.dynamics import Probes
from rnode.errors import require
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
    k: int = 0,
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
        k: number of the numbers c of a conditional density p(x | c).

    Raises:
        InputError: if the shape cannot be halved as often as the scales need.
    """
    size = f"shape={list(shape)}: must be [channels, height, width], 4 or more high and wide"
    image = len(shape) == 3 and min(shape) >= 1 and min(shape[1:]) >= 4
    require(image, f"{size}; the mlp flow takes any shape")
    channels, height, width = shape

    def pieces_of(channels: int) -> list[Piece]:
        sizes = [channels, *[hidden] * (layers - 1), channels]
        return [Piece(Field(TimeConv2d, sizes, k)) for _ in range(pieces)]

    flow: list[Layer] = []
    while min(height, width) >= 8:
        factor = 2 * shape[1] // height  # by which this scale has reduced the image
        fit = "×".join(str(side - side % factor) for side in shape[1:])
        even = f"the scales cannot halve {height}×{width}; use images of {fit}, for example"
        require(height % 2 == width % 2 == 0, f"shape={list(shape)}: {even}")
        flow += [*pieces_of(channels), Squeeze(), *pieces_of(4 * channels), FactorOut()]
        channels, height, width = 2 * channels, height // 2, width // 2
    flow += pieces_of(channels)
    return Flow(shape, flow, solver, probes, k)


def mlp(
    shape: Sequence[int],
    solver: Solver,
    probes: Probes,
    hidden: int = 64,
    layers: int = 4,
    pieces: int = 1,
    k: int = 0,
) -> Flow:
    """Dense pieces, for vectors; images are flattened. Arguments as for `multiscale`."""
    require(len(shape) > 0 and min(shape) >= 1, f"shape={list(shape)}: must be positive sizes")
    flow: list[Layer] = [Flatten(shape)] if len(shape) > 1 else []
    d = math.prod(shape)
    sizes = [d, *[hidden] * (layers - 1), d]
    flow += [Piece(Field(TimeLinear, sizes, k)) for _ in range(pieces)]
    return Flow(shape, flow, solver, probes, k)
