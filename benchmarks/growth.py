"""How the cost of a training step grows: seconds and memory against batch, image side, pieces, channels and NFE.

python benchmarks/growth.py [--repetitions 3] [--quick]

One quantity is varied at a time, from batch 8, one channel of 16×16, 2 pieces a scale, 32 channels, 3 steps of radau. The
exponent k of cost ∝ quantityᵏ is a least-squares fit in logarithms. Written to outputs/benchmarks/growth.csv (the fits),
growth_points.csv and growth.png.
"""

import argparse

import numpy as np
import torch

from common import DEVICE, DOPRI5, LAMBDA, as_if_trained, folder, medians, peak_memory, write_csv, write_table
from rnode import Method, Probes, Solver, multiscale, objective
from rnode.allocator import keep_freed_memory

START = {"batch": 8, "side": 16, "pieces": 2, "channels": 32, "steps": 3}
VARIED = {
    "batch": (8, 16, 32, 64),
    "side": (8, 16, 32),
    "pieces": (1, 2, 4),
    "channels": (16, 32, 64, 128),
    "steps": (2, 3, 6, 12),  # 4 evaluations of f each
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one repetition, two values of each quantity")
    options = parser.parse_args()
    repetitions, values = (1, 2) if options.quick else (options.repetitions, None)
    keep_freed_memory()

    points, rows = [], []
    for quantity, varied in VARIED.items():
        varied = varied[:values]
        steps = {value: step(**START | {quantity: value}) for value in varied}
        memory = {value: peak_memory(function) for value, function in steps.items()}
        seconds = medians(steps, repetitions)
        points += [{"quantity": quantity, "value": v, "seconds": seconds[v], "GiB": memory[v]} for v in varied]
        fits = {name: exponent(varied, [cost[v] for v in varied]) for name, cost in (("seconds", seconds), ("GiB", memory))}
        name = "NFE" if quantity == "steps" else quantity
        row = {"quantity": name, "values": ", ".join(str(4 * v if name == "NFE" else v) for v in varied)}
        rows.append(row | {f"exponent of {cost}": f"{k:.2f}" for cost, k in fits.items()})
    write_csv("growth_points", points)
    draw(points)
    write_table("growth", "growth of a training step's cost", rows)


def step(batch: int, side: int, pieces: int, channels: int, steps: int):
    torch.manual_seed(0)
    solver = Solver(Method("rk4", "radau", step_size=1 / steps), DOPRI5)
    flow = as_if_trained(multiscale((1, side, side), solver, Probes(), hidden=channels, pieces=pieces)).to(DEVICE)
    x = torch.randn(batch, 1, side, side, device=DEVICE)
    return lambda: objective(flow(x), LAMBDA, LAMBDA).backward()


def exponent(values, costs) -> float:
    return np.polyfit(np.log(values), np.log(costs), 1)[0]


def draw(points: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(VARIED), figsize=(3 * len(VARIED), 5), layout="constrained", sharex="col")
    for column, quantity in enumerate(VARIED):
        chosen = [p for p in points if p["quantity"] == quantity]
        for ax, cost in zip(axes[:, column], ("seconds", "GiB"), strict=True):
            ax.loglog([p["value"] for p in chosen], [p[cost] for p in chosen], "o-")
            ax.set(ylabel=f"{cost} a step" if column == 0 else "")
        axes[1, column].set_xlabel(quantity)
    figure.savefig(folder() / "growth.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
