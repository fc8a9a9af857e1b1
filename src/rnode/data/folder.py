"""Folders of image files, decoded into memory by Pillow."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from rich.progress import track
from torch import Tensor

from rnode.data.images import WHITES, to_bytes, white_of
from rnode.data.splits import SPLIT_WORDS, Splits, hold_out, image_splits
from rnode.errors import InputError, one_line, require

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")
WIDE = ("I", "F")  # modes of 16 and 32 bits, which Pillow would clip at 255
UNLABELED = {"unlabeled", "unlabelled"}  # folders that are no class
CHUNK = 1000  # files in the queue of the threads
SIDE = 64  # of images whose own sizes differ, or suit no flow
LARGEST_SIDE = 256  # of images that keep their size


def image_folder(
    root: str,
    channels: int | None = None,  # 1 for grey images, 3 for RGB; None: 1 if all files are grey
    size: int | Sequence[int] | None = None,  # a side, or [height, width]; None: see `own_size`
    on_error: str = "stop",
    validation: float = 0.1,
    test: float = 0.1,
    **options: Any,
) -> Splits:
    """Return the images below a folder, uint8 (N, channels, height, width).

    The first folders are the splits if they are named so, see `divide`. The label of an image is
    the name of its first folder. A broken file is an error unless `on_error=skip`. The other
    options are those of `image_splits`.
    """
    folder = Path(root).expanduser()
    files, divided = divide(folder, np.array(find_images(folder)))
    size = [size, size] if isinstance(size, int) else size
    shape, white = layout(np.concatenate(list(files.values())), channels, size)
    images, labels = {}, {}
    for name, part in hold_out(files, validation, test).items():
        images[name], decoded = decode_all(part, shape, white, on_error)
        folders = [(*path.relative_to(folder).parts[divided:-1], "")[0] for path in decoded]
        labels[name] = np.array(["" if first.lower() in UNLABELED else first for first in folders])
    return image_splits(images, labels, white=white, **options)


def find_images(folder: Path) -> list[Path]:
    """Return the image files below a folder, in order; links are followed, to each file once."""
    require(folder.is_dir(), f"root={folder}: there is no such folder")
    images, left_out = {}, Counter()

    def order(path: Path) -> tuple:  # several links to a file: a split has it, or where it lies
        return path.name.lower() not in SPLIT_WORDS, path.is_symlink(), path

    def refused(error: OSError) -> None:
        left_out[one_line(error)] += 1

    for place, folders, names in os.walk(folder, onerror=refused, followlinks=True):
        paths = [Path(place, name) for name in (*folders, *names)]
        folders.clear()  # those to enter follow
        for path in sorted(paths, key=order):
            if path.name.startswith("."):
                left_out[path.name] += 1
            elif path.suffix.lower() not in ENDINGS and not path.is_dir():
                left_out[path.suffix or path.name] += 1
            elif images.setdefault(os.path.realpath(path), path) is not path:
                left_out["found again by a link"] += 1
            elif path.is_dir():
                folders.append(path.name)
    print_left_out(folder, left_out)
    files = sorted((path for path in images.values() if not path.is_dir()), key=Path.as_posix)
    require(bool(files), f"root={folder}: holds no image ({', '.join(ENDINGS)})")
    return files


def print_left_out(folder: Path, counts: Counter) -> None:
    if counts:
        print(f"{folder}: left out:", ", ".join(f"{name} ({n})" for name, n in counts.items()))


def divide(folder: Path, files: np.ndarray) -> tuple[dict[str, np.ndarray], bool]:
    """Return the files of each split, and whether their first folders are the splits.

    They are if there is a train, and a val, a test or no other folder. Else train is a class.
    """
    first = [(*path.relative_to(folder).parts[:-1], "no folder")[0] for path in files]
    split = np.array([SPLIT_WORDS.get(name.lower(), "") for name in first])
    others = Counter(name for name, word in zip(first, split, strict=True) if not word)
    known = sorted(set(split) - {""})
    beside = {name.lower() for name in others} - UNLABELED - {"no folder"}
    if "train" in known and (len(known) > 1 or not beside):
        print_left_out(folder, others)
        return {name: files[split == name] for name in known}, True
    if known:
        print(f"{folder}: {', '.join(known)}: not a split, which needs train and val or test")
    return {"train": files}, False


def layout(
    paths: Sequence[Path],
    channels: int | None = None,
    size: Sequence[int] | None = None,
    white: float | None = None,
) -> tuple[tuple[int, ...], float | None]:
    """Return (channels, height, width) and white for files, as given or as the files have them.

    White is the value of white in files of more than 8 bits; None: there are none.
    """
    headers = [each for each in in_threads(inspect, paths, "inspecting") if each is not None]
    sizes = [size for size, _, _ in headers]
    size = size or own_size(sizes)
    scaled = sum(other != tuple(size) for other in sizes)
    if scaled:
        print(f"{scaled} of {len(paths)} images are scaled and cut to size={size[0]}×{size[1]}")
    wide = [largest for _, _, largest in headers if largest is not None]
    if wide and white is None:
        white = white_of(max(wide), f"{len(wide)} images of more than 8 bits")
    return (channels or (1 if all(grey for _, grey, _ in headers) else 3), *size), white


def inspect(path: Path) -> tuple[tuple[int, int], bool, float | None] | None:
    """Return height and width, whether a file is grey, and the largest of more than 8 bits.

    None: `decode` will refuse the file.
    """
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            size = image.size if turned else image.size[::-1]
            if not image.mode.startswith(WIDE):
                return size, image.mode in ("1", "L", "LA"), None
            values = np.asarray(image)
            to_bytes(values, path)
            return size, True, float(values.max())
    except Exception:
        return None


def own_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the height and width of all images if they agree and suit a flow, or SIDE twice."""
    height, width = own = max(sizes, default=(SIDE, SIDE))
    while min(height, width) >= 8 and height % 2 == width % 2 == 0:  # as a multiscale flow does
        height, width = height // 2, width // 2
    suits = max(own) <= LARGEST_SIDE and 4 <= min(height, width) < 8
    return own if suits and len(set(sizes)) <= 1 else (SIDE, SIDE)


