"""Data sets of images."""

import gzip
import itertools
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torchvision import datasets

from rnode.data.context import label_contexts
from rnode.data.splits import Splits, hold_out
from rnode.errors import InputError, one_line, require, require_choice

IDX_IMAGES = {  # the files of training and test images, without their endings
    **dict.fromkeys(("MNIST", "FashionMNIST", "KMNIST"), ("train-images", "t10k-images")),
    "QMNIST": ("qmnist-train-images", "qmnist-test-images"),
    "EMNIST": ("emnist-balanced-train-images", "emnist-balanced-test-images"),
}
DOWNLOAD_OPTIONS = {  # of torchvision's classes, one for each download
    "QMNIST": [{"what": "train"}, {"what": "test"}],
    "EMNIST": [{"split": "balanced"}],
}


def digits(validation: int = 180, test: int = 360, context: str | None = None) -> Splits:
    """Return the 1,797 handwritten digits of scikit-learn: (1, 8, 8), 17 grey levels.

    With `context=label` they are conditioned on the digit.
    """
    known = load_digits()

    def split(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rest, held_out = hold_out(rows, test, "test")
        return *hold_out(rest, validation, "validation"), held_out

    splits = Splits(*split(torch.from_numpy(known.images).to(torch.uint8)[:, None]))
    if context is None:
        return splits
    return label_contexts(splits, [part.numpy() for part in split(torch.tensor(known.target))])


def patches(size: int = 32, stride: int = 8) -> Splits:
    """Return (3, size, size) patches of scikit-learn's two photographs (427×640).

    The left 70 % of each photograph is for training, the next 15 % for validation and the rest for
    the test. No pixel is in two splits.
    """
    photos = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
    width = photos.shape[3]
    regions = list(itertools.pairwise([0, int(0.70 * width), int(0.85 * width), width]))
    widest = min(right - left for left, right in regions)
    require(size <= widest, f"size={size}: must be at most {widest}, the width of a split's region")

    def cut(left: int, right: int) -> Tensor:
        windows = photos[..., left:right].unfold(2, size, stride).unfold(3, size, stride)
        return windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, size, size)

    return Splits(*itertools.starmap(cut, regions))


def idx_images(
    name: str, root: str, validation: int, resize: int = 28, context: str | None = None
) -> Splits:
    """Return a data set of IDX_IMAGES, (1, resize, resize), from IDX files, gzipped or plain.

    The files are in `root`, in one folder there, or in `root`/{name}/raw, to which torchvision
    downloads them if there are none. `validation` of the training images are held out. With
    `context=label` the images are conditioned on the labels in the files beside them.
    """
    require_choice("name", name, IDX_IMAGES)

    def find() -> list[Path | None]:
        return [find_idx(name, stem, Path(root).expanduser()) for stem in IDX_IMAGES[name]]

    files = find()
    if not any(files):
        names = " and ".join(f"{stem}-idx3-ubyte" for stem in IDX_IMAGES[name])
        for options in DOWNLOAD_OPTIONS.get(name, [{}]):
            download(name, root, f"{names} (or .idx3-ubyte, or gzipped)", **options)
        files = find()
    for stem, file in zip(IDX_IMAGES[name], files, strict=True):
        missing = f"{stem}-idx3-ubyte, {stem}.idx3-ubyte or either with .gz"
        require(file is not None, f"{root}: there is no {missing}, which {name} needs")
    train, test = (reduce_images(read_idx(file)[:, None], resize) for file in files)
    if name == "EMNIST":  # its files hold rows for columns
        train, test = train.mT, test.mT
    splits = Splits(*hold_out(train, validation, "validation"), test)
    if context is None:
        return splits
    labels = []
    for file, images in zip(files, (train, test), strict=True):
        named = file.name.replace("images", "labels").replace("idx3", "idx1")
        require((file.parent / named).is_file(), f"{file.parent}: there is no {named}")
        labels.append(read_idx(file.parent / named, dimensions=1))
        same = len(labels[-1]) == len(images)
        require(same, f"{file.parent / named}: must hold one label for each image")
    parts = (*hold_out(labels[0], validation, "validation"), labels[1])
    return label_contexts(splits, [part.numpy() for part in parts])


