"""Folders of image files, decoded into memory by Pillow."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.progress import track
from torch import Tensor

from rnode.data.splits import NO_LABEL, SPLIT_WORDS, Labelled, Splits, hold_out, image_splits
from rnode.errors import InputError, one_line, require
from rnode.transforms import ImageTransform

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")
CHUNK = 1000  # files in the queue of the threads


@dataclass(frozen=True)
class Format:
    """What image files become: uint8 (channels, height, width) with 2^bits grey levels."""

    channels: int  # 1 for grey images, 3 for RGB; transparent pixels lie on black
    size: int | Sequence[int]  # a side, or [height, width]; what is longer is cut around the centre
    crop: int | None = None  # side of the square in the centre that is cut out before scaling
    bits: int = 8

    @property
    def shape(self) -> tuple[int, int, int]:
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        return self.channels, height, width


def image_folder(
    root: str,
    channels: int = 3,
    size: int | Sequence[int] = 64,
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
    paths: dict[str, list[Path]] = {}
    for path in find_images(folder):
        split = SPLIT_WORDS.get(path.relative_to(folder).parts[0]) if divided else "train"
        if split is not None:
            paths.setdefault(split, []).append(path)
    files = {name: np.array(part) for name, part in paths.items()}
    parts = {}
    for name, part in hold_out(files, validation, test).items():
        images, decoded = decode_all(part, Format(channels, size), on_error)
        folders = [(*path.relative_to(folder).parts[divided:-1], NO_LABEL) for path in decoded]
        parts[name] = Labelled(images, np.array([first for first, *_ in folders]))
    return image_splits(parts, **options)


def celeba(
    root: str,
    size: int | Sequence[int] = 64,
    crop: int | None = 148,
    bits: int = 8,
    on_error: str = "stop",
    alpha: float = 0.05,
) -> Splits:
    """Return the aligned images of CelebA in root/img_align_celeba, with 2^bits grey levels.

    root/list_eval_partition.txt says which split an image is in. The first `bits` of each pixel are
    kept, and bits/dim are of these images.
    """
    folder = Path(root).expanduser()
    partition = folder / "list_eval_partition.txt"
    require(partition.is_file(), f"root={root}: there is no {partition.name}")
    words = partition.read_text(encoding="utf-8").split()  # such as 000001.jpg 0
    pairs = list(zip(words[::2], words[1::2], strict=True))
    splits = []
    for number in "012":
        files = [folder / "img_align_celeba" / file for file, part in pairs if part == number]
        images, _ = decode_all(files, Format(3, size, crop, bits), on_error)
        splits.append(images)
    return Splits(*splits, ImageTransform(2**bits, alpha))


def find_images(folder: Path) -> list[Path]:
    """Return the image files below a folder, in order."""
    require(folder.is_dir(), f"root={folder}: there is no such folder")
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    files = sorted((path for path in paths if path.is_file()), key=Path.as_posix)
    require(bool(files), f"root={folder}: holds no image ({', '.join(ENDINGS)})")
    return files


def decode_all(paths: Sequence[Path], form: Format, on_error: str) -> tuple[Tensor, list[Path]]:
    """Decode files in threads: uint8 (N, *form.shape), and the files that are not broken."""
    images = np.empty((len(paths), *form.shape), np.uint8)
    decoded = []
    with ThreadPoolExecutor() as pool:
        for start in track(range(0, len(paths), CHUNK), f"decoding {len(paths)} images"):
            chunk = paths[start : start + CHUNK]
            futures = [pool.submit(decode, path, form) for path in chunk]
            for path, future in zip(chunk, futures, strict=True):
                if error := future.exception():
                    require(on_error == "skip", f"{error}; on_error=skip leaves such files out")
                else:
                    images[len(decoded)] = future.result()
                    decoded.append(path)
    if len(decoded) < len(paths):
        broken = sorted({*paths} - {*decoded})
        print(f"broken files left out: {len(broken)}, such as {broken[0]}")
    return torch.from_numpy(images[: len(decoded)]), decoded


def decode(path: Path, form: Format) -> np.ndarray:
    """Return an image, uint8 of form.shape; raise InputError for a file that is not a whole one."""
    try:
        with Image.open(path) as opened:
            image = in_mode(ImageOps.exif_transpose(opened), form.channels)
    except Exception as error:  # whatever Pillow makes of the bytes of a file
        raise InputError(f"{path}: is not a whole image ({one_line(error)[:200]})") from None
    channels, height, width = form.shape
    if form.crop is not None:
        left, top = (image.width - form.crop) // 2, (image.height - form.crop) // 2
        image = image.crop((left, top, left + form.crop, top + form.crop))
    image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image).reshape(height, width, channels)
    return pixels.transpose(2, 0, 1) >> (8 - form.bits)


def in_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image to 8 bits of grey or RGB; transparent pixels lie on black."""
    if image.mode.startswith("I"):  # 16 bits, of which Pillow would clip all above 255
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("L" if channels == 1 else "RGB")
