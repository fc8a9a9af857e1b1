"""`rnode evaluate`: measure a trained flow on a split of its data."""

import json
from pathlib import Path

import polars as pl
from omegaconf import DictConfig
from rich.progress import track
from torch import Tensor

from rnode.app.density import from_checkpoint
from rnode.app.summary import print_numbers
from rnode.evaluation import GRID_SAMPLES, agreeing_grid, evaluate, solve_and_measure
from rnode.training.plots import save_figure

EXTREMES = 32  # images in each half of extremes.png


def main(cfg: DictConfig) -> float:
    """Write evaluation.json, samples.csv and extremes.png; return the bits/dim."""
    density = from_checkpoint(cfg)
    data, flow = density.data_, density.flow_
    folder = Path(cfg.folder)
    data.setup()
    weights = data.splits.weights_of(cfg.split)
    loader = data.eval_dataloader(cfg.split)
    first = (part[:GRID_SAMPLES] for part in next(iter(loader)))
    batch = data.transform.for_evaluation(*first, cfg.seed).to(density.device)

    def bits() -> Tensor:
        return solve_and_measure(flow, batch, cfg.seed)[1].bits_per_dim

    with agreeing_grid(flow, bits, len(loader.dataset)) as words:
        batches = track(loader, f"{cfg.split} set")
        summary, columns = evaluate(flow, data.transform, batches, cfg.samples, cfg.seed, weights)
        method = flow.solver.test
    if "bounds" in columns:
        columns["bound"] = columns.pop("bounds")[-1]
    frame = pl.DataFrame({name: column.numpy() for name, column in columns.items()})
    frame.with_row_index().write_csv(folder / "samples.csv")
    if density.columns_ is None:
        images, bits_per_dim = getattr(data.splits, cfg.split), columns["bits_per_dim"]
        order = bits_per_dim.argsort()
        panels = {}
        for name, chosen in (("most", order[:EXTREMES]), ("least", order.flip(0)[:EXTREMES])):
            low, high = bits_per_dim[chosen].aminmax()
            panels[f"{name} likely: {low:.2f} to {high:.2f} bits/dim"] = images[chosen]
        save_figure(density.draw(panels), folder / "extremes.png")
    numbers = {name: value for name, value in summary.items() if not isinstance(value, list)}
    divergence = "exact" if flow.exact else str(flow.test_probes)
    print_numbers(f"{cfg.split} set, divergence: {divergence}", numbers)
    print(f"by {words}")
    settings = {
        "divergence": divergence,
        "ckpt_path": cfg.ckpt_path,
        "split": cfg.split,
        "seed": cfg.seed,
        "dimensions": flow.d,
        "solver": vars(method),
        "agreement": words,
    }
    text = json.dumps(summary | settings, indent=2)
    (folder / "evaluation.json").write_text(f"{text}\n", encoding="utf-8")
    print(f"folder: {folder}")
    return summary["bits_per_dim"]
