"""Data sets of images."""

import gzip
import itertools
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torchvision import datasets

from rnode.data.splits import SPLIT_NAMES, Splits, image_splits
from rnode.errors import InputError, one_line, require, require_choice
from rnode.transforms import ImageTransform

IDX = "train-images-idx3-ubyte and t10k-images-idx3-ubyte"
FILES = {"MNIST": IDX, "FashionMNIST": IDX, "KMNIST": IDX, "CIFAR10": "cifar-10-batches-py"}


def digits(validation: float = 180, test: float = 360, **options: Any) -> Splits:
    """Return the 1,797 handwritten digits of scikit-learn: (1, 8, 8), 17 grey levels.

    The options, here and below, are those of `image_splits`.
    """
    known = load_digits()
    images = torch.from_numpy(known.images).to(torch.uint8)[:, None]
    labels = {"train": known.target}
    return image_splits({"train": images}, labels, 17, validation=validation, test=test, **options)


def patches(size: int | Sequence[int] = 32, stride: int = 8, alpha: float = 0.05) -> Splits:
    """Return (3, height, width) patches of scikit-learn's two photographs (427×640).

    The left 70 % of each photograph is for training, the next 15 % for validation and the rest for
    the test. No pixel is in two splits.
    """
    photos = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
    height, width = (size, size) if isinstance(size, int) else size
    fits = height <= 427 and width <= 96
    require(fits, f"size={size}: must be at most 96, the width of a split's region")
    splits = []
    for left, right in ((0, 448), (448, 544), (544, 640)):
        windows = photos[..., left:right].unfold(2, height, stride).unfold(3, width, stride)
        splits.append(windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, height, width))
    return Splits(*splits, ImageTransform(256, alpha))


def named_images(name: str, root: str, resize: int, **options: Any) -> Splits:
    """Return a data set of FILES, uint8 (N, C, resize, resize).

    `root` holds the files as torchvision stores them; what is missing is downloaded. IDX files are
    also found in `root` itself, gzipped or plain.
    """
    require_choice("name", name, FILES)
    folder = Path(root).expanduser()
    images, labels = {}, {}
    for split in ("train", "test"):
        x, labels[split] = find_idx(name, folder, split) or from_torchvision(name, folder, split)
        images[split] = reduce_images(x, resize)
    return image_splits(images, labels, **options)


def find_idx(name: str, root: Path, split: str) -> tuple[Tensor, np.ndarray] | None:
    """Return images (N, 1, H, W) of IDX files and their labels, if there are such files."""
    stem = {"train": "train", "test": "t10k"}[split]
    for folder, ending in itertools.product((root, root / name / "raw"), ("", ".gz")):
        path = folder / f"{stem}-images-idx3-ubyte{ending}"
        beside = folder / f"{stem}-labels-idx1-ubyte{ending}"
        if FILES[name] == IDX and path.is_file():
            images = read_idx(path)[:, None]
            labels = read_idx(beside).numpy() if beside.is_file() else np.full(len(images), "")
            return images, labels
    return None


def read_idx(path: Path) -> Tensor:
    """Read an IDX file: bytes 00 00 08 n; n sizes as big-endian uint32; the array."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        require(content[:3] == b"\0\0\x08", f"starts with {content[:4].hex()}, not 000008")
        shape = np.frombuffer(content, ">u4", content[3], offset=4)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape))
        return torch.tensor(values.reshape(shape))
    except (OSError, EOFError, IndexError, ValueError, zlib.error) as error:
        reason = f"is not a whole IDX file ({one_line(error)})"
        raise InputError(f"{path}: {reason}; once deleted, it is downloaded again") from None


def from_torchvision(name: str, root: Path, split: str) -> tuple[Tensor, np.ndarray]:
    """Return images and labels as torchvision reads them; download them if `root` lacks them."""
    load = partial(getattr(datasets, name), root, train=split == "train")
    try:
        known = load()
    except RuntimeError:  # a file is missing or has a wrong checksum
        try:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / "download.lock"):  # one process downloads what others then find
                known = load(download=True)
        except (OSError, RuntimeError) as error:  # no network or permission, or a wrong checksum
            failed = f"{name} is missing or damaged, and downloading it failed ({one_line(error)})"
            raise InputError(f"{root}: {failed}; put the files there: {FILES[name]}") from None
    if FILES[name] == IDX:
        return known.data[:, None], known.targets.numpy()
    return torch.from_numpy(known.data).movedim(3, 1), np.array(known.classes)[known.targets]


def reduce_images(images: Tensor, side: int) -> Tensor:
    """(N, C, H, W) → (N, C, side, side), uint8: each pixel averages the pixels that it covers."""
    largest = images.shape[-1]
    require(side <= largest, f"resize={side}: must be at most {largest}, the side of the images")
    parts = (F.adaptive_avg_pool2d(part.float(), side) for part in images.split(10000))
    return torch.cat([part.round().byte() for part in parts])


def arrays(root: str, **options: Any) -> Splits:
    """Return images that NumPy has saved, uint8 (N, H, W), (N, H, W, C) or (N, C, H, W).

    `root` is a folder with train_images.npy and, where they exist, val_images.npy, test_images.npy,
    train_labels.npy, …. The images are mapped into memory, and a batch is read when it is needed,
    unless the training images are cut.
    """
    folder = Path(root).expanduser()
    require((folder / "train_images.npy").is_file(), f"root={root}: holds no train_images.npy")
    images, labels = {}, {}
    for name in SPLIT_NAMES:
        path, beside = folder / f"{name}_images.npy", folder / f"{name}_labels.npy"
        if path.is_file():
            x = images[name] = load_images(path)
            label = load_array(beside).ravel() if beside.is_file() else np.full(len(x), "")
            require(len(label) == len(x), f"{beside}: has {len(label)} labels of {len(x)} images")
            labels[name] = label
    shapes = {tuple(x.shape[1:]) for x in images.values()}
    require(len(shapes) == 1, f"root={root}: images of several shapes: {sorted(shapes)}")
    return image_splits(images, labels, **options)


def load_array(path: Path) -> np.ndarray:
    """Map a file into memory, as copy on write: torch warns of arrays that are not writable."""
    try:
        return np.load(path, mmap_mode="c")
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{path}: is not a whole .npy file ({one_line(error)})") from None


def load_images(path: Path) -> Tensor:
    """Map images (N, H, W), (N, H, W, C) or (N, C, H, W) into memory as (N, C, H, W)."""
    x = load_array(path)
    fits = x.ndim in (3, 4) and x.dtype == np.uint8 and x.size > 0
    right = "must be uint8 from 0 to 255, (N, H, W), (N, H, W, C) or (N, C, H, W)"
    require(fits, f"{path}: shape {x.shape} and type {x.dtype}: {right}")
    x = torch.from_numpy(x)
    if x.ndim == 3:
        return x[:, None]
    return x if x.shape[1] in (1, 3) and x.shape[3] not in (1, 3) else x.movedim(3, 1)
