"""`rnode score`: the log-likelihood of new data under a trained flow, and their anomaly rank."""

from pathlib import Path

import numpy as np
import polars as pl
from omegaconf import DictConfig, OmegaConf
from rich.progress import track

from rnode.app.density import Density, from_checkpoint
from rnode.app.printing import print_table, quantities
from rnode.data.folder import decode, find_images
from rnode.data.tables import read_table
from rnode.errors import require
from rnode.training.run_folder import whole_file


def main(cfg: DictConfig) -> None:
    """Write scores.csv: a row for each row or image of `cfg.path`, in order."""
    density, fabric = from_checkpoint(cfg)
    require(fabric.world_size == 1, "trainer.devices: must be 1; scores are computed on one device")
    rows, identity = read(density, Path(cfg.path).expanduser(), list(cfg.id))
    context = OmegaConf.to_container(cfg.context) or None
    if context is None and "file" in identity and "label" in density.data.conditions.columns:
        context = {"label": [Path(file).parts[0] for file in identity["file"]]}
    scores = density.score(rows, context, lambda batches: track(batches, "scores"))
    path = Path(cfg.folder) / "scores.csv"
    with whole_file(path) as file:
        identity.with_columns(pl.DataFrame(scores)).write_csv(file)
    table = quantities(f"{cfg.path}, {len(identity)} samples")
    nats = scores["log_prob"]
    table.add_row("mean log-probability, nats", f"{nats.mean():.3f}")
    table.add_row("least and most", f"{nats.min():.3f}, {nats.max():.3f}")
    table.add_row("mean bits/dim", f"{scores['bits_per_dim'].mean():.4f}")
    if len(density.validation_bits):  # the run has validated before it wrote the checkpoint
        unusual = np.mean(scores["rank"] > 0.99)
        table.add_row("more unusual than 99 % of the validation set", f"{unusual:.1%}")
    print_table(table)
    print(f"written to {path}")


def read(density: Density, path: Path, names: list[str]) -> tuple[object, pl.DataFrame]:
    """Read new data, and what identifies each sample: its row, its columns `names`, or its file."""
    if density.columns is not None:
        rows = read_table(path)
        missing = [name for name in names if name not in rows.columns]
        require(not missing, f"id={missing}: {path} has the columns {rows.columns[:20]}")
        return rows, rows.select(pl.int_range(pl.len()).alias("row"), *names)
    require(not names, f"id={names}: is not supported here; images have no columns")
    if path.is_dir():
        levels = density.data.transform.levels
        require(
            levels == 256,
            f"path: must be a .npy file; {levels} grey levels are not the bits of a pixel",
        )
        files = find_images(path)
        images = [decode(file, density.data.shape) for file in track(files, "decoding")]
        names = [file.relative_to(path).as_posix() for file in files]
        return np.stack(images), pl.DataFrame({"file": names})
    image_file = path.suffix == ".npy" and path.is_file()
    require(image_file, f"path={path}: must be a folder of images, or a .npy file")
    rows = np.load(path)
    return rows, pl.DataFrame({"row": np.arange(len(rows))})
