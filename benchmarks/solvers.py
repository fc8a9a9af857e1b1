"""Errors of the training solvers on a trained flow, against dopri5 at 1e-7.

python benchmarks/solvers.py CHECKPOINT… (best.ckpt of a run on digits)

The state is in float64; data, noise and probes are the same for every solver, 128 training images.
`l`, `E` and `n` are the relative errors of their means, `worst` is the largest error of an image's
bits/dim. The results are also written to outputs/benchmarks/solvers_….csv.
"""

import argparse
import math
from pathlib import Path

import torch

from common import RADAU, RK4, SIMPSON, write_table
from rnode import Dequantize, Logit, Method, Probes, Solver, State, log_normal, multiscale
from rnode.data.images import digits
from rnode.training.checkpoint import flow_weights, load_checkpoint

METHODS = {
    "dopri5 1e-5": Method("dopri5"),
    "rk4 1/4, system": RK4,
    "rk4 1/4, simpson": SIMPSON,
    "rk4 1/2, simpson": Method("rk4", "simpson", steps=2),
    "rk4 1/4, radau": Method("rk4", "radau", steps=4),
    "rk4 1/3, radau": RADAU,
    "rk4 1/2, radau": Method("rk4", "radau", steps=2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    checkpoints = parser.parse_args().checkpoints
    torch.manual_seed(0)
    x = digits(validation=180, test=360).train[:128]
    u, _ = Dequantize(17)(x, torch.rand(x.shape, dtype=torch.float64))
    y, _ = Logit(1e-5)(u)
    for path in checkpoints:
        compare(path, y)


def compare(path: str, y: torch.Tensor) -> None:
    """Write the table of one checkpoint for transformed images y (B, 1, 8, 8)."""
    checkpoint = load_checkpoint(path)
    hidden = checkpoint["config"]["model"]["hidden"]
    flow = multiscale((1, 8, 8), Solver(RK4, RK4), Probes(), hidden=hidden).double()
    flow.load_state_dict(flow_weights(checkpoint))

    @torch.no_grad()
    def solve(method: Method) -> tuple[State, torch.Tensor, int]:
        flow.solver = Solver(method, method)
        torch.manual_seed(1)
        solution = flow.solve(y)
        state = solution.state
        bits = -(log_normal(state.z) + state.l) / (flow.d * math.log(2))
        return state, bits, solution.nfe_forward

    exact, exact_bits, _ = solve(Method("dopri5", rtol=1e-7, atol=1e-7))
    rows = []
    for name, method in METHODS.items():
        state, bits, nfe = solve(method)
        error = bits - exact_bits
        row = {"solver": name, "NFE": str(nfe), "bits/dim": f"{error.mean():+.6f}"}
        row["worst"] = f"{error.abs().max():.5f}"
        row["z"] = f"{(state.z - exact.z).abs().max():.1e}"
        for quantity, value, truth in zip("lEn", state[1:], exact[1:], strict=True):
            row[quantity] = f"{(value.mean() / truth.mean() - 1):+.1e}"
        rows.append(row)
    write_table(f"solvers_{Path(path).parent.name}", f"errors against dopri5 1e-7, {path}", rows)


if __name__ == "__main__":
    main()
