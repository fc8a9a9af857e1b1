"""Folders of image files, decoded into memory by Pillow."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from rich.progress import track
from torch import Tensor

from rnode.data.images import to_bytes, white_of
from rnode.data.splits import SPLIT_NAMES, SPLIT_WORDS, Splits, hold_out, image_splits
from rnode.errors import InputError, one_line, require

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")
UNLABELED = ("unlabeled", "unlabelled")  # folders that are no class
CHUNK = 1000  # files in the queue of the threads
SIDE = 64  # of images whose own sizes differ, or suit no flow
LARGEST_SIDE = 256  # of images that keep their size

# Of a file: height and width, whether it is grey, and the largest value of more than 8 bits.
Header = tuple[tuple[int, int], bool, float | None]


def image_folder(
    root: str,
    channels: int | None = None,  # 1 for grey images, 3 for RGB; None: 1 if all files are grey
    size: int | Sequence[int] | None = None,  # a side, or [height, width]; None: see `common_size`
    on_error: str = "stop",
    validation: float = 0.1,
    test: float = 0.1,
    **options: Any,
) -> Splits:
    """Return the images below a folder, uint8 (N, channels, height, width).

    Folders named train, val and test are the splits if there is a train, see `divide`. The label of
    an image is the name of its first folder. A broken file is an error unless `on_error=skip`. The
    other options are those of `image_splits`.
    """
    folder = Path(root).expanduser()
    files, divided = divide(folder, find_images(folder))
    files = hold_out(files, validation, test)
    paths = np.concatenate([files[name] for name in SPLIT_NAMES])
    split = np.repeat(list(SPLIT_NAMES), [len(files[name]) for name in SPLIT_NAMES])
    size = (size, size) if isinstance(size, int) else size
    decoded, whole, white = decode_all(paths, channels, size, on_error=on_error)
    counts = [int((split[whole] == name).sum()) for name in SPLIT_NAMES]
    images = dict(zip(SPLIT_NAMES, decoded.split(counts), strict=True))
    folders = [(*path.relative_to(folder).parts[divided:-1], "")[0] for path in paths[whole]]
    labels = np.array(["" if name.lower() in UNLABELED else name for name in folders])
    parts = np.split(labels, np.cumsum(counts)[:-1])
    return image_splits(images, dict(zip(SPLIT_NAMES, parts, strict=True)), white=white, **options)


def find_images(folder: Path) -> list[Path]:
    """Return the image files below a folder, in order, each once; print what is left out."""
    require(folder.is_dir(), f"root={folder}: there is no such folder")
    images, left_out = {}, Counter()
    # A file that several links lead to is taken from a folder that is a split.
    for path in sorted(walk(folder), key=lambda path: not split_word(folder, path)):
        if path.name.startswith("."):
            left_out[path.name] += 1
        elif path.suffix.lower() not in ENDINGS:
            left_out[path.suffix or path.name] += 1
        elif images.setdefault(identity(path), path) is not path:
            left_out["images that other links lead to"] += 1
    print_left_out(folder, left_out)
    require(bool(images), f"root={folder}: holds no image ({', '.join(ENDINGS)})")
    return sorted(images.values(), key=Path.as_posix)


def walk(folder: Path, above: tuple = ()) -> Iterator[Path]:
    """Yield files below a folder and its hidden folders as such; links are followed, but not up."""
    above = (*above, identity(folder))
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_symlink(), path.name)):
        if path.is_dir() and not path.name.startswith("."):
            if identity(path) not in above:
                yield from walk(path, above)
        else:
            yield path


def identity(path: Path) -> tuple:
    """Return what all links to a file or folder have in common."""
    known = path.stat() if path.exists() else path.lstat()
    return known.st_dev, known.st_ino


def print_left_out(folder: Path, counts: Counter) -> None:
    if counts:
        words = ", ".join(f"{name} ({count})" for name, count in counts.most_common(20))
        print(f"{folder}: left out: {words}")


def split_word(folder: Path, path: Path) -> str:
    """Return the split that the first folder of a file is named after, or ""."""
    return SPLIT_WORDS.get(path.relative_to(folder).parts[0].lower(), "")


def divide(folder: Path, paths: Sequence[Path]) -> tuple[dict[str, np.ndarray], bool]:
    """Return the files of each split, and whether their first folders are the splits.

    They are if there is a train, and a val, a test or no other folder. Beside other folders alone,
    train is a class.
    """
    files, split = np.array(paths), np.array([split_word(folder, path) for path in paths])
    first = [(*path.relative_to(folder).parts[:-1], "no folder")[0] for path in paths]
    rest = Counter(name for name, word in zip(first, split, strict=True) if not word)
    known = set(split) - {""}
    others = [name for name in rest if name != "no folder" and name.lower() not in UNLABELED]
    if "train" in known and (len(known) > 1 or not others):
        print_left_out(folder, rest)
        return {name: files[split == name] for name in SPLIT_NAMES if name in known}, True
    if known:
        named = ", ".join(sorted({name for name, word in zip(first, split, strict=True) if word}))
        print(f"{folder}: {named}: no splits, which would be train and val or test")
    return {"train": files}, False


def decode_all(
    paths: Sequence[Path],
    channels: int | None = None,
    size: Sequence[int] | None = None,
    white: float | None = None,
    on_error: str = "stop",
) -> tuple[Tensor, np.ndarray, float | None]:
    """Decode files in threads, and print how their pixels and sizes are changed.

    Returns:
        uint8 (N, channels, *size), which of the files are whole, and the value of white of files
        with more than 8 bits, by default the least of WHITES that no pixel exceeds.
    """
    headers = [header for header in in_threads(inspect, paths, "inspecting") if header is not None]
    wide = [largest for _, _, largest in headers if largest is not None]
    if wide and white is None:
        white = white_of(max(wide))
        print(
            f"{len(wide)} images of more than 8 bits have values up to {max(wide):g}: {white} is white"
        )
    sizes = [size for size, _, _ in headers]
    size = size or common_size(sizes)
    channels = channels or (1 if all(grey for _, grey, _ in headers) else 3)
    shape = (channels, *size)
    scaled = sum(other != tuple(size) for other in sizes)
    if scaled:
        print(f"{scaled} of {len(paths)} images are scaled and cut to {size[0]}×{size[1]}")
    images, errors = np.zeros((len(paths), *shape), np.uint8), {}

    def read(i: int) -> None:
        try:
            images[i] = decode(paths[i], shape, white)
        except InputError as error:
            require(on_error == "skip", f"{error}; on_error=skip leaves such files out")
            errors[i] = error

    in_threads(read, range(len(paths)), "decoding")
    whole = np.array([i not in errors for i in range(len(paths))])
    if errors:
        print(f"broken files left out: {len(errors)}, such as {errors[min(errors)]}")
        images = images[whole]
    flat = images.reshape(len(images), channels, -1)
    constant = paths[whole][(flat.min(-1) == flat.max(-1)).all(-1)]
    if len(constant):
        print(f"{len(constant)} of {len(images)} images have one colour alone, as {constant[0]}")
    return torch.from_numpy(images), whole, white


def in_threads(function: Callable, items: Sequence, title: str) -> list:
    """Return function(item) of each item; an error ends all."""
    title = f"{title} {len(items)} images"
    with ThreadPoolExecutor() as pool:
        starts = track(range(0, len(items), CHUNK), title)
        chunks = (pool.map(function, items[start : start + CHUNK]) for start in starts)
        return [result for chunk in chunks for result in chunk]


def inspect(path: Path) -> Header | None:
    """Return the header of a file; None for one that `decode` refuses."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            size = image.size if turned else image.size[::-1]
            if not is_wide(image):
                return size, image.mode in ("1", "L", "LA"), None
            values = np.asarray(image)
            to_bytes(values, path)
            return size, True, float(values.max())
    except Exception:
        return None


def common_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the height and width of all images if they agree and suit a flow, or SIDE twice."""
    least, largest = min(sizes, default=(SIDE, SIDE)), max(sizes, default=(SIDE, SIDE))
    height, width = least
    while min(height, width) >= 8 and height % 2 == width % 2 == 0:  # as a multiscale flow does
        height, width = height // 2, width // 2
    if least == largest and max(least) <= LARGEST_SIDE and 4 <= min(height, width) < 8:
        return least
    words = "{}×{} to {}×{}".format(*least, *largest)
    print(f"images of {words} are taken as dataset.size={SIDE}")
    return SIDE, SIDE


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
    if is_wide(image):
        image = Image.fromarray(to_bytes(np.asarray(image), path, white))
    image = ImageOps.fit(in_mode(image, channels), (width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def is_wide(image: Image.Image) -> bool:
    """Whether pixels have 16 or 32 bits, which Pillow would clip at 255."""
    return image.mode.startswith(("I", "F"))


def in_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image to 8 bits of grey or RGB; transparent pixels lie on black."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("L" if channels == 1 else "RGB")
