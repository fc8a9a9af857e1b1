"""`rnode score`: the log-probability of new data under a trained flow, and how unusual they are."""

from pathlib import Path

import numpy as np
import polars as pl
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.progress import track

from rnode.app.build import from_checkpoint
from rnode.app.density import Density
from rnode.app.printing import print_table, quantities
from rnode.data.datamodule import DataModule
from rnode.data.decoding import Format, decode
from rnode.data.folder import find_images
from rnode.data.tables import read_table
from rnode.errors import InputError, one_line, require
from rnode.training.checkpoint import load_checkpoint
from rnode.training.run_folder import whole_file


def main(cfg: DictConfig) -> None:
    """Write scores.csv or scores.parquet: a row for each row or image of `cfg.path`, in order."""
    data, flow, fabric = from_checkpoint(cfg)
    require(fabric.world_size == 1, "trainer.devices: must be 1; scores are computed on one device")
    bits = load_checkpoint(cfg.ckpt_path)["validation_bits"]
    density = Density(data, flow, bits, cfg.seed)
    rows, identity = read(density, Path(cfg.path).expanduser(), list(cfg.id))
    given = OmegaConf.to_container(cfg.context) or class_folders(density, identity)
    scores = density.score(rows, given, lambda batches: track(batches, "scores"))
    frame = identity.with_columns(pl.DataFrame(scores))
    folder = Path(HydraConfig.get().runtime.output_dir)
    path = folder / f"scores.{cfg.format}"
    with whole_file(path) as file:
        frame.write_csv(file) if cfg.format == "csv" else frame.write_parquet(file)
    table = quantities(f"{cfg.path}, {len(frame)} samples")
    nats, rank = scores["log_prob"], scores["rank"]
    table.add_row("mean log-probability, nats", f"{nats.mean():.3f}")
    table.add_row("least and most", f"{nats.min():.3f}, {nats.max():.3f}")
    table.add_row("mean bits/dim", f"{scores['bits_per_dim'].mean():.4f}")
    if len(bits):  # the run has validated before it wrote the checkpoint
        table.add_row("more unusual than 99 % of the validation set", f"{np.mean(rank > 0.99):.1%}")
    print_table(table)
    print(f"written to {path}")


def read(density: Density, path: Path, names: list[str]) -> tuple[object, pl.DataFrame]:
    """Read new data, and what identifies each sample: its row, its columns `names`, or its file."""
    if density.columns is not None:
        frame = read_table(path)
        missing = [name for name in names if name not in frame.columns]
        require(not missing, f"id={missing}: {path} has the columns {frame.columns[:20]}")
        numbers = pl.DataFrame({"row": np.arange(len(frame))})
        return frame, numbers.with_columns(frame.select(names))
    require(not names, f"id={names}: must be left out; images have no columns")
    if path.is_dir():
        files, form = find_images(path), image_format(density.data)
        images = [whole_image(path / file, form) for file in track(files, "decoding")]
        return np.stack(images), pl.DataFrame({"file": files})
    right = f"path={path}: must be a folder of images, or a .npy file"
    require(path.suffix == ".npy" and path.is_file(), right)
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"path={path}: cannot be read ({one_line(error)})") from None
    return rows, pl.DataFrame({"row": np.arange(len(rows))})


def class_folders(density: Density, identity: pl.DataFrame) -> dict[str, list[str]] | None:
    """Return the classes of images in folders, for a density of images given their class."""
    if density.columns is not None or density.data.context is None or "file" not in identity:
        return None
    folders = [Path(file).parts[:-1] for file in identity["file"]]
    return {"label": [first for first, *_ in folders]} if all(folders) else None


def image_format(data: DataModule) -> Format:
    """Return what the images were made into that the flow was trained on."""
    (channels, *sides), levels = data.shape, data.transform.levels
    bits = levels.bit_length() - 1
    wrong = f"path: must be a .npy file; {levels} grey levels are not the bits of a pixel"
    require(levels == 2**bits <= 256, wrong)
    known = {key: data.arguments[key] for key in ("crop", "pad") if key in data.arguments}
    return Format(channels, data.arguments.get("size", sides), bits=bits, **known)


def whole_image(path: Path, form: Format) -> np.ndarray:
    """Decode an image; a broken file is an InputError."""
    result = decode(path, form)
    if isinstance(result, InputError):
        raise result
    return result[0]
