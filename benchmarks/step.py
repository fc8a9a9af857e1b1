"""One training step (forward, gradient, Adam), beside the plain recipe.

python benchmarks/step.py [--dataset fashion_mnist] [--batch 32] [--channels 64] [--repetitions 3]
                          [--contenders NAME ...] [--tf32] [--quick]

Every contender has the same weights, batch and λ. `radau` has three steps a piece; `radau, 2
steps` and `radau, 4 steps` are the first grid of the default, solver=auto, and its grid after one
refinement. Repetitions are interleaved. The table gives medians, the ratio to the plain recipe, the
share of the limit and the peak memory of the step. The limit is the time that the convolutions of
the step would take at the rate of a 3×3 convolution in the same run. `graphs` are CUDA graphs, and
need a CUDA device. The record is benchmarks/results/step_DATASET.json.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import common
from common import COARSE, DEVICE, FINE, LAMBDA, RADAU, RK4, SIMPSON, make_flow
from plain import PlainFlow
from rnode import Flow, objective
from rnode.app.processes import prepare_process
from rnode.solver import integrate
from rnode.training.graphs import RecordedSolves

CONTENDERS = {  # name: (training method, gradient); further words: bf16 in f, graphs
    "rk4, adjoint": (RK4, "adjoint"),
    "rk4, backprop": (RK4, "backprop"),
    "simpson, backprop": (SIMPSON, "backprop"),
    "radau, backprop": (RADAU, "backprop"),
    "radau, 2 steps, backprop": (COARSE, "backprop"),
    "radau, 4 steps, backprop": (FINE, "backprop"),
    "radau, checkpoint": (RADAU, "checkpoint"),
    "radau, backprop, bf16": (RADAU, "backprop"),
    "radau, 2 steps, backprop, bf16": (COARSE, "backprop"),
    "radau, 2 steps, backprop, graphs": (COARSE, "backprop"),
    "radau, 2 steps, backprop, bf16, graphs": (COARSE, "backprop"),
}


def main() -> None:
    parser = common.arguments(__doc__)
    help = "let convolutions in float32 use TF32, where the device has it"
    parser.add_argument("--tf32", action="store_true", help=help)
    help = "the rows beside the plain recipe"
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, help=help)
    options = common.parse(parser)
    prepare_process()
    torch.backends.cudnn.allow_tf32 = options.tf32

    x = common.images(options)
    gpu = DEVICE.type == "cuda"
    default = [name for name in CONTENDERS if gpu or "graphs" not in words(name)]
    steps = {"plain recipe": plain_step(make_flow(options), x)}
    for name in options.contenders or default:
        steps[name] = flow_step(make_flow(options, *CONTENDERS[name]), x, words(name))
    memory = {name: common.peak_memory(step) for name, step in steps.items()}
    dtypes = {False: torch.float32, True: torch.bfloat16}
    convolutions = {bf16: common.convolution(options, dtype) for bf16, dtype in dtypes.items()}
    timed = steps | {bf16: function for bf16, (function, _) in convolutions.items()}
    seconds = common.medians(timed, options.repetitions)
    rate = {bf16: flops / seconds.pop(bf16) for bf16, (_, flops) in convolutions.items()}  # FLOP/s

    rows = []
    for name, median in seconds.items():
        share = ""
        method, _ = CONTENDERS.get(name, (RK4, ""))
        if method is not RK4:
            limit = common.step_flops(options, method) / rate["bf16" in words(name)]
            share = f"{limit / median:.0%}"
        rows.append(
            {
                "contender": name,
                "seconds": f"{median:.3f}",
                "ratio": f"{seconds['plain recipe'] / median:.2f}",
                "share of the limit": share,
                "peak GiB": f"{memory[name]:.2f}",
            }
        )
    name = f"step_{options.dataset}_tf32" if options.tf32 else f"step_{options.dataset}"
    common.write_record(name, f"training step, {common.describe(options)}", rows)


def words(name: str) -> set[str]:
    return set(name.split(", "))


def flow_step(flow: Flow, x: Tensor, how: set[str]) -> Callable[[], None]:
    bf16 = "bf16" in how
    solve = RecordedSolves(len(x)) if "graphs" in how else integrate

    def loss() -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            return objective(flow.solve(x, integrate=solve).state, LAMBDA, LAMBDA)

    return adam_step(flow, loss)


def plain_step(flow: Flow, x: Tensor) -> Callable[[], None]:
    plain = PlainFlow(flow, method="rk4", options={"step_size": 0.25})
    return adam_step(plain, lambda: plain.loss(x, LAMBDA, LAMBDA))


def adam_step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), 1e-5)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
