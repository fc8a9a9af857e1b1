"""How the cost of a training step grows with batch, image side, pieces, channels and NFE.

python benchmarks/growth.py [--repetitions 3] [--quick]

One quantity is varied at a time. The others are: batch 8, one channel of 16×16 pixels, 2 pieces a
scale, 32 channels, 3 steps of radau. The exponent k of cost ∝ quantityᵏ is a least-squares fit in
logarithms. The record is benchmarks/results/growth.json.
"""

import argparse
from collections.abc import Callable, Sequence

import numpy as np
import torch

from common import (
    DEVICE,
    DOPRI5,
    LAMBDA,
    as_if_trained,
    medians,
    peak_memory,
    write_record,
)
from rnode import Method, Probes, Solver, multiscale, objective
from rnode.app.processes import prepare_process

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
    help = "one repetition, two values of each quantity"
    parser.add_argument("--quick", action="store_true", help=help)
    options = parser.parse_args()
    repetitions, count = (1, 2) if options.quick else (options.repetitions, None)
    prepare_process()

    rows = []
    for quantity, varied in VARIED.items():
        values = varied[:count]
        steps = {value: training_step(**START | {quantity: value}) for value in values}
        costs = {"GiB": {value: peak_memory(step) for value, step in steps.items()}}
        costs["seconds"] = medians(steps, repetitions)
        name, factor = ("NFE", 4) if quantity == "steps" else (quantity, 1)
        row = {"quantity": name, "values": ", ".join(str(factor * value) for value in values)}
        for cost in ("seconds", "GiB"):
            k = exponent(values, [costs[cost][value] for value in values])
            row[f"exponent of {cost}"] = f"{k:.2f}"
        rows.append(row)
    write_record("growth", "growth of the cost of a training step", rows)


def training_step(
    batch: int, side: int, pieces: int, channels: int, steps: int
) -> Callable[[], None]:
    torch.manual_seed(0)
    solver = Solver(Method("rk4", "radau", steps=steps), DOPRI5)
    flow = multiscale((1, side, side), solver, Probes(), hidden=channels, pieces=pieces)
    flow = as_if_trained(flow).to(DEVICE)
    x = torch.randn(batch, 1, side, side, device=DEVICE)
    return lambda: objective(flow(x), LAMBDA, LAMBDA).backward()


def exponent(values: Sequence[float], costs: Sequence[float]) -> float:
    return np.polyfit(np.log(values), np.log(costs), 1)[0]


if __name__ == "__main__":
    main()
