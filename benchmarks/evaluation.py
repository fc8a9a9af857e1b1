"""Likelihood of a batch by dopri5 at 1e-5, beside the plain recipe.

python benchmarks/evaluation.py [--dataset fashion_mnist] [--batch 32] [--channels 64]
                                [--repetitions 3] [--quick]

Weights, data, probes and tolerance are the same. The right-hand side of the plain recipe calls
autograd.grad, and its solver starts with FFJORD's step of 0.01; one contender of this program has
that step too. `auto` is the grid that solver.test.method=auto takes, and its choice is not timed.
The limit is the time that the convolutions would take at the rate of a 3×3
convolution in the same run. Errors are relative to dopri5 at 1e-8, the largest one of the batch.
The record is benchmarks/results/evaluation_DATASET.json.
"""

import math

import torch

from common import (
    DOPRI5,
    EXACT,
    FFJORD,
    RK4,
    SHAPES,
    arguments,
    convolution,
    describe,
    evaluation_flops,
    images,
    make_flow,
    medians,
    parse,
    write_record,
)
from plain import PlainFlow
from rnode import Method, Solution, Solver, log_normal
from rnode.app.processes import prepare_process
from rnode.evaluation import GRID_SAMPLES, agreeing_grid


def main() -> None:
    options = parse(arguments(__doc__))
    prepare_process()
    x = images(options)
    flow = make_flow(options).eval()
    plain = PlainFlow(flow, **FFJORD.odeint_options(torch.float32))

    @torch.no_grad()
    def plain_log_prob():
        torch.manual_seed(0)
        z, l, *_ = plain(x)
        return log_normal(z) + l

    @torch.inference_mode()
    def solve(method: Method) -> Solution:
        flow.solver = Solver(RK4, method)
        torch.manual_seed(0)
        return flow.solve(x)

    def log_prob(method: Method):
        state = solve(method).state
        return log_normal(state.z) + state.l

    convolutions, flops = convolution(options, torch.float32)
    contenders = {
        "plain recipe": plain_log_prob,
        "log_prob, first step 0.01": lambda: log_prob(FFJORD),
        "log_prob": lambda: log_prob(DOPRI5),
    }
    flow.solver = Solver(RK4, Method("auto"))
    to_bits = -1 / flow.d / math.log(2)
    with agreeing_grid(flow, lambda: to_bits * log_prob(flow.solver.test), GRID_SAMPLES + 1):
        auto = flow.solver.test
    contenders["log_prob, auto"] = lambda: log_prob(auto)
    exact = log_prob(EXACT)
    methods = dict(zip(contenders, (FFJORD, FFJORD, DOPRI5, auto), strict=True))
    nfe = {name: solve(method).nfe_forward for name, method in methods.items()}
    errors = {
        name: float(((contender() - exact).abs() / exact.abs()).max())
        for name, contender in contenders.items()
    }
    seconds = medians(contenders | {"convolutions": convolutions}, options.repetitions)
    rate = flops / seconds.pop("convolutions")
    all_pieces = evaluation_flops(SHAPES[options.dataset], options.channels)
    one_piece = options.batch * all_pieces / len(flow.pieces)  # on average
    rows = []
    for name, s in seconds.items():
        limit = 2 * nfe[name] * one_piece / rate  # f and a product, as if all pieces had equal NFE
        rows.append(
            {
                "contender": name,
                "seconds": f"{s:.3f}",
                "ratio": f"{seconds['plain recipe'] / s:.2f}",
                "share of the limit": f"{limit / s:.0%}",
                "NFE": str(nfe[name]),
                "error": f"{errors[name]:.1e}",
            }
        )
    title = f"likelihood, dopri5 1e-5, {describe(options)}"
    write_record(f"evaluation_{options.dataset}", title, rows)


if __name__ == "__main__":
    main()
