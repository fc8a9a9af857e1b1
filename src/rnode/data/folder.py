"""Folders of image files, decoded into memory by Pillow."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.progress import track
from torch import Tensor

from rnode.data.splits import SPLIT_NAMES, SPLIT_WORDS, Splits, hold_out, image_splits
from rnode.errors import InputError, one_line, require

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")
CHUNK = 1000  # files in the queue of the threads


def image_folder(
    root: str,
    channels: int = 3,  # 1 for grey images, 3 for RGB
    size: int | Sequence[int] = 64,  # a side, or [height, width]
    on_error: str = "stop",
    validation: float = 0.1,
    test: float = 0.1,
    **options: Any,
) -> Splits:
    """Return the images below a folder, uint8 (N, channels, height, width).

    The folders train, val and test of `root` are the splits if there is a train. The label of an
    image is the name of its first folder. A broken file is an error unless `on_error=skip`. The
    other options are those of `image_splits`.
    """
    folder = Path(root).expanduser()
    divided = (folder / "train").is_dir()
    paths = np.array(find_images(folder))
    first = [path.relative_to(folder).parts[0] for path in paths]
    split = np.array([SPLIT_WORDS.get(name, "") if divided else "train" for name in first])
    files = {name: paths[split == name] for name in SPLIT_NAMES if name in split}
    shape = (channels, size, size) if isinstance(size, int) else (channels, *size)
    images, labels = {}, {}
    for name, part in hold_out(files, validation, test).items():
        images[name], decoded = decode_all(part, shape, on_error)
        folders = [(*path.relative_to(folder).parts[divided:-1], "") for path in decoded]
        labels[name] = np.array([first for first, *_ in folders])
    return image_splits(images, labels, **options)


def find_images(folder: Path) -> list[Path]:
    """Return the image files below a folder, in order."""
    require(folder.is_dir(), f"root={folder}: there is no such folder")
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    files = sorted((path for path in paths if path.is_file()), key=Path.as_posix)
    require(bool(files), f"root={folder}: holds no image ({', '.join(ENDINGS)})")
    return files


def decode_all(paths: np.ndarray, shape: Sequence[int], on_error: str) -> tuple[Tensor, np.ndarray]:
    """Decode files in threads: uint8 (N, *shape), and the files that are not broken."""
    images = np.empty((len(paths), *shape), np.uint8)
    broken = []

    def read(i: int) -> None:
        try:
            images[i] = decode(paths[i], shape)
        except InputError as error:
            require(on_error == "skip", f"{error}; on_error=skip leaves such files out")
            broken.append(i)

    with ThreadPoolExecutor() as pool:
        for start in track(range(0, len(paths), CHUNK), f"decoding {len(paths)} images"):
            list(pool.map(read, range(len(paths))[start : start + CHUNK]))
    if broken:
        print(f"broken files left out: {len(broken)}, such as {paths[min(broken)]}")
        images, paths = np.delete(images, broken, axis=0), np.delete(paths, broken)
    return torch.from_numpy(images), paths


def decode(path: Path, shape: Sequence[int]) -> np.ndarray:
    """Return an image, uint8 (channels, height, width) of this `shape`.

    What is longer is cut around the centre, and the rest is scaled. A file that is not a whole
    image raises InputError.
    """
    channels, height, width = shape
    try:
        with Image.open(path) as opened:
            image = in_mode(ImageOps.exif_transpose(opened), channels)
    except Exception as error:  # whatever Pillow makes of the bytes of a file
        raise InputError(f"{path}: is not a whole image ({one_line(error)[:200]})") from None
    image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def in_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image to 8 bits of grey or RGB; transparent pixels lie on black."""
    if image.mode.startswith("I"):  # 16 bits, of which Pillow would clip all above 255
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("L" if channels == 1 else "RGB")
