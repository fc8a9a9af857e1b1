"""Downsampled ImageNet, from the .npz batches in which it is distributed."""

import re
import zipfile
from pathlib import Path

import numpy as np
from rich.progress import track

from rnode.data.cache import cached
from rnode.data.context import label_contexts
from rnode.data.splits import Splits
from rnode.errors import InputError, one_line, require


def imagenet(
    root: str,
    size: int = 64,
    validation: int = 10000,
    context: str | None = None,
    cache: str = "~/.cache/rnode",
) -> Splits:
    """Return ImageNet32 or ImageNet64, uint8 (N, 3, size, size), memory-mapped.

    The files are root/train_data_batch_1.npz, … and root/val_data.npz. The batches are in random
    order: their first `validation` images are the validation split. The images of val_data.npz are
    the test split. `context=label` conditions on the class, 1 to 1000.
    """
    folder = Path(root).expanduser()
    batches = sorted(
        folder.glob("train_data_batch_*.npz"), key=lambda p: int(re.sub(r"\D", "", p.stem))
    )
    files = [*batches, folder / "val_data.npz"]
    whole = bool(batches) and files[-1].is_file()
    require(whole, f"root={root}: must hold train_data_batch_1.npz, … and val_data.npz")

    def write(path: Path) -> dict:
        counts = [len(read(file, "labels", (-1,))) for file in files]
        shape = (sum(counts), 3, size, size)
        rows = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        parts = np.split(rows, np.cumsum(counts)[:-1])
        for file, part in track(list(zip(files, parts, strict=True)), "ImageNet"):
            part[:] = read(file, "data", (-1, *shape[1:]))
        rows.flush()
        return {"counts": counts}

    sizes = [(file.name, file.stat().st_size) for file in files]
    rows, notes = cached(cache, f"imagenet{size}", [str(folder.resolve()), sizes, size], write)
    train = sum(notes["counts"][:-1])
    require(0 < validation < train, f"validation={validation}: must be 1 to {train - 1}")
    edges = [validation, train]
    val_rows, train_rows, test_rows = rows.tensor_split(edges)
    splits = Splits(train_rows, val_rows, test_rows)
    if context is None:
        return splits
    labels = np.concatenate([read(file, "labels", (-1,)) for file in files])
    val, train, test = np.split(labels, edges)
    return label_contexts(splits, [train, val, test])


def read(path: Path, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Read an array of an .npz file, in another shape."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[key].reshape(shape)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: {key} cannot be read ({one_line(error)[:200]})") from None
