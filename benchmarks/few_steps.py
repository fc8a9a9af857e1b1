"""A likelihood by few evaluations: errors of fixed grids on flows with and without the penalties.

python benchmarks/few_steps.py [--root DIR] [--samples 360] [--quick]

Trains flows in outputs/benchmarks/few_steps, unless they are there: of the digits as by default, of
FashionMNIST at 14×14 for 400 steps (`--root` holds its files), and of a table for ten epochs; with
both penalties, and with none. The likelihood of the first test samples is then computed by rk4 on
grids, by dopri5 as by default, and by the grid that solver.test.method=auto takes, which is chosen
by the first 64. All have the same noise and probes. Errors are in bits/dim, against dopri5 at 1e-6:
of the mean, of the worst sample, and Spearman's rank correlation. `whole evaluation` is what
`rnode evaluate` computes. Seconds are those of the processor, in one thread. The record is
benchmarks/results/few_steps.json, and the figure assets/few_steps.png.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import torch
from matplotlib.lines import Line2D
from scipy.stats import spearmanr
from torch import Tensor

from common import OUTPUTS, write_record
from rnode import Method, load
from rnode.app.density import Density
from rnode.app.processes import prepare_process
from rnode.evaluation import agreeing_grid, evaluate, solve_and_measure
from rnode.training.plots import COLOURS, save_figure, subplots
from table_data import TABLES

ROOT = Path(__file__).resolve().parent.parent
TABLE = "diamonds"
STEPS = (1, 2, 3, 4, 6, 8, 12, 16)
EXACT = Method("dopri5", rtol=1e-6, atol=1e-6)
PENALTIES = {"both": [], "none": ["regularizer=none"]}
QUIET = ["logger=csv", "callbacks.figures=null", "trainer.enable_progress_bar=false"]
SMALL = ["dataset.resize=14", "dataset.batch_size=32", "model.hidden=16", "model.pieces=1"]
LIMITS = ["trainer.max_epochs=1", "trainer.limit_train_batches=400"]
LIMITS += ["trainer.limit_val_batches=2", "trainer.limit_test_batches=1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", help="folder of FashionMNIST")
    parser.add_argument("--samples", type=int, default=360)
    parser.add_argument("--quick", action="store_true", help="the digits, four steps")
    options = parser.parse_args()
    prepare_process()
    torch.set_num_threads(1)
    runs = {"digits": ["dataset=digits"]}
    if options.root:
        fashion = ["dataset=fashion_mnist", f"dataset.root={options.root}", "optimizer.lr=1e-2"]
        runs["FashionMNIST 14×14"] = [*fashion, *SMALL, *LIMITS]
    if options.quick:
        runs["digits"] += ["trainer.max_steps=4"]
    else:
        path = OUTPUTS / f"{TABLE}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pl.DataFrame(TABLES[TABLE]()).write_parquet(path)
        runs[TABLE] = ["dataset=table", f"dataset.path={path}", "trainer.max_epochs=10"]

    rows, curves = [], {}
    for data, overrides in runs.items():
        for penalties, others in PENALTIES.items():
            folder = OUTPUTS / "few_steps" / f"{data}, {penalties}{' quick' * options.quick}"
            if not (folder / "result.json").exists():
                train([*overrides, *others, f"hydra.run.dir='{folder}'"])
            found, curve = compare(load(folder), options.samples)
            curves[data, penalties] = curve
            rows += [{"data": data, "penalties": penalties, **row} for row in found]
            print(*rows[-len(found) :], sep="\n", flush=True)
    plot(curves, OUTPUTS if options.quick else ROOT / "assets")
    write_record("few_steps", f"likelihood by few evaluations, {options.samples} samples", rows)


def train(overrides: list[str]) -> None:
    """Train in a process of its own."""
    command = [sys.executable, ROOT / "src/train.py", *QUIET, *overrides, "threads=1"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@torch.no_grad()
def compare(density: Density, samples: int) -> tuple[list[dict[str, str]], np.ndarray]:
    """Return the rows of a flow, and (NFE, error) of its grids."""
    data, flow = density.data_, density.flow_
    data.setup()
    index = torch.arange(min(samples, len(data.splits.test)))
    x, _, c = data.fetch("test", index)
    parts = index.split(180)

    def bits(chosen: Tensor) -> Tensor:
        nonlocal nfe
        batch = data.transform.for_evaluation(x[chosen], chosen, c[chosen], 0)
        solution, measures = solve_and_measure(flow, batch, 0)
        nfe = solution.nfe_forward
        return measures.bits_per_dim

    def row(name: str, seconds: float, values: Tensor | None = None) -> dict[str, str]:
        found = dict.fromkeys(("error", "worst", "rank correlation"), "")
        if values is not None:
            error = values - exact
            found["error"], found["worst"] = f"{error.mean():+.5f}", f"{error.abs().max():.4f}"
            found["rank correlation"] = f"{spearmanr(values, exact).statistic:.5f}"
        per_piece = f"{nfe / len(flow.pieces):.0f}"
        return {"method": name, "NFE a piece": per_piece, **found, "seconds": f"{seconds:.2f}"}

    def solve(method: Method) -> tuple[Tensor, float]:
        flow.solver = replace(solver, test=method)
        start = time.process_time()
        with agreeing_grid(flow, lambda: bits(index[:64]), len(index)) as words:
            values = torch.cat([bits(part) for part in parts])
        grids.append(words.split(",")[0])
        return values, time.process_time() - start

    solver, nfe, grids, rows, curve = flow.solver, 0, [], [], []
    exact, _ = solve(EXACT)
    for steps in STEPS:
        values, seconds = solve(Method("rk4", steps=steps))
        rows.append(row(f"rk4, {steps} steps", seconds, values))
        curve.append((nfe / len(flow.pieces), float((values - exact).mean().abs())))
    tested = replace(solver.test, method="dopri5")
    for name, method in (("dopri5", tested), ("auto", replace(tested, method="auto"))):
        values, seconds = solve(method)
        rows.append(row(f"auto: {grids[-1]}" if name == "auto" else name, seconds, values))
    for method in (tested, replace(tested, method="auto")):
        flow.solver = replace(solver, test=method)
        start = time.process_time()
        with agreeing_grid(flow, lambda: bits(index[:64]), len(index)):
            batches = ((x[part], part, c[part]) for part in parts)
            nfe = evaluate(flow, data.transform, batches, noises=4, seed=0)[0]["nfe"]
        rows.append(row(f"whole evaluation, {method.method}", time.process_time() - start))
    return rows, np.array(curve)


def plot(curves: dict[tuple[str, str], np.ndarray], folder: Path) -> None:
    """Plot errors of the mean bits/dim against evaluations of f in a piece."""
    figure, ((ax,),) = subplots(6, 4)
    names = list(dict.fromkeys(data for data, _ in curves))
    for (data, penalties), curve in curves.items():
        dashed, colour = ("-", "--")[penalties == "none"], COLOURS[names.index(data)]
        ax.plot(*curve.T, dashed, marker=".", color=colour)
    ax.set(xscale="log", yscale="log", xticks=[4, 8, 16, 32, 64], xticklabels=[4, 8, 16, 32, 64])
    ax.minorticks_off()
    ax.set(xlabel="evaluations of f in a piece", ylabel="error of the mean bits/dim")
    handles = [Line2D([], [], color=COLOURS[i], label=name) for i, name in enumerate(names)]
    kinds = (("-", "both penalties"), ("--", "no penalty"))
    handles += [Line2D([], [], color="black", linestyle=style, label=name) for style, name in kinds]
    ax.legend(handles=handles, frameon=False)
    save_figure(figure, folder / "few_steps.png")


if __name__ == "__main__":
    main()
