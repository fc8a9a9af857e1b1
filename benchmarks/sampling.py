"""Sampling by dopri5 at 1e-5 and by rk4, side by side with the plain recipe run backwards, its integrals with it.

python benchmarks/sampling.py [--dataset fashion_mnist] [--batch 32] [--channels 64] [--repetitions 3] [--quick]

Same weights and normal variables. Written to outputs/benchmarks/sampling_DATASET.csv and .png as well.
"""

import torch
import torch.nn.functional as F
from torchdiffeq import odeint

from common import DEVICE, DOPRI5, RK4, arguments, describe, make_flow, medians, parse, report
from plain import PlainFlow, PlainODE
from rnode import Flow
from rnode.allocator import keep_freed_memory
from rnode.solver import error_norm


def main() -> None:
    options = parse(arguments(__doc__))
    keep_freed_memory()
    flow = make_flow(options)  # in evaluation mode solved by dopri5, in training mode by rk4
    plain = PlainFlow(flow)
    z = torch.randn(options.batch, flow.d, device=DEVICE)
    methods = {"dopri5 1e-5": (False, DOPRI5.arguments(error_norm)), "rk4 0.25": (True, RK4.arguments(error_norm))}

    def ours(training: bool):
        flow.train(training)
        with torch.inference_mode():
            return flow.inverse(z)

    rows = []
    for method, (training, keywords) in methods.items():
        contenders = {
            f"plain recipe, {method}": lambda keywords=keywords: plain_inverse(plain, flow, z, keywords),
            f"inverse, {method}": lambda training=training: ours(training),
        }
        expected, drawn = (contender() for contender in contenders.values())
        difference = (drawn - expected).abs().max()
        seconds = medians(contenders, options.repetitions)
        first = next(iter(seconds.values()))
        rows += [
            {"contender": name, "seconds": f"{s:.3f}", "ratio": f"{first / s:.2f}", "max difference": f"{difference:.1e}"}
            for name, s in seconds.items()
        ]
    report(f"sampling_{options.dataset}", f"sampling, {describe(options)}", rows)


@torch.no_grad()
def plain_inverse(plain: PlainFlow, flow: Flow, z: torch.Tensor, keywords: dict) -> torch.Tensor:
    zero, t = z.new_zeros(len(z)), torch.tensor([1.0, 0.0], device=DEVICE)

    def run(nets, z):
        for net in reversed(nets):
            z = odeint(PlainODE(net, torch.randn_like(z)), (z, zero, zero, zero), t, **keywords)[0][-1]
        return z

    *halves, z = z.split([*(torch.Size(s).numel() for s in flow.factored_shapes), flow.last_shape.numel()], dim=1)
    z = run(plain.last, z.unflatten(1, flow.last_shape))
    for (before, after), half, shape in zip(plain.scales[::-1], halves[::-1], flow.factored_shapes[::-1], strict=True):
        z = run(before, F.pixel_shuffle(run(after, torch.cat([z, half.unflatten(1, shape)], dim=1)), 2))
    return z


if __name__ == "__main__":
    main()
