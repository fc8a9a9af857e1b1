"""Data sets of images."""

import contextlib
import gzip
import itertools
import zipfile
import zlib
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

from rnode.data.splits import NO_LABEL, SPLIT_NAMES, Labelled, Splits, image_splits
from rnode.errors import InputError, one_line, require, require_choice
from rnode.transforms import ImageTransform

MNIST_FILES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")
FILES = {  # of training and test images
    "MNIST": MNIST_FILES,
    "FashionMNIST": MNIST_FILES,
    "KMNIST": MNIST_FILES,
    "QMNIST": ("qmnist-train-images-idx3-ubyte", "qmnist-test-images-idx3-ubyte"),
    "EMNIST": ("emnist-balanced-train-images-idx3-ubyte", "emnist-balanced-test-images-idx3-ubyte"),
    "CIFAR10": ("cifar-10-batches-py/data_batch_1 to 5", "cifar-10-batches-py/test_batch"),
    "SVHN": ("train_32x32.mat", "test_32x32.mat"),
}


def digits(validation: float = 180, test: float = 360, **options: Any) -> Splits:
    """Return the 1,797 handwritten digits of scikit-learn: (1, 8, 8), 17 grey levels.

    The options, here and below, are those of `image_splits`.
    """
    known = load_digits()
    images = torch.from_numpy(known.images).to(torch.uint8)[:, None]
    parts = {"train": Labelled(images, known.target)}
    return image_splits(parts, levels=17, validation=validation, test=test, **options)


def patches(size: int = 32, stride: int = 8, alpha: float = 0.05) -> Splits:
    """Return (3, size, size) patches of scikit-learn's two photographs (427×640).

    The left 70 % of each photograph is for training, the next 15 % for validation and the rest for
    the test. No pixel is in two splits.
    """
    photos = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
    edges = [0, 448, 544, 640]
    require(size <= 96, f"size={size}: must be at most 96, the width of a split's region")

    def cut(left: int, right: int) -> Tensor:
        windows = photos[..., left:right].unfold(2, size, stride).unfold(3, size, stride)
        return windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, size, size)

    return Splits(*itertools.starmap(cut, itertools.pairwise(edges)), ImageTransform(256, alpha))


def named_images(name: str, root: str, resize: int, **options: Any) -> Splits:
    """Return a data set of FILES, uint8 (N, C, resize, resize).

    `root` holds the files as torchvision stores them; what is missing is downloaded. IDX files are
    also found in `root` itself and in one folder there, gzipped or plain.
    """
    require_choice("name", name, FILES)
    load = load_colour if name in ("CIFAR10", "SVHN") else load_idx
    parts = {}
    for part in ("train", "test"):
        images, labels = load(name, Path(root).expanduser(), part)
        parts[part] = Labelled(reduce_images(images, resize), labels)
    return image_splits(parts, **options)


def load_idx(name: str, root: Path, part: str) -> tuple[Tensor, np.ndarray]:
    """Return images (N, 1, H, W) of IDX files, and the labels in the file beside them."""
    path = find_idx(name, root, part)
    if path is None:
        from_torchvision(name, root, part)
        path = find_idx(name, root, part)
    images = read_idx(path)[:, None]
    beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    labels = np.full(len(images), NO_LABEL)
    if beside.is_file():
        labels = read_idx(beside, dimensions=1).numpy()
    return (images.mT if name == "EMNIST" else images), labels  # EMNIST's files are transposed


def find_idx(name: str, root: Path, part: str) -> Path | None:
    """Find a file of images: with a dot before idx3 or without, gzipped or plain."""
    file = FILES[name][part == "test"]
    for folder in ("", f"{name}/raw/", "*/"):
        paths = sorted(root.glob(folder + file.replace("-idx3", "[-.]idx3") + "*"))
        folders = sorted({str(path.parent) for path in paths})
        message = f"{root}: {' and '.join(folders)} hold {file} each; name one of them as root"
        require(len(folders) <= 1, message)
        if paths:
            return paths[0]
    return None


