"""What a run of the paper's experiments needs: a calculation from counts, not a measurement.

python benchmarks/budget.py [--flops 20e12] [--share 0.5] [--bandwidth 1e12]

FLOPs are those of the 3×3 convolutions, forward and backward; bytes those of the inner layers' activations, each written
once and read once in either pass, in float32. Hours are FLOPs / (FLOP/s · share) or bytes / bandwidth, whichever is longer.
Times in evaluation, the data's way to the device and what the optimizer does are left out.
"""

import argparse
import math

from common import COARSE, DOPRI5, FINE, RK4, SHAPES, evaluation_flops, write_table
from rnode import Probes, Solver, multiscale

RUNS = {"mnist": (50_000, 200), "cifar10": (45_000, 200)}  # training images and batch of conf/dataset
AUTO = {"auto, first grid": COARSE, "auto, refined once": FINE}
EPOCHS = 100  # section 6 of the paper
TENSORS = 6, 6  # of hidden width that an evaluation keeps (three layers, each with its slope), and a product besides
COUNTS = [("rk4, system", 16, 16), *((name, 4 * m.steps, m.steps) for name, m in AUTO.items())]  # a piece, f and εᵀ∇f


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flops", type=float, default=20e12, help="FLOP/s of the device's convolutions at best")
    parser.add_argument("--share", type=float, default=0.5, help="of that rate which a step reaches")
    parser.add_argument("--bandwidth", type=float, default=1e12, help="bytes/s of the device's memory")
    options = parser.parse_args()
    rows = []
    for dataset, (images, batch) in RUNS.items():
        flow = multiscale(SHAPES[dataset], Solver(RK4, DOPRI5), Probes())
        areas = [math.prod(flow.shape[1:]) // 4**k for k in range(len(flow.scales) + 1)]  # two pieces before, two after
        pixels = sum(2 * area + 2 * area // 4 for area in areas[:-1]) + 2 * areas[-1]  # of all pieces' images
        for name, evaluations, products in COUNTS:
            flops = 3 * (evaluations + products) * evaluation_flops(SHAPES[dataset], 64) * batch
            kept = 4 * 64 * pixels * (TENSORS[0] * evaluations + TENSORS[1] * products) * batch  # bytes
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
                    "GB moved a step": f"{moved / 1e9:.0f}",
                    "hours": f"{steps * seconds / 3600:.1f}",
                }
            )
    title = f"calculated for {options.flops:.3g} FLOP/s × {options.share:.0%}, {options.bandwidth:.3g} bytes/s"
    write_table("budget", title, rows)


if __name__ == "__main__":
    main()
