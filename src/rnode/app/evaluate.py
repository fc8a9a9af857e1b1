"""`rnode evaluate`: measure a trained flow on a split of its data."""

import csv
import json
import math
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.progress import track
from rich.table import Table

from rnode.app.build import from_checkpoint
from rnode.app.printing import print_table, quantities
from rnode.distributed import rank_and_world_size
from rnode.errors import require
from rnode.evaluation import evaluate
from rnode.training.plots import plot_extremes
from rnode.transforms import TableTransform

EXTREMES = 32  # images in each half of extremes.png


def main(cfg: DictConfig) -> float:
    """Write evaluation.json, evaluation.txt, samples.csv and extremes.png; return the bits/dim."""
    data, flow, fabric = from_checkpoint(cfg)
    data.setup()
    rows = getattr(data.splits, cfg.split)
    fixed = isinstance(rows, torch.Tensor)
    require(fixed, f"split={cfg.split}: must be val or test; these training data change each epoch")
    first = fabric.is_global_zero
    batches = data.eval_dataloader(cfg.split, *rank_and_world_size())
    batches = track(batches, f"{cfg.split} set", disable=not first)
    summary, columns = evaluate(flow, data.transform, batches, cfg.samples, cfg.seed)
    if not first:
        return summary["bits_per_dim"]
    summary |= {
        "divergence": str(flow.test_probes),
        "ckpt_path": cfg.ckpt_path,
        "split": cfg.split,
        "seed": cfg.seed,
        "dimensions": flow.d,
        "solver": vars(flow.solver.test),
    }
    if "bounds" in columns:
        columns["bound"] = columns.pop("bounds")[-1]
    columns["index"] = columns["index"].long()
    folder = Path(HydraConfig.get().runtime.output_dir)
    with open(folder / "samples.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(values.tolist() for values in columns.values()), strict=True))
    if not isinstance(data.transform, TableTransform):
        path, bits = folder / "extremes.png", columns["bits_per_dim"]
        plot_extremes(rows, bits, data.transform, EXTREMES, path)
    (folder / "evaluation.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (folder / "evaluation.txt").write_text(print_table(make_table(summary)), encoding="utf-8")
    print(f"folder: {folder}")
    return summary["bits_per_dim"]


def make_table(summary: dict) -> Table:
    """Return the table of an evaluation."""
    table = quantities(f"{summary['split']} set, {summary['samples']} samples")
    nats = summary["dimensions"] * math.log(2)
    noises = len(summary.get("bound_by_noises", ()))
    s = summary | {
        "nats": summary["bits_per_dim"] * nats,
        "nats_error": summary["standard_error_images"] * nats,
        "by_piece": " ".join(f"{nfe:.0f}" for nfe in summary["nfe_by_piece"]),
    }
    for name, form in {
        f"bits/dim{', uniform dequantization' * (noises > 0)}": "{bits_per_dim:.4f}",
        "  standard error over samples": "{standard_error_images:.4f}",
        "  standard error over probes": "{standard_error_probes:.4f}",
        "negative log-likelihood, nats": "{nats:.3f} ± {nats_error:.3f}",
        f"importance-weighted bound, {noises} noises": "{bound:.4f} ± {bound_standard_error:.4f}",
        "midpoint (bin centre: no bound)": "{midpoint:.4f}",
        "divergence": "{divergence}",
        "NFE per batch (least – most)": "{nfe:.1f} ({nfe_min} – {nfe_max})",
        "NFE by piece": "{by_piece}",
        "kinetic energy / d": "{kinetic:.4f}",
        "squared Jacobian norm / d": "{jacobian:.4f}",
        "transport cost ‖x − z‖² / d": "{transport_cost:.4f}",
        "straightness (0: straight, at constant speed)": "{straightness:.4f}",
        "inverse error max |x − inverse(forward(x))|": "{inverse_error:.1e}",
    }.items():
        if noises or not form.startswith(("{bound", "{midpoint")):
            table.add_row(name, form.format(**s))
    return table
