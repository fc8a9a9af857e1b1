"""What a run of the paper's experiments needs: a calculation from counts, not a measurement.

python benchmarks/budget.py [--flops 20e12] [--share 0.5] [--bandwidth 1e12]

FLOPs are those of the 3×3 convolutions, forward and backward. Bytes are those of the activations of
the inner layers in float32; each is written once and read once in either pass. Backprop keeps all,
checkpoint those of one piece, or of one of its steps where l, E, n come by quadrature. Hours are
the larger of FLOPs / (FLOP/s · share) and bytes / bandwidth. The calculation leaves out evaluation,
the transfer of data to the device and the optimizer.
"""

import argparse
import math

from common import COARSE, DOPRI5, FINE, RK4, SHAPES, evaluation_flops, write_record
from rnode import Piece, Probes, Solver, Squeeze, multiscale

RUNS = {"mnist": (50_000, 200), "cifar10": (45_000, 200)}  # training images and batch size
EPOCHS = 100  # section 6 of the paper
TENSORS = 6, 6  # of hidden width that f keeps (3 layers and their slopes), and a product besides
COUNTS = [  # evaluations of f and products εᵀ∇f of a piece, and parts that are solved again
    ("rk4, system", 16, 16, 1),
    ("auto, first grid", 4 * COARSE.steps, COARSE.steps, COARSE.steps),
    ("auto, refined once", 4 * FINE.steps, FINE.steps, FINE.steps),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flops", type=float, default=20e12, help="peak FLOP/s of convolutions")
    parser.add_argument("--share", type=float, default=0.5, help="share of the peak in a step")
    parser.add_argument("--bandwidth", type=float, default=1e12, help="bytes/s of the memory")
    options = parser.parse_args()
    rows = []
    for dataset, (images, batch) in RUNS.items():
        shape = SHAPES[dataset]
        pixels, largest = pixels_of_all_pieces(shape), math.prod(shape[1:])
        for name, evaluations, products, parts in COUNTS:
            one = evaluation_flops(shape, 64)
            flops = 3 * (evaluations + products) * one * batch
            tensors = TENSORS[0] * evaluations + TENSORS[1] * products
            kept = 4 * 64 * pixels * tensors * batch  # bytes
            moved = 4 * kept  # written and read, forward and backward
            seconds = max(flops / (options.flops * options.share), moved / options.bandwidth)
            steps = EPOCHS * -(-images // batch)
            rows.append(
                {
                    "experiment": dataset,
                    "solver": name,
                    "steps": f"{steps}",
                    "TFLOP a step": f"{flops / 1e12:.2f}",
                    "GB kept by backprop": f"{kept / 1e9:.1f}",
                    "by checkpoint": f"{kept / 1e9 * largest / pixels / parts:.1f}",
                    "GB moved a step": f"{moved / 1e9:.0f}",
                    "hours": f"{steps * seconds / 3600:.1f}",
                }
            )
    rate = f"{options.flops:.3g} FLOP/s × {options.share:.0%}"
    title = f"calculated for {rate}, {options.bandwidth:.3g} bytes/s"
    write_record("budget", title, rows)


def pixels_of_all_pieces(shape: tuple[int, ...]) -> int:
    """Number of pixels of an image, summed over the pieces of its flow."""
    area, pixels = math.prod(shape[1:]), 0
    for layer in multiscale(shape, Solver(RK4, DOPRI5), Probes()).layers:
        if isinstance(layer, Piece):
            pixels += area
        elif isinstance(layer, Squeeze):
            area //= 4
    return pixels


if __name__ == "__main__":
    main()
