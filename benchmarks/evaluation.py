"""Likelihood of a batch by dopri5 at 1e-5, side by side with the plain recipe.

python benchmarks/evaluation.py [--dataset fashion_mnist] [--batch 32] [--channels 64] [--repetitions 3] [--quick]

Same weights, data, probes and tolerance. The plain recipe's right-hand side calls autograd.grad. The share is of the limit:
the time that the convolutions would take at the rate a 3×3 convolution reaches in the same run. Written to
outputs/benchmarks/evaluation_DATASET.csv and .png as well.
"""

import torch

from common import (
    DOPRI5,
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
from rnode import log_normal
from rnode.allocator import keep_freed_memory
from rnode.solver import error_norm


def main() -> None:
    options = parse(arguments(__doc__))
    keep_freed_memory()
    x = images(options)
    flow = make_flow(options).eval()
    plain = PlainFlow(flow, **DOPRI5.arguments(error_norm))

    @torch.no_grad()
    def evaluate_plain():
        torch.manual_seed(0)
        z, l, *_ = plain(x)
        return log_normal(z) + l

    @torch.inference_mode()
    def evaluate():
        torch.manual_seed(0)
        return flow.log_prob(x)

    difference = ((evaluate() - evaluate_plain()).abs() / evaluate_plain().abs()).max()
    convolutions, flops = convolution(options, torch.float32)
    contenders = {"plain recipe": evaluate_plain, "log_prob": evaluate, "convolutions": convolutions}
    seconds = medians(contenders, options.repetitions)
    rate = flops / seconds.pop("convolutions")
    per_evaluation = options.batch * evaluation_flops(SHAPES[options.dataset], options.channels) / len(flow.pieces)
    limit = 2 * flow.nfe[0] * per_evaluation / rate  # f and a product, as if every piece had taken as many
    rows = []
    for name, s in seconds.items():
        row = {"contender": name, "seconds": f"{s:.3f}", "ratio": f"{seconds['plain recipe'] / s:.2f}"}
        rows.append(row | {"share of the limit": f"{limit / s:.0%}", "NFE": str(flow.nfe[0])})
    report(f"evaluation_{options.dataset}", f"likelihood, dopri5 1e-5, {describe(options)}", rows)
    print(f"largest relative difference between the two: {difference:.1e}")


if __name__ == "__main__":
    main()
