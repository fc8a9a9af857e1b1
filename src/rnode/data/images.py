"""Data sets of images."""

import gzip
import itertools
import math
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torchvision import datasets

from rnode.data.splits import Splits, hold_out
from rnode.errors import InputError, one_line, require

IDX_FILES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")


def digits(validation: int = 180, test: int = 360) -> Splits:
    """Return the 1,797 handwritten digits of scikit-learn: (1, 8, 8), 17 grey levels."""
    images = torch.from_numpy(load_digits().images).to(torch.uint8)[:, None]
    train, test_rows = hold_out(images, test, "test")
    train, val = hold_out(train, validation, "validation")
    return Splits(train, val, test_rows)


def patches(size: int = 32, stride: int = 8) -> Splits:
    """Return (3, size, size) patches of scikit-learn's two photographs (427×640).

    The left 70 % of each photograph is for training, the next 15 % for validation and the rest for
    the test. No pixel is in two splits.
    """
    photos = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
    width = photos.shape[3]
    ends = [0, int(0.70 * width), int(0.85 * width), width]
    widest = min(b - a for a, b in itertools.pairwise(ends))
    require(size <= widest, f"size={size}: must be at most {widest}, the width of a split's region")

    def cut(left: int, right: int) -> Tensor:
        windows = photos[..., left:right].unfold(2, size, stride).unfold(3, size, stride)
        return windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, size, size)

    return Splits(*(cut(a, b) for a, b in itertools.pairwise(ends)))


def idx_images(name: str, root: str, validation: int, resize: int = 28) -> Splits:
    """Return MNIST or FashionMNIST, (1, resize, resize), from IDX files, gzipped or plain.

    Args:
        name: "MNIST" or "FashionMNIST".
        root: folder of the files, or of {name}/raw with the files; they are downloaded to the
            latter if both hold none.
        validation: number of training images that become the validation set.
        resize: side to which the images are reduced, from 28.

    Raises:
        InputError: if a file is missing or damaged, or the download fails.
    """
    require(name in ("MNIST", "FashionMNIST"), f"name={name}: must be MNIST or FashionMNIST")
    folders = [Path(root), Path(root) / name / "raw"]  # torchvision downloads to the second
    names = " and ".join(f"{file}[.gz]" for file in IDX_FILES)
    if not any(find_idx(folders, file) for file in IDX_FILES):
        download(name, root, names)
    paths = [find_idx(folders, file) for file in IDX_FILES]
    for file, path in zip(IDX_FILES, paths, strict=True):
        require(path is not None, f"{root}: {file}[.gz] is missing; {name} needs {names} there")
    train, test = (reduce_images(read_idx(path)[:, None], resize) for path in paths)
    return Splits(*hold_out(train, validation, "validation"), test)


def find_idx(folders: list[Path], file: str) -> Path | None:
    """Return the path of `file`, plain or gzipped, in the first of the folders that holds it."""
    paths = (folder / f"{file}{suffix}" for folder in folders for suffix in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def read_idx(path: Path) -> Tensor:
    """Read the images of an IDX file, gzipped if its name ends in .gz: (N, H, W), uint8.

    The format: bytes 0, 0, type (8: uint8), number of dimensions; each dimension as a big-endian
    uint32; the values.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            header, pixels = file.read(16), file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)})") from None
    if header[:4] != bytes([0, 0, 8, 3]) or len(header) < 16:
        start = header[:4].hex() or "nothing"
        raise InputError(f"{path}: starts with {start}; an IDX file of images starts with 00000803")
    shape = tuple(int(n) for n in np.frombuffer(header, ">u4", count=3, offset=4))
    if len(pixels) != math.prod(shape):
        raise InputError(f"{path}: holds {len(pixels)} pixels, but its header says {shape}")
    return torch.from_numpy(np.frombuffer(pixels, np.uint8).reshape(shape).copy())


def cifar10(root: str, validation: int, resize: int = 32) -> Splits:
    """Return CIFAR10, (3, resize, resize).

    Args:
        root: folder of cifar-10-batches-py; it is downloaded there if missing or damaged.
        validation: number of training images that become the validation set.
        resize: side to which the images are reduced, from 32.

    Raises:
        InputError: if the download fails.
    """
    try:
        datasets.CIFAR10(root)
    except RuntimeError:  # a file is missing or fails its checksum
        download("CIFAR10", root, datasets.CIFAR10.base_folder)

    def images(train: bool) -> Tensor:
        pixels = torch.from_numpy(datasets.CIFAR10(root, train=train).data).permute(0, 3, 1, 2)
        return reduce_images(pixels.contiguous(), resize)

    return Splits(*hold_out(images(train=True), validation, "validation"), images(train=False))


def reduce_images(images: Tensor, side: int) -> Tensor:
    """(N, C, H, W) → (N, C, side, side), uint8: each pixel averages the pixels that it covers."""
    largest = images.shape[-1]
    require(side <= largest, f"resize={side}: must be at most {largest}, the side of the images")
    if side == largest:
        return images
    parts = (F.adaptive_avg_pool2d(part.float(), side) for part in images.split(10000))
    return torch.cat([part.round().byte() for part in parts])


def download(name: str, root: str, files: str) -> None:
    """Let torchvision download a data set to `root`, in place of the missing `files`."""
    try:
        getattr(datasets, name)(root, download=True)
    except (OSError, RuntimeError) as error:  # no network or permission; or a wrong checksum
        raise InputError(
            f"{root}: {files} are missing or damaged, and downloading {name} failed "
            f"({one_line(error)}); put the files there"
        ) from None
