"""Memory of a training step at its peak, by gradient and batch, side by side with the plain recipe.

python benchmarks/memory.py [--dataset fashion_mnist] [--batch 32] [--channels 64] [--quick]

GiB above what was held before the step. `time` is against backprop in the same run, `memory` likewise. Written to
outputs/benchmarks/memory_DATASET.csv and .png as well.
"""

from common import LAMBDA, RADAU, RK4, arguments, describe, images, make_flow, medians, parse, peak_memory, report
from plain import PlainFlow
from rnode import objective

CONTENDERS = {
    "radau, backprop": (RADAU, "backprop"),
    "radau, checkpoint": (RADAU, "checkpoint"),
    "rk4, backprop": (RK4, "backprop"),
    "rk4, checkpoint": (RK4, "checkpoint"),
    "rk4, adjoint": (RK4, "adjoint"),
}


def main() -> None:
    options = parse(arguments(__doc__))
    x = images(options)

    def contender(method, gradient):
        flow = make_flow(options, method, gradient)
        return lambda: objective(flow(x), LAMBDA, LAMBDA).backward()

    plain = PlainFlow(make_flow(options), method="rk4", options={"step_size": 0.25})
    steps = {name: contender(*choice) for name, choice in CONTENDERS.items()}
    steps["plain recipe"] = lambda: plain.loss(x, LAMBDA, LAMBDA).backward()
    for step in steps.values():
        step()  # the gradients are there from now on, and are not counted
    memory = {name: peak_memory(step) for name, step in steps.items()}
    seconds = medians(steps, options.repetitions)
    rows = []
    for name, peak in memory.items():
        against = "rk4, backprop" if name.startswith("rk4") else "radau, backprop"
        row = {"contender": name, "peak GiB": f"{peak:.3f}", "memory": "", "time": ""}
        if name != "plain recipe":
            row |= {"memory": f"{peak / memory[against]:.2f}", "time": f"{seconds[name] / seconds[against]:.2f}"}
        rows.append(row)
    report(
        f"memory_{options.dataset}",
        f"peak memory of a training step, {describe(options)}",
        rows,
        bars="peak GiB",
        label="GiB",
    )


if __name__ == "__main__":
    main()
