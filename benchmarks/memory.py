"""Peak memory of a training step by gradient, beside the plain recipe.

python benchmarks/memory.py [--dataset fashion_mnist] [--batch 32] [--channels 64] [--quick]

GiB are counted above what was allocated before the step. `time` and `memory` are relative to
backprop on three steps in the same run. `radau, 2 steps` and `radau, 4 steps` are the first grid
of the default and its grid after one refinement. On a CUDA device, `images that fit` is the batch
that would fill its memory if memory grows in proportion to the batch. The record is
benchmarks/results/memory_DATASET.json.
"""

import torch

from common import (
    COARSE,
    DEVICE,
    FINE,
    LAMBDA,
    RADAU,
    RK4,
    arguments,
    describe,
    images,
    make_flow,
    medians,
    parse,
    peak_memory,
    write_record,
)
from plain import PlainFlow
from rnode import objective
from rnode.app.processes import prepare_process

METHODS = {"radau": RADAU, "radau, 2 steps": COARSE, "radau, 4 steps": FINE, "rk4": RK4}
CONTENDERS = {
    f"{name}, {gradient}": (method, gradient)
    for name, method in METHODS.items()
    for gradient in ("backprop", "checkpoint", "adjoint")
    if gradient != "adjoint" or method.integrals == "system"
}


def main() -> None:
    options = parse(arguments(__doc__))
    prepare_process()
    x = images(options)

    def contender(method, gradient):
        flow = make_flow(options, method, gradient)
        return lambda: objective(flow(x), LAMBDA, LAMBDA).backward()

    plain = PlainFlow(make_flow(options), method="rk4", options={"step_size": 0.25})
    steps = {name: contender(*choice) for name, choice in CONTENDERS.items()}
    steps["plain recipe"] = lambda: plain.loss(x, LAMBDA, LAMBDA).backward()
    for step in steps.values():
        step()  # allocates the gradients, which are not counted
    memory = {name: peak_memory(step) for name, step in steps.items()}
    seconds = medians(steps, options.repetitions)
    rows = []
    for name, peak in memory.items():
        reference = "rk4, backprop" if name.startswith("rk4") else "radau, backprop"
        row = {"contender": name, "peak GiB": f"{peak:.3f}", "memory": "", "time": ""}
        if name != "plain recipe":
            row["memory"] = f"{peak / memory[reference]:.2f}"
            row["time"] = f"{seconds[name] / seconds[reference]:.2f}"
        if DEVICE.type == "cuda":
            capacity = torch.cuda.mem_get_info()[1] / 2**30
            row["images that fit"] = str(int(options.batch * capacity / peak))
        rows.append(row)
    title = f"peak memory of a training step, {describe(options)}"
    write_record(f"memory_{options.dataset}", title, rows)


if __name__ == "__main__":
    main()
