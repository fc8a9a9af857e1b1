"""Sampling by dopri5 at 1e-5 and on grids, beside the plain recipe solved backwards.

python benchmarks/sampling.py [--dataset fashion_mnist] [--batch 32] [--channels 64]
                              [--repetitions 3] [--quick]

Weights, normal variables and tolerance are the same. The plain recipe integrates l, E and n too,
and its adaptive solver starts with FFJORD's step of 0.01; this program starts with its own default.
`auto` is the grid that solver.test.method=auto takes; its choice is not timed. Errors are the
largest of the batch, against dopri5 at 1e-8. The record is
benchmarks/results/sampling_DATASET.json.
"""

from functools import partial

import torch
from torchdiffeq import odeint

from common import (
    DEVICE,
    DOPRI5,
    EXACT,
    FFJORD,
    RK4,
    arguments,
    describe,
    make_flow,
    medians,
    parse,
    write_record,
)
from plain import PlainFlow, PlainNet, PlainODE, unsqueeze
from rnode import Flow, Method, Solver, Squeeze
from rnode.app.processes import prepare_process
from rnode.evaluation import GRID_SAMPLES, agreeing_grid


def main() -> None:
    options = parse(arguments(__doc__))
    prepare_process()
    flow = make_flow(options).eval()
    plain = PlainFlow(flow)
    z = torch.randn(options.batch, flow.d, device=DEVICE)

    @torch.inference_mode()
    def inverse(method: Method) -> tuple[torch.Tensor, int]:
        flow.solver = Solver(RK4, method)
        frames, nfe = flow.solve_inverse(z)
        return frames[-1], nfe

    exact, _ = inverse(EXACT)
    rows = []
    for name, plain_method, method in (("dopri5 1e-5", FFJORD, DOPRI5), ("rk4 0.25", RK4, RK4)):
        keywords = plain_method.odeint_options(torch.float32)
        contenders = {
            f"plain recipe, {name}": partial(plain_inverse, plain, flow, z, keywords),
            f"inverse, {name}": lambda method=method: inverse(method)[0],
        }
        nfe = [inverse(plain_method)[1], inverse(method)[1]]
        if method is DOPRI5:
            flow.solver = Solver(RK4, Method("auto"))
            with agreeing_grid(flow, lambda: inverse(flow.solver.test)[0], GRID_SAMPLES + 1):
                auto = flow.solver.test
            contenders["inverse, auto"] = lambda auto=auto: inverse(auto)[0]
            nfe.append(inverse(auto)[1])
        errors = [float((sample() - exact).abs().max()) for sample in contenders.values()]
        seconds = medians(contenders, options.repetitions)
        first = next(iter(seconds.values()))
        for contender, n, error in zip(contenders, nfe, errors, strict=True):
            rows.append(
                {
                    "contender": contender,
                    "seconds": f"{seconds[contender]:.3f}",
                    "ratio": f"{first / seconds[contender]:.2f}",
                    "NFE": str(n),
                    "error": f"{error:.1e}",
                }
            )
    write_record(f"sampling_{options.dataset}", f"sampling, {describe(options)}", rows)


@torch.no_grad()
def plain_inverse(plain: PlainFlow, flow: Flow, z: torch.Tensor, keywords: dict) -> torch.Tensor:
    """z (B, d) → x (B, *shape) by the plain recipe."""
    zero, t = z.new_zeros(len(z)), torch.tensor([1.0, 0.0], device=DEVICE)
    parts = z.split([shape.numel() for shape in flow.z_shapes], dim=1)
    *factored, z = (part.unflatten(1, s) for part, s in zip(parts, flow.z_shapes, strict=True))
    for layer in reversed(plain.layers):
        if isinstance(layer, PlainNet):
            ode = PlainODE(layer, torch.randn_like(z))
            z = odeint(ode, (z, zero, zero, zero), t, **keywords)[0][-1]
        elif isinstance(layer, Squeeze):
            z = unsqueeze(z)
        else:
            z = torch.cat([z, factored.pop()], dim=1)
    return z


if __name__ == "__main__":
    main()
