"""Error of likelihoods by dopri5, by its tolerance and by what its error norm spans.

python benchmarks/tolerance.py [--seconds 60] [--root DIR] [--quick]

Flows of the command line are trained for so many seconds: of digits, of FashionMNIST 14×14 whose
files are in `--root`, and of two tables. Errors are those of single test samples in bits/dim,
beside dopri5 at 1e-8 in float64. `norm=rows` bounds the error of each sample, `norm=batch` their
mean.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import rnode
from bases import QUIET, ROOT
from common import EXACT, as_time, write_record
from rnode import Method, Solver
from rnode.evaluation import solve_and_measure
from table_data import TABLES

SMALL = ["dataset.resize=14", "dataset.batch_size=32", "model.hidden=32", "model.pieces=1"]
SAMPLES = 500
TOLERANCES = (1e-3, 1e-4, 1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60, help="seconds of training")
    parser.add_argument("--root", help="folder of FashionMNIST")
    parser.add_argument("--quick", action="store_true", help="2 seconds, the digits")
    options = parser.parse_args()
    data = {"digits": ["dataset=digits"]}
    if options.root:
        name = "FashionMNIST 14×14"
        data[name] = ["dataset=fashion_mnist", f"dataset.root={options.root}", *SMALL]
    with tempfile.TemporaryDirectory() as folder:
        if not options.quick:
            for name in ("moons", "patches"):
                np.save(path := Path(folder, f"{name}.npy"), TABLES[name]())
                data[name] = ["dataset=table", f"dataset.path={path}"]
        rows = []
        for name, dataset in data.items():
            run = Path(folder, f"run{len(rows)}")
            seconds = 2 if options.quick else options.seconds
            limits = [f"trainer.max_time={as_time(seconds)}"]
            train = [sys.executable, ROOT / "src/train.py", *dataset, *limits, *QUIET]
            train += ["trainer.max_epochs=-1", f"hydra.run.dir={run}"]
            subprocess.run(train, check=True, stdout=subprocess.DEVNULL)
            rows += measure(name, rnode.load(run))
    write_record("tolerance", "likelihoods by dopri5", rows)


@torch.no_grad()
def measure(name: str, density: rnode.Density) -> list[dict[str, str]]:
    """Compare the likelihoods of test samples with those of a fine tolerance."""
    data, flow = density.data, density.flow
    data.setup()
    count = min(SAMPLES, len(data.splits.test))
    batch = data.transform.for_evaluation(*data.fetch("test", range(count)), 0)

    def bits(method: Method, dtype: str = "float32") -> tuple[torch.Tensor, int]:
        flow.solver = Solver(method, method, dtype=dtype)
        solution, measures = solve_and_measure(flow, batch, 0)
        return measures.bits_per_dim.double(), solution.nfe_forward

    exact, _ = bits(EXACT, "float64")
    rows = []
    for norm in ("rows", "batch"):
        for tolerance in TOLERANCES:
            found, nfe = bits(Method("dopri5", rtol=tolerance, atol=tolerance, norm=norm))
            error = (found - exact).abs()
            rows.append(
                {
                    "data": name,
                    "norm": norm,
                    "tolerance": f"{tolerance:.0e}",
                    "error of the mean": f"{abs((found - exact).mean()):.1e}",
                    "largest error": f"{error.max():.1e}",
                    "NFE": str(nfe),
                }
            )
    return rows


if __name__ == "__main__":
    main()
