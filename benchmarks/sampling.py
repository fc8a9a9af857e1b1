"""Sampling by dopri5 at 1e-5 and by rk4, side by side with the plain recipe run backwards, its integrals with it.

python benchmarks/sampling.py [--dataset fashion_mnist] [--batch 32] [--channels 64] [--repetitions 3] [--quick]

Same weights, normal variables and tolerance; the plain recipe's adaptive solver starts with FFJORD's step of 0.01, ours with
this project's own. Errors are the largest of the batch, against dopri5 at 1e-8. Written to
outputs/benchmarks/sampling_DATASET.csv and .png as well.
"""

import torch
import torch.nn.functional as F
from torchdiffeq import odeint

from common import DEVICE, DOPRI5, EXACT, FFJORD, RK4, arguments, describe, make_flow, medians, parse, report
from plain import PlainFlow, PlainODE
from rnode import Flow, Method, Solver
from rnode.allocator import keep_freed_memory
from rnode.solver import error_norm


def main() -> None:
    options = parse(arguments(__doc__))
    keep_freed_memory()
    flow = make_flow(options)
    plain = PlainFlow(flow)
    z = torch.randn(options.batch, flow.d, device=DEVICE)

    def ours(method: Method):
        flow.eval().solver = Solver(RK4, method)
        with torch.inference_mode():
            return flow.inverse(z)

    exact = ours(EXACT)

    rows = []
    for name, plains, method in (("dopri5 1e-5", FFJORD, DOPRI5), ("rk4 0.25", RK4, RK4)):
        keywords = plains.arguments(error_norm)
        contenders = {
            f"plain recipe, {name}": lambda keywords=keywords: plain_inverse(plain, flow, z, keywords),
            f"inverse, {name}": lambda method=method: ours(method),
        }
        errors = {contender: (draw() - exact).abs().max() for contender, draw in contenders.items()}
        ours(plains)
        nfe = [flow.nfe_inverse]
        ours(method)
        nfe.append(flow.nfe_inverse)
        seconds = medians(contenders, options.repetitions)
        first = next(iter(seconds.values()))
        rows += [
            {
                "contender": contender,
                "seconds": f"{s:.3f}",
                "ratio": f"{first / s:.2f}",
                "NFE": str(n),
                "error": f"{errors[contender]:.1e}",
            }
            for (contender, s), n in zip(seconds.items(), nfe, strict=True)
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