def find_idx(name: str, stem: str, root: Path) -> Path | None:
    """Find the file of images `stem` of the data set `name`."""
    spellings = [f"{stem}{dot}idx3-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    nested = sorted(path for path in root.glob("*") if path.is_dir())
    for folders in ([root], [root / name / "raw"], nested):
        paths = (folder / spelling for folder in folders for spelling in spellings)
        found = {path.parent: path for path in paths if path.is_file()}
        several = f"{root}: {' and '.join(map(str, found))} hold {stem} each; give one as root"
        require(len(found) <= 1, several)
        if found:
            return found.popitem()[1]
    return None


def read_idx(path: Path, dimensions: int = 3) -> Tensor:
    """Read images (N, H, W): bytes 00 00 08 03; N, H and W as big-endian uint32; the pixels.

    Labels (N,) have one of the `dimensions`.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)})") from None
    header = 4 + 4 * dimensions
    start, pixels = content[:4].hex() or "nothing", np.frombuffer(content[header:], np.uint8)
    right, what = f"0000080{dimensions}", "images" if dimensions == 3 else "labels"
    starts_well = start == right and len(content) >= header
    require(starts_well, f"{path}: starts with {start}; an IDX file of {what} starts with {right}")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    fits = len(pixels) == math.prod(shape)
    require(fits, f"{path}: holds {len(pixels)} pixels, but its header says {shape}")
    return torch.tensor(pixels.reshape(shape))


def cifar10(root: str, validation: int, resize: int = 32, context: str | None = None) -> Splits:
    """Return CIFAR10, (3, resize, resize); download it to `root` if a file is missing or wrong.

    With `context=label` the images are conditioned on the names of their classes.
    """
    download("CIFAR10", root, datasets.CIFAR10.base_folder)
    parts = [datasets.CIFAR10(Path(root).expanduser(), train=train) for train in (True, False)]
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    labels = [np.array(part.classes)[part.targets] for part in parts]
    return downloaded(images, labels, validation, resize, context)


def svhn(root: str, validation: int, resize: int = 32, context: str | None = None) -> Splits:
    """Return the house numbers of SVHN as `cifar10` does; `context=label` is the digit."""
    download("SVHN", root, "train_32x32.mat and test_32x32.mat", split="train")
    download("SVHN", root, "train_32x32.mat and test_32x32.mat", split="test")
    parts = [datasets.SVHN(Path(root).expanduser(), split=split) for split in ("train", "test")]
    images = [torch.from_numpy(part.data) for part in parts]
    return downloaded(images, [part.labels for part in parts], validation, resize, context)


def downloaded(
    images: list[Tensor], labels: list[np.ndarray], validation: int, side: int, context: str | None
) -> Splits:
    """Hold `validation` of the training images (N, C, H, W) out, of training and test images."""
    train, test = (reduce_images(part, side) for part in images)
    splits = Splits(*hold_out(train, validation, "validation"), test)
    if context is None:
        return splits
    index = hold_out(torch.arange(len(train)), validation, "validation")
    return label_contexts(splits, [*(labels[0][part.numpy()] for part in index), labels[1]])


def reduce_images(images: Tensor, side: int) -> Tensor:
    """(N, C, H, W) → (N, C, side, side), uint8: each pixel averages the pixels that it covers."""
    largest = images.shape[-1]
    require(side <= largest, f"resize={side}: must be at most {largest}, the side of the images")
    if side == largest:
        return images
    parts = (F.adaptive_avg_pool2d(part.float(), side) for part in images.split(10000))
    return torch.cat([part.round().byte() for part in parts])


def download(name: str, root: str, files: str, **options: object) -> None:
    """Let torchvision download a data set to `root`, unless its `files` there are whole."""
    folder, cifar = Path(root).expanduser(), datasets.CIFAR10
    known = {*IDX_IMAGES, cifar.base_folder, cifar.filename}  # torchvision's own names
    known |= {"train_32x32.mat", "test_32x32.mat"}
    others = sorted({path.name for path in folder.glob("*")} - known)
    begun = (folder / {"CIFAR10": cifar.base_folder}.get(name, name)).exists()
    put = f"put the files there: {files}"
    other = f"{root}: does not hold {name} but other data ({', '.join(others[:3])})"
    require(begun or not others, f"{other}; give another folder, or {put}")
    try:
        getattr(datasets, name)(folder, download=True, **options)
    except (OSError, RuntimeError) as error:  # no network or permission; or a wrong checksum
        reason = f"is missing or damaged, and downloading it failed ({one_line(error)})"
        raise InputError(f"{root}: {name} {reason}; {put}") from None
