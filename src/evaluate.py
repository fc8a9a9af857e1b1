"""What a trained flow is worth: `python src/evaluate.py ckpt_path=outputs/…/best.ckpt`. --help lists what can be set."""

import hydra
from omegaconf import DictConfig

import cli


@hydra.main(version_base="1.3", config_path=str(cli.CONF), config_name="evaluate")
@cli.job
def main(cfg: DictConfig) -> float:
    """Print a table; write it and evaluation.json, samples.csv and extremes.png. Returns bits/dim."""
    import csv
    import json
    from pathlib import Path

    import torch
    from hydra.core.hydra_config import HydraConfig
    from rich.progress import track

    from build import from_checkpoint
    from rnode.allocator import keep_freed_memory
    from rnode.data import Splits
    from rnode.errors import is_int, require
    from rnode.evaluation import evaluate
    from rnode.pictures import draw_extremes

    cli.quiet()
    keep_freed_memory()
    require(cfg.split in Splits._fields, "split", cfg.split, " or ".join(reversed(Splits._fields)))
    require(is_int(cfg.samples, at_least=1), "samples", cfg.samples, "a whole number of dequantizations, 1 or more")
    require(is_int(cfg.pictures, at_least=1), "pictures", cfg.pictures, "a whole number, 1 or more")
    data, flow, fabric = from_checkpoint(cfg)
    data.setup()
    rows = getattr(data.splits, cfg.split)
    require(
        isinstance(rows, torch.Tensor), "split", cfg.split, "val or test: these training data are drawn afresh each time"
    )

    def progress(loader):
        return track(loader, f"{cfg.split} set", disable=not fabric.is_global_zero)

    summary, columns = evaluate(flow, data, cfg.split, cfg.samples, cfg.seed, progress)
    if not fabric.is_global_zero:
        return summary["bits_per_dim"]
    folder = Path(HydraConfig.get().runtime.output_dir)
    probes = flow.probes
    summary |= {
        "divergence": "exact" if probes.divergence == "exact" else f"{probes.count} {probes.divergence} probe(s) a sample",
        "ckpt_path": cfg.ckpt_path,
        "split": cfg.split,
        "seed": cfg.seed,
        "dimensions": flow.d,
        "solver": vars(flow.solver.test),
    }
    bounds = columns.pop("bounds", None)
    if bounds is not None:
        columns["bound"] = bounds[-1]
    columns["index"] = columns["index"].long()
    with open(folder / "samples.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(values.tolist() for values in columns.values()), strict=True))
    draw_extremes(rows, columns["bits_per_dim"], data, cfg.pictures, folder / "extremes.png")
    (folder / "evaluation.json").write_text(json.dumps(summary, indent=2) + "\n")
    print_table(summary, folder)
    return summary["bits_per_dim"]


def print_table(summary: dict, folder) -> None:
    from math import log

    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{summary['split']} set, {summary['samples']} samples", title_justify="left")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    bits, nats = summary["bits_per_dim"], summary["dimensions"] * log(2)
    discrete = "bound" in summary
    table.add_row(f"bits/dim{', uniform dequantization' if discrete else ''}", f"{bits:.4f}")
    table.add_row("  standard error over samples", f"{summary['standard_error_images']:.4f}")
    table.add_row("  standard error over probes", f"{summary['standard_error_probes']:.4f}")
    table.add_row("negative log-likelihood, nats", f"{bits * nats:.3f} ± {summary['standard_error_images'] * nats:.3f}")
    if discrete:
        noises, error = len(summary["bound_by_noises"]), summary["bound_standard_error"]
        table.add_row(f"importance-weighted bound, {noises} noises", f"{summary['bound']:.4f} ± {error:.4f}")
        table.add_row("midpoint (bin centre: no bound)", f"{summary['midpoint']:.4f}")
    table.add_row("divergence", summary["divergence"])
    table.add_row("NFE per batch (least – most)", f"{summary['nfe']:.1f} ({summary['nfe_min']} – {summary['nfe_max']})")
    table.add_row("NFE by piece", " ".join(f"{nfe:.0f}" for nfe in summary["nfe_by_piece"]))
    table.add_row("kinetic energy / d", f"{summary['kinetic']:.4f}")
    table.add_row("squared Jacobian norm / d", f"{summary['jacobian']:.4f}")
    table.add_row("transport cost ‖x − z‖² / d", f"{summary['transport_cost']:.4f}")
    table.add_row("straightness (0: straight, at constant speed)", f"{summary['straightness']:.4f}")
    table.add_row("inverse error max |x − inverse(forward(x))|", f"{summary['inverse_error']:.1e}")
    console = Console(record=True)
    console.print(table)
    (folder / "evaluation.txt").write_text(console.export_text())
    console.print(f"folder: {folder}", soft_wrap=True)


if __name__ == "__main__":
    cli.run(main, "evaluate.py", "Measure a trained flow on its data.")
