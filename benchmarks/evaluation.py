"""Likelihood of a batch by dopri5 at 1e-5, side by side with the plain recipe.

python benchmarks/evaluation.py [--dataset fashion_mnist] [--batch 32] [--channels 64] [--repetitions 3] [--quick]

Same weights, data, probes and tolerance. The plain recipe's right-hand side calls autograd.grad, and its solver starts with
FFJORD's step of 0.01; ours is shown with that step too. The share is of the limit: the time that the convolutions would take
at the rate a 3×3 convolution reaches in the same run. Errors are relative, the largest of the batch, against dopri5 at 1e-8.
Written to outputs/benchmarks/evaluation_DATASET.csv and .png as well.
"""

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
    report,
)
from plain import PlainFlow
from rnode import Method, Solver, log_normal
from rnode.allocator import keep_freed_memory
from rnode.solver import error_norm


def main() -> None:
    options = parse(arguments(__doc__))
    keep_freed_memory()
    x = images(options)
    flow = make_flow(options).eval()
    plain = PlainFlow(flow, **FFJORD.arguments(error_norm))

    @torch.no_grad()
    def evaluate_plain():
        torch.manual_seed(0)
        z, l, *_ = plain(x)
        return log_normal(z) + l

    @torch.inference_mode()
    def evaluate(method: Method):
        flow.solver = Solver(RK4, method)
        torch.manual_seed(0)
        return flow.log_prob(x)

    convolutions, flops = convolution(options, torch.float32)
    contenders = {
        "plain recipe": evaluate_plain,
        "log_prob, first step 0.01": lambda: evaluate(FFJORD),
        "log_prob": lambda: evaluate(DOPRI5),
    }
    exact = evaluate(EXACT)
    errors = {name: ((contender() - exact).abs() / exact.abs()).max() for name, contender in contenders.items()}
    nfe = {}
    for name, method in zip(contenders, (FFJORD, FFJORD, DOPRI5), strict=True):
        evaluate(method)
        nfe[name] = flow.nfe[0]
    seconds = medians(contenders | {"convolutions": convolutions}, options.repetitions)
    rate = flops / seconds.pop("convolutions")
    per_evaluation = options.batch * evaluation_flops(SHAPES[options.dataset], options.channels) / len(flow.pieces)
    rows = []
    for name, s in seconds.items():
        limit = 2 * nfe[name] * per_evaluation / rate  # f and a product, as if every piece had taken as many
        row = {"contender": name, "seconds": f"{s:.3f}", "ratio": f"{seconds['plain recipe'] / s:.2f}"}
        rows.append(row | {"share of the limit": f"{limit / s:.0%}", "NFE": str(nfe[name]), "error": f"{errors[name]:.1e}"})
    report(f"evaluation_{options.dataset}", f"likelihood, dopri5 1e-5, {describe(options)}", rows)


if __name__ == "__main__":
    main()
