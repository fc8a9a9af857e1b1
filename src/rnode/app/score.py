"""`rnode score`: the log-likelihood of new data under a trained flow, and their anomaly rank."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from omegaconf import DictConfig, OmegaConf
from rich.progress import track

from rnode.app.density import Density, from_checkpoint
from rnode.data.folder import decode_all, find_images
from rnode.data.images import load_images
from rnode.data.tables import Names, choose, read_table
from rnode.errors import require
from rnode.training.run_folder import whole_file

SCORES = ("log_prob", "standard_error", "bits_per_dim", "rank")
REASON = "contribution_"  # and the name of a column
PRINTED_ROWS = 5  # samples that are printed


def main(cfg: DictConfig) -> None:
    """Write scores.csv: a row for each row or image of `cfg.path`, in order."""
    density = from_checkpoint(cfg)
    rows, identity = read(density, Path(cfg.path).expanduser(), cfg.id)
    context = OmegaConf.to_container(cfg.context) or None
    if context is None and "file" in identity and "label" in density.data_.conditions.columns:
        context = {"label": [Path(file).parts[0] for file in identity["file"]]}
    scores = pl.DataFrame(density.evaluate(rows, context, lambda parts: track(parts, "scores")))
    reasons = pl.DataFrame()
    if cfg.contributions:
        gradients = density.contributions(rows, context)
        reasons = pl.DataFrame(gradients, [f"{REASON}{name}" for name in density.columns_])
    path = Path(cfg.folder) / "scores.csv"
    with whole_file(path) as file:
        identity.with_columns(*scores, *reasons).write_csv(file)
    means = pl.concat([scores.mean(), scores.median(), scores.min(), scores.max()])
    print(means.with_columns(of=pl.Series(["mean", "median", "least", "largest"])))
    unusual = identity.with_columns(scores[["log_prob", "rank"]]).sort("log_prob")[:PRINTED_ROWS]
    print(f"the {len(unusual)} most unusual:\n{unusual}")
    print(f"written to {path}")


def read(density: Density, path: Path, names: Names) -> tuple[Any, pl.DataFrame]:
    """Read new data, and what identifies each sample: its row, its columns `names`, or its file."""
    if density.columns_ is not None:
        rows = read_table(path, density.columns_)
        names = choose("id", names, rows.columns)
        ours = ("row", *SCORES, *(f"{REASON}{name}" for name in density.columns_))
        taken = [name for name in names if name in ours]
        require(not taken, f"id={','.join(taken)}: scores.csv has such a column; rename yours")
        return rows, rows.select(pl.int_range(pl.len()).alias("row"), *names)
    require(not names, f"id={names}: must be left out; images have no columns")
    if path.is_dir():
        files = find_images(path)
        images, _ = decode_all(files, density.data_.shape)
        names = [file.relative_to(path).as_posix() for file in files]
        return images, pl.DataFrame({"file": names})
    rows = load_images(path)
    return rows, pl.DataFrame({"row": np.arange(len(rows))})
