"""Errors of the training solvers on a trained flow, against dopri5 at 1e-7.

python benchmarks/solvers.py CHECKPOINT…

Weights and state are in float64; data, noise and probes are the same for every solver: 128 training
samples. `l`, `E` and `n` are the relative errors of their means, `worst` is the largest error of a
sample's bits/dim. The record of outputs/DATASET/RUN/best.ckpt is
benchmarks/results/solvers_DATASET.json.
"""

import argparse
from pathlib import Path

import torch

from common import RADAU, RK4, SIMPSON, write_record
from rnode import Method, Probes, Solver, load
from rnode.evaluation import Measures, solve_and_measure
from rnode.flow import Solution

METHODS = {
    "dopri5 1e-5": Method("dopri5"),
    "rk4 1/4, system": RK4,
    "rk4 1/4, simpson": SIMPSON,
    "rk4 1/2, simpson": Method("rk4", "simpson", steps=2),
    "rk4 1/4, radau": Method("rk4", "radau", steps=4),
    "rk4 1/3, radau": RADAU,
    "rk4 1/2, radau": Method("rk4", "radau", steps=2),
}
EXACT = Method("dopri5", rtol=1e-7, atol=1e-7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    for path in parser.parse_args().checkpoints:
        compare(path)


def compare(path: str) -> None:
    """Write the table of one checkpoint."""
    density = load(path)
    data, flow = density.data_, density.flow_
    data.setup()
    flow.double().test_probes = Probes()
    index = torch.arange(128)
    batch = data.transform.for_evaluation(*data.fetch("train", index), seed=0)
    batch = batch._replace(y=batch.y.double())

    @torch.no_grad()
    def solve(method: Method) -> tuple[Solution, Measures]:
        flow.solver = Solver(method, method)
        return solve_and_measure(flow, batch, seed=0)

    exact, exact_measures = solve(EXACT)
    rows = []
    for name, method in METHODS.items():
        solution, measures = solve(method)
        error = measures.bits_per_dim - exact_measures.bits_per_dim
        nfe = str(solution.nfe_forward)
        row = {"solver": name, "NFE": nfe, "bits/dim": f"{error.mean():+.6f}"}
        row["worst"] = f"{error.abs().max():.5f}"
        row["z"] = f"{(solution.state.z - exact.state.z).abs().max():.1e}"
        for quantity, value, truth in zip("lEn", solution.state[1:], exact.state[1:], strict=True):
            row[quantity] = f"{(value.mean() / truth.mean() - 1):+.1e}"
        rows.append(row)
    dataset = Path(path).resolve().parent.parent.name
    write_record(f"solvers_{dataset}", f"errors against dopri5 1e-7, {path}", rows)


if __name__ == "__main__":
    main()
