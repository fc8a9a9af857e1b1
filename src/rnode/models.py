"""The flows of the paper: multiscale for images, and a stack of dense pieces for vectors."""

import math
from collections.abc import Sequence

from rnode.dynamics import Probes
from rnode.errors import require
from rnode.flow import FactorOut, Flatten, Flow, Layer, Piece, Squeeze
from rnode.networks import Field, LayerType, TimeConv2d, TimeLinear
from rnode.solver import Solver


def multiscale(
    shape: Sequence[int],
    solver: Solver,
    probes: Probes,
    hidden: int = 64,
    layers: int = 4,
    pieces: int = 2,
    context: int = 0,
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
        context: number of the numbers c of a conditional density p(x | c).

    Raises:
        InputError: if the shape cannot be halved as often as the scales need.
    """
    size = f"shape={list(shape)}: must be [channels, height, width], 4 or more high and wide"
    image = len(shape) == 3 and min(shape) >= 1 and min(shape[1:]) >= 4
    require(image, f"{size}; the mlp flow takes any shape")
    channels, height, width = shape
    flow: list[Layer] = []
    sizes = (hidden, layers, pieces, context)
    while min(height, width) >= 8:
        halved = 2 * shape[1] // height  # how many times, with this scale
        fit = "×".join(str(side - side % halved) for side in shape[1:])
        even = f"the scales cannot halve {height}×{width}; crop or pad the images, to {fit}"
        require(height % 2 == width % 2 == 0, f"shape={list(shape)}: {even} for example")
        flow += [*stack(TimeConv2d, channels, *sizes), Squeeze()]
        flow += [*stack(TimeConv2d, 4 * channels, *sizes), FactorOut()]
        channels, height, width = 2 * channels, height // 2, width // 2
    flow += stack(TimeConv2d, channels, *sizes)
    return Flow(shape, flow, solver, probes, context)


def mlp(
    shape: Sequence[int],
    solver: Solver,
    probes: Probes,
    hidden: int = 64,
    layers: int = 4,
    pieces: int = 1,
    context: int = 0,
) -> Flow:
    """A stack of dense pieces, for vectors; images are flattened. Arguments as for `multiscale`."""
    require(len(shape) > 0 and min(shape) >= 1, f"shape={list(shape)}: must be positive sizes")
    flow: list[Layer] = [Flatten(shape)] if len(shape) > 1 else []
    flow += stack(TimeLinear, math.prod(shape), hidden, layers, pieces, context)
    return Flow(shape, flow, solver, probes, context)


def stack(
    layer: LayerType, size: int, hidden: int, layers: int, pieces: int, context: int
) -> list[Piece]:
    """Pieces whose fields have `layers` layers, with `size` inputs and `hidden` inner channels."""
    sizes = [size, *[hidden] * (layers - 1), size]
    return [Piece(Field(layer, sizes, context)) for _ in range(pieces)]
