"""`rnode evaluate`: measure a trained flow on a split of its data."""

import json
import math
from pathlib import Path

import polars as pl
import torch
from omegaconf import DictConfig
from rich.progress import track
from rich.table import Table

from rnode.app.density import from_checkpoint
from rnode.app.printing import print_table, quantities
from rnode.errors import require
from rnode.evaluation import evaluate
from rnode.training.plots import plot_extremes
from rnode.transforms import ImageTransform

EXTREMES = 32  # images in each half of extremes.png


def main(cfg: DictConfig) -> float:
    """Write evaluation.json, evaluation.txt, samples.csv and extremes.png; return the bits/dim."""
    density, fabric = from_checkpoint(cfg)
    data, flow = density.data, density.flow
    data.setup()
    rows = getattr(data.splits, cfg.split)
    fixed = isinstance(rows, torch.Tensor)
    require(fixed, f"split={cfg.split}: must be val or test; these training data change each epoch")
    batches = data.eval_dataloader(cfg.split)
    batches = track(batches, f"{cfg.split} set", disable=not fabric.is_global_zero)
    summary, columns = evaluate(flow, data.transform, batches, cfg.samples, cfg.seed)
    if not fabric.is_global_zero:
        return summary["bits_per_dim"]
    summary |= {
        "divergence": str(flow.test_probes),
        "ckpt_path": cfg.ckpt_path,
        "split": cfg.split,
        "seed": cfg.seed,
        "dimensions": flow.d,
        "solver": vars(flow.solver.test),
    }
    columns["index"] = columns["index"].long()
    if "bounds" in columns:
        columns["bound"] = columns.pop("bounds")[-1]
    folder = Path(cfg.folder)
    frame = pl.DataFrame({name: column.numpy() for name, column in columns.items()})
    frame.write_csv(folder / "samples.csv")
    if isinstance(data.transform, ImageTransform):
        bits = columns["bits_per_dim"]
        plot_extremes(rows, bits, data.transform, EXTREMES, folder / "extremes.png")
    (folder / "evaluation.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (folder / "evaluation.txt").write_text(print_table(make_table(summary)), encoding="utf-8")
    print(f"folder: {folder}")
    return summary["bits_per_dim"]


def make_table(s: dict) -> Table:
    """Return the table of an evaluation, from its summary."""
    nats = s["dimensions"] * math.log(2)
    bits, error = s["bits_per_dim"], s["standard_error_images"]
    table = quantities(f"{s['split']} set, {s['samples']} samples")
    table.add_row("bits/dim", f"{bits:.4f}")
    table.add_row("  standard error over samples", f"{error:.4f}")
    table.add_row("  standard error over probes", f"{s['standard_error_probes']:.4f}")
    table.add_row("negative log-likelihood, nats", f"{bits * nats:.3f} ± {error * nats:.3f}")
    if "bound" in s:
        bound = f"{s['bound']:.4f} ± {s['bound_standard_error']:.4f}"
        table.add_row(f"importance-weighted bound, {len(s['bound_by_noises'])} noises", bound)
        table.add_row("midpoint (bin centre: no bound)", f"{s['midpoint']:.4f}")
    nfe = f"{s['nfe']:.1f} ({s['nfe_min']} – {s['nfe_max']})"
    table.add_row("NFE per batch (least – most)", nfe)
    table.add_row("divergence", s["divergence"])
    for name in ("kinetic", "jacobian", "transport_cost", "straightness", "inverse_error"):
        table.add_row(name.replace("_", " "), f"{s[name]:.3g}")
    return table
