"""What each training solver gives on a trained flow, against dopri5 at 1e-7: z, l, E, n and bits/dim.

python benchmarks/solvers.py CHECKPOINT… (best.ckpt of a run on digits)

In float64, on 128 training images with the same noise and probes for every solver. `l`, `E` and `n` are the relative errors
of their means, `worst` the largest error of one image's bits/dim. Written to outputs/benchmarks/solvers_….csv.
"""

import argparse
import math
from pathlib import Path

import torch

from common import RADAU, RK4, SIMPSON, write_table
from rnode import Dequantize, Logit, Method, Probes, Solver, State, log_normal, multiscale
from rnode.checkpoint import flow_weights, load_checkpoint
from rnode.data import digits

METHODS = {
    "dopri5 1e-5": Method("dopri5"),
    "rk4 1/4, system": RK4,
    "rk4 1/4, simpson": SIMPSON,
    "rk4 1/2, simpson": Method("rk4", "simpson", step_size=1 / 2),
    "rk4 1/4, radau": Method("rk4", "radau", step_size=1 / 4),
    "rk4 1/3, radau": RADAU,
    "rk4 1/2, radau": Method("rk4", "radau", step_size=1 / 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    torch.manual_seed(0)
    x = digits(validation=180, test=360).train[:128]
    u, _ = Dequantize(17)(x, torch.rand(x.shape, dtype=torch.float64))
    y, _ = Logit(1e-5)(u.double())
    for path in parser.parse_args().checkpoints:
        compare(path, y)


def compare(path: str, y: torch.Tensor) -> None:
    checkpoint = load_checkpoint(path)
    flow = multiscale((1, 8, 8), Solver(RK4, RK4), Probes(), hidden=checkpoint["config"]["model"]["hidden"]).double()
    flow.load_state_dict(flow_weights(checkpoint, path))

    @torch.no_grad()
    def solve(method: Method) -> tuple[State, torch.Tensor, int]:
        flow.solver = Solver(method, method)
        torch.manual_seed(1)
        state = flow(y)
        return state, -(log_normal(state.z) + state.l) / (flow.d * math.log(2)), flow.nfe[0]

    exact, exact_bits, _ = solve(Method("dopri5", rtol=1e-7, atol=1e-7))
    rows = []
    for name, method in METHODS.items():
        state, bits, nfe = solve(method)
        row = {"solver": name, "NFE": str(nfe), "bits/dim": f"{(bits - exact_bits).mean():+.6f}"}
        row["worst"] = f"{(bits - exact_bits).abs().max():.5f}"
        row["z"] = f"{(state.z - exact.z).abs().max():.1e}"
        for quantity, ours, truth in zip("lEn", state[1:], exact[1:], strict=True):
            row[quantity] = f"{(ours.mean() / truth.mean() - 1):+.1e}"
        rows.append(row)
    write_table(f"solvers_{Path(path).parent.name}", f"errors against dopri5 1e-7, {path}", rows)


if __name__ == "__main__":
    main()