def decode_all(
    paths: np.ndarray, shape: Sequence[int], white: float | None, on_error: str = ""
) -> tuple[Tensor, np.ndarray]:
    """Decode files in threads: uint8 (N, *shape), and the files that are not broken."""
    images = np.empty((len(paths), *shape), np.uint8)
    broken, hint = [], on_error and "; on_error=skip leaves such files out"

    def read(i: int) -> None:
        try:
            images[i] = decode(paths[i], shape, white)
        except InputError as error:
            require(on_error == "skip", f"{error}{hint}")
            broken.append(i)

    in_threads(read, range(len(paths)), "decoding")
    if broken:
        print(f"broken files left out: {len(broken)}, such as {paths[min(broken)]}")
        images, paths = np.delete(images, broken, axis=0), np.delete(paths, broken)
    constant = paths[(images.min((2, 3)) == images.max((2, 3))).all(1)]
    if len(constant):
        print(f"{len(constant)} of {len(paths)} images have one colour alone, as {constant[0]}")
    return torch.from_numpy(images), paths


def in_threads(function: Callable, items: Sequence, title: str) -> list:
    """Return function(item) of each item; an error ends all."""
    starts = track(range(0, len(items), CHUNK), f"{title} {len(items)} images")
    with ThreadPoolExecutor() as pool:
        chunks = (pool.map(function, items[start : start + CHUNK]) for start in starts)
        return [result for chunk in chunks for result in chunk]


def decode(path: Path, shape: Sequence[int], white: float | None = None) -> np.ndarray:
    """Return an image, uint8 (channels, height, width) of this `shape`.

    What is longer is cut around the centre, and the rest is scaled. A file that is not a whole
    image, or has pixels beyond 0 to `white`, raises InputError.
    """
    channels, height, width = shape
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except Exception as error:  # whatever Pillow makes of the bytes of a file
        raise InputError(f"{path}: is not a whole image ({one_line(error)[:200]})") from None
    if image.mode.startswith(WIDE):
        image = Image.fromarray(to_bytes(np.asarray(image), path, white or WHITES[-1]))
    image = ImageOps.fit(in_mode(image, channels), (width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def in_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image to 8 bits of grey or RGB; transparent pixels lie on black."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("L" if channels == 1 else "RGB")