def read_idx(path: Path, dimensions: int = 3) -> Tensor:
    """Read images (N, H, W): bytes 00 00 08 03; N, H and W as big-endian uint32; the pixels.

    Labels (N,) have one of the `dimensions`.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        start = content[:4].hex()
        require(start == f"0000080{dimensions}", f"starts with {start}, not 0000080{dimensions}")
        shape = np.frombuffer(content, ">u4", dimensions, offset=4)
        pixels = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
        return torch.tensor(pixels.reshape(shape))
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path}: is not a whole IDX file ({one_line(error)})") from None


def load_colour(name: str, root: Path, part: str) -> tuple[Tensor, np.ndarray]:
    """Return images of CIFAR10 or SVHN, (N, 3, 32, 32), and their classes or digits."""
    known = from_torchvision(name, root, part)
    if name == "SVHN":
        return torch.from_numpy(known.data), known.labels
    classes = np.array(known.classes)[known.targets]
    return torch.from_numpy(known.data).permute(0, 3, 1, 2), classes


def from_torchvision(name: str, root: Path, part: str) -> Any:
    """Return torchvision's training or test images; download them if `root` lacks them."""
    options = {
        "SVHN": {"split": part},
        "QMNIST": {"what": part},
        "EMNIST": {"split": "balanced", "train": part == "train"},
    }
    dataset = partial(
        getattr(datasets, name), root, **options.get(name, {"train": part == "train"})
    )
    with contextlib.suppress(RuntimeError):  # a file is missing or has a wrong checksum
        return dataset()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / "download.lock"):  # one process downloads what the others then find
            return dataset(download=True)
    except (OSError, RuntimeError) as error:  # no network or permission, or a wrong checksum
        reason = f"is missing or damaged, and downloading it failed ({one_line(error)})"
        files = " and ".join(FILES[name])
        raise InputError(f"{root}: {name} {reason}; put the files there: {files}") from None


def reduce_images(images: Tensor, side: int) -> Tensor:
    """(N, C, H, W) → (N, C, side, side), uint8: each pixel averages the pixels that it covers."""
    largest = images.shape[-1]
    require(side <= largest, f"resize={side}: must be at most {largest}, the side of the images")
    if side == largest:
        return images
    parts = (F.adaptive_avg_pool2d(part.float(), side) for part in images.split(10000))
    return torch.cat([part.round().byte() for part in parts])


def arrays(root: str, **options: Any) -> Splits:
    """Return images that NumPy has saved, uint8 (N, H, W) or (N, H, W, C).

    `root` is a folder with train_images.npy and, where they exist, val_images.npy, test_images.npy,
    train_labels.npy, …, or an .npz file with arrays of these names. The files of a folder are
    mapped into memory, and a batch is read when it is needed, unless the training images are cut.
    An .npz file is read into memory, since it may be compressed.
    """
    path = Path(root).expanduser()
    try:
        if path.is_dir():  # mapped as copy on write: torch warns of arrays that are not writable
            known = {file.stem: np.load(file, mmap_mode="c") for file in path.glob("*_*.npy")}
        else:
            known = dict(np.load(path))
    except (OSError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"root={root}: cannot be read ({one_line(error)})") from None
    require("train_images" in known, f"root={root}: holds no train_images")
    samples = {}
    for name in (name for name in SPLIT_NAMES if f"{name}_images" in known):
        images = known[f"{name}_images"]
        message = f"root={root}: {name}_images of shape {images.shape} and type {images.dtype}"
        fits = images.dtype == np.uint8 and images.ndim in (3, 4)
        require(fits, f"{message}: must be uint8, (N, H, W) or (N, H, W, C)")
        images = images[..., None] if images.ndim == 3 else images
        labels = known.get(f"{name}_labels", np.full(len(images), NO_LABEL)).ravel()
        message = f"root={root}: {name}_labels must hold one label for each image"
        require(len(labels) == len(images), message)
        samples[name] = Labelled(torch.from_numpy(images).permute(0, 3, 1, 2), labels)
    return image_splits(samples, **options)
