"""`rnode evaluate`: measure a trained flow on a split of its data."""

import csv
import json
import math
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table

from rnode.app.build import from_checkpoint
from rnode.distributed import rank_and_world_size
from rnode.errors import require
from rnode.evaluation import evaluate
from rnode.training.plots import plot_extremes


def main(cfg: DictConfig) -> float:
    """Write evaluation.json, evaluation.txt, samples.csv and extremes.png; return the bits/dim."""
    data, flow, fabric = from_checkpoint(cfg)
    data.setup()
    rows = getattr(data.splits, cfg.split)
    fixed = isinstance(rows, torch.Tensor)
    require(fixed, f"split={cfg.split}: must be val or test; these training data change each epoch")
    first = fabric.is_global_zero
    batches = data.eval_dataloader(rows, *rank_and_world_size())
    batches = track(batches, f"{cfg.split} set", disable=not first)
    summary, columns = evaluate(flow, data.transform, batches, cfg.samples, cfg.seed)
    if not first:
        return summary["bits_per_dim"]
    probes = flow.probes
    exact = probes.divergence == "exact"
    summary |= {
        "divergence": "exact" if exact else f"{probes.count} {probes.divergence} probe(s) a sample",
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
    bits = columns["bits_per_dim"]
    plot_extremes(rows, bits, data.transform, cfg.pictures, folder / "extremes.png")
    (folder / "evaluation.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    console = Console(record=True)
    console.print(make_table(summary))
    (folder / "evaluation.txt").write_text(console.export_text(), encoding="utf-8")
    console.print(f"folder: {folder}", soft_wrap=True)
    return summary["bits_per_dim"]


def make_table(summary: dict) -> Table:
    """Return the table of an evaluation."""
    title = f"{summary['split']} set, {summary['samples']} samples"
    table = Table("quantity", title=title, title_justify="left")
    table.add_column("value", justify="right")
    bits, error = summary["bits_per_dim"], summary["standard_error_images"]
    nats = summary["dimensions"] * math.log(2)
    discrete = "bound" in summary
    table.add_row(f"bits/dim{', uniform dequantization' if discrete else ''}", f"{bits:.4f}")
    table.add_row("  standard error over samples", f"{error:.4f}")
    table.add_row("  standard error over probes", f"{summary['standard_error_probes']:.4f}")
    table.add_row("negative log-likelihood, nats", f"{bits * nats:.3f} ± {error * nats:.3f}")
    if discrete:
        name = f"importance-weighted bound, {len(summary['bound_by_noises'])} noises"
        bound, bound_error = summary["bound"], summary["bound_standard_error"]
        table.add_row(name, f"{bound:.4f} ± {bound_error:.4f}")
        table.add_row("midpoint (bin centre: no bound)", f"{summary['midpoint']:.4f}")
    table.add_row("divergence", summary["divergence"])
    nfe, least, most = summary["nfe"], summary["nfe_min"], summary["nfe_max"]
    table.add_row("NFE per batch (least – most)", f"{nfe:.1f} ({least} – {most})")
    table.add_row("NFE by piece", " ".join(f"{nfe:.0f}" for nfe in summary["nfe_by_piece"]))
    table.add_row("kinetic energy / d", f"{summary['kinetic']:.4f}")
    table.add_row("squared Jacobian norm / d", f"{summary['jacobian']:.4f}")
    table.add_row("transport cost ‖x − z‖² / d", f"{summary['transport_cost']:.4f}")
    straightness = f"{summary['straightness']:.4f}"
    table.add_row("straightness (0: straight, at constant speed)", straightness)
    inverse_error = f"{summary['inverse_error']:.1e}"
    table.add_row("inverse error max |x − inverse(forward(x))|", inverse_error)
    return table
