"""Folders of image files, decoded into memory by Pillow."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from rich.progress import track
from torch import Tensor

from rnode.data.splits import SPLIT_WORDS, Splits, hold_out, image_splits
from rnode.errors import InputError, one_line, require

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")
DEEP_MODES = ("I", "F")  # modes of 16 and 32 bits, whose white is not known
DEEP_SUFFIX = ";16"  # in the mode of a file of 16 bits, of which Pillow keeps the upper eight
UNLABELED_FOLDERS = ("unlabeled", "unlabelled")  # folders that are no class
SIDE = 64  # of images whose own sizes differ or are too large
LARGEST_SIDE = 256  # of images that keep their size


def image_folder(
    root: str,
    channels: int | None = None,  # 1 for grey images, 3 for RGB; None: 1 if all files are grey
    size: int | Sequence[int] | None = None,  # a side, or [height, width]; None: see `layout`
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
    files, divided = divide(folder, find_images(folder))
    size = [size, size] if isinstance(size, int) else size
    shape = layout(np.concatenate(list(files.values())), channels, size)
    images, labels = {}, {}
    for name, part in hold_out(files, validation, test).items():
        images[name], decoded = decode_all(part, shape, on_error)
        folders = [(*path.relative_to(folder).parts[divided:-1], "")[0] for path in decoded]
        classes = ["" if first.lower() in UNLABELED_FOLDERS else first for first in folders]
        labels[name] = np.array(classes)
    return image_splits(images, labels, **options)


def find_images(folder: Path) -> np.ndarray:
    """Return the image files below a folder, in order; links are followed, to each file once."""
    require(folder.is_dir(), f"root={folder}: there is no such folder")
    images = {}
    left_out = Counter()
    errors = []
    for place, folders, names in os.walk(folder, onerror=errors.append, followlinks=True):
        paths = [Path(place, name) for name in (*folders, *names)]
        folders.clear()  # those to enter follow
        # A file that a link leads to as well is taken from the folder of a split.
        for path in sorted(paths, key=lambda path: (path.name.lower() not in SPLIT_WORDS, path)):
            if path.name.startswith("."):
                left_out[path.name] += 1
            elif path.suffix.lower() not in ENDINGS and not path.is_dir():
                left_out[path.suffix or path.name] += 1
            elif images.setdefault(os.path.realpath(path), path) is not path:
                left_out["found again by a link"] += 1
            elif path.is_dir():
                folders.append(path.name)
    left_out.update(map(one_line, errors))
    print_left_out(folder, left_out)
    files = sorted((path for path in images.values() if not path.is_dir()), key=Path.as_posix)
    require(bool(files), f"root={folder}: holds no image ({', '.join(ENDINGS)})")
    return np.array(files)


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
    classes = {name.lower() for name in others} - {*UNLABELED_FOLDERS, "no folder"}
    if "train" in known and (len(known) > 1 or not classes):
        print_left_out(folder, others)
        return {name: files[split == name] for name in known}, True
    if known:
        print(f"{folder}: {', '.join(known)}: not a split, which needs train and val or test")
    return {"train": files}, False


def layout(
    paths: np.ndarray, channels: int | None, size: Sequence[int] | None
) -> tuple[int, int, int]:
    """Return channels, height and width, as given or as the files have them.

    The size is theirs if they agree and are not too large, else SIDE.
    """
    headers = [header for header in in_threads(inspect, paths, "inspecting") if header]
    sizes = {size for size, _, _ in headers}
    own = max(sizes, default=(SIDE, SIDE))
    height, width = size or (own if len(sizes) == 1 and max(own) <= LARGEST_SIDE else (SIDE, SIDE))
    losses = Counter(loss for _, _, losses in headers for loss in losses)
    losses[f"are scaled and cut to size={height}×{width}"] = sum(
        own != (height, width) for own, _, _ in headers
    )
    for loss, count in losses.items():
        if count:
            print(f"{count} of {len(paths)} images {loss}")
    return channels or (1 if all(grey for _, grey, _ in headers) else 3), height, width


def inspect(path: Path) -> tuple[tuple[int, int], bool, list[str]] | None:
    """Return height and width, whether a file is grey, and what of it is not used.

    None: `decode` will refuse the file.
    """
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            size = image.size if turned else image.size[::-1]
            losses = ["lose their transparency"] if image.has_transparency_data else []
            losses += ["lose their later frames"] if getattr(image, "n_frames", 1) > 1 else []
            return size, image.mode in ("1", "L", "LA"), losses
    except Exception:
        return None


def decode_all(
    paths: np.ndarray, shape: Sequence[int], on_error: str = ""
) -> tuple[Tensor, np.ndarray]:
    """Decode files in threads: uint8 (N, *shape), and the files that are not broken."""
    images = np.empty((len(paths), *shape), np.uint8)
    broken = []
    hint = on_error and "; on_error=skip leaves such files out"

    def read(i: int) -> None:
        try:
            images[i] = decode(paths[i], shape)
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
    with ThreadPool() as pool:
        results = pool.imap(function, items)
        return list(track(results, f"{title} {len(items)} images", len(items)))


def decode(path: Path, shape: Sequence[int]) -> np.ndarray:
    """Return an image, uint8 (channels, height, width) of this `shape`.

    What is longer is cut around the centre, and the rest is scaled. A file that is not a whole
    image, or has more than 8 bits, raises InputError.
    """
    channels, height, width = shape
    try:
        with Image.open(path) as opened:
            deep = opened.mode.startswith(DEEP_MODES) or DEEP_SUFFIX in str(opened.tile)
            image = ImageOps.exif_transpose(opened)
            image.load()
    except Exception as error:  # whatever Pillow makes of the bytes of a file
        raise InputError(f"{path}: is not a whole image ({one_line(error)[:200]})") from None
    bits = f"{path}: has pixels of more than 8 bits (mode {image.mode}); save it with 8 bits"
    require(not deep, bits)
    image = image.convert("L" if channels == 1 else "RGB")
    image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)
