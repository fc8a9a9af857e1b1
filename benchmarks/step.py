"""One training step (forward, gradient, Adam), beside the plain recipe.

python benchmarks/step.py [--dataset fashion_mnist] [--batch 32] [--channels 64] [--repetitions 3]
                          [--compile] [--quick]

Every contender has the same weights, batch and λ. `radau` has three steps a piece; `radau 1/2` and
`radau 1/4` are the first grid of the default, solver=auto, and its grid after one refinement.
Repetitions are interleaved. The table gives medians, the ratio to the plain recipe, the share of
the limit and the peak memory of the step. The limit is the time that the convolutions of the step
would take at the rate of a 3×3 convolution in the same run. The results are also written to
outputs/benchmarks/step_DATASET.csv and .png.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import common
from common import COARSE, DEVICE, FINE, LAMBDA, RADAU, RK4, SIMPSON, make_flow
from plain import PlainFlow
from rnode import Flow, objective
from rnode.app.launch import prepare_process
from rnode.training.solving import compile_solves

CONTENDERS = {  # name: (training method, gradient, bfloat16 in f, compiled)
    "rk4, adjoint": (RK4, "adjoint", False, False),
    "rk4, backprop": (RK4, "backprop", False, False),
    "simpson, backprop": (SIMPSON, "backprop", False, False),
    "radau, backprop": (RADAU, "backprop", False, False),
    "radau 1/2, backprop": (COARSE, "backprop", False, False),
    "radau 1/4, backprop": (FINE, "backprop", False, False),
    "radau, checkpoint": (RADAU, "checkpoint", False, False),
    "radau, backprop, bf16": (RADAU, "backprop", True, False),
    "radau 1/2, backprop, bf16": (COARSE, "backprop", True, False),
    "radau, backprop, compiled": (RADAU, "backprop", False, True),
    "radau, backprop, bf16, compiled": (RADAU, "backprop", True, True),
}


def main() -> None:
    parser = common.arguments(__doc__)
    help = "add compiled contenders, which take some minutes more"
    parser.add_argument("--compile", action="store_true", help=help)
    options = common.parse(parser)
    prepare_process()

    x = common.images(options)
    contenders = {name: c for name, c in CONTENDERS.items() if options.compile or not c[3]}
    steps = {"plain recipe": plain_step(make_flow(options), x)}
    for name, (method, gradient, bf16, compiled) in contenders.items():
        steps[name] = flow_step(make_flow(options, method, gradient), x, bf16, compiled)
    memory = {name: common.peak_memory(step) for name, step in steps.items()}
    dtypes = {False: torch.float32, True: torch.bfloat16}
    convolutions = {bf16: common.convolution(options, dtype) for bf16, dtype in dtypes.items()}
    timed = steps | {bf16: function for bf16, (function, _) in convolutions.items()}
    seconds = common.medians(timed, options.repetitions)
    rate = {bf16: flops / seconds.pop(bf16) for bf16, (_, flops) in convolutions.items()}  # FLOP/s

    rows = []
    for name, median in seconds.items():
        share = ""
        if name in contenders and contenders[name][0] is not RK4:
            method, _, bf16, _ = contenders[name]
            share = f"{common.step_flops(options, method) / rate[bf16] / median:.0%}"
        rows.append(
            {
                "contender": name,
                "seconds": f"{median:.3f}",
                "ratio": f"{seconds['plain recipe'] / median:.2f}",
                "share of the limit": share,
                "peak GiB": f"{memory[name]:.2f}",
            }
        )
    title = f"training step, {common.describe(options)}"
    common.report(f"step_{options.dataset}", title, rows)


def flow_step(flow: Flow, x: Tensor, bf16: bool, compiled: bool) -> Callable[[], None]:
    if compiled:
        compile_solves(flow)

    def loss() -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            return objective(flow(x), LAMBDA, LAMBDA)

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
