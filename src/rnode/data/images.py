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

from rnode.data.splits import Splits, hold_out
from rnode.errors import InputError, one_line, require

IDX_FILES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")


def digits(validation: int = 180, test: int = 360) -> Splits:
    """Return the 1,797 handwritten digits of scikit-learn: (1, 8, 8), 17 grey levels."""
    images = torch.from_numpy(load_digits().images).to(torch.uint8)[:, None]
    train, test_images = hold_out(images, test, "test")
    return Splits(*hold_out(train, validation, "validation"), test_images)


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


def idx_images(name: str, root: str, validation: int, resize: int = 28) -> Splits:
    """Return MNIST or FashionMNIST, (1, resize, resize), from IDX files, gzipped or plain.

    The files are in `root` or in `root`/{name}/raw; torchvision downloads them to the latter if
    both hold none. `validation` of the training images are held out.
    """
    require(name in ("MNIST", "FashionMNIST"), f"name={name}: must be MNIST or FashionMNIST")
    folders = (Path(root), Path(root) / name / "raw")  # torchvision downloads to the second
    names = " and ".join(f"{file}[.gz]" for file in IDX_FILES)

    def find(file: str) -> Path | None:
        paths = (folder / f"{file}{suffix}" for folder in folders for suffix in ("", ".gz"))
        return next((path for path in paths if path.is_file()), None)

    def images(file: str) -> Tensor:
        path = find(file)
        require(path is not None, f"{root}: {file}[.gz] is missing; {name} needs {names} there")
        return reduce_images(read_idx(path)[:, None], resize)

    if not any(map(find, IDX_FILES)):
        download(name, root, names)
    train, test = map(images, IDX_FILES)
    return Splits(*hold_out(train, validation, "validation"), test)


def read_idx(path: Path) -> Tensor:
    """Read images (N, H, W): bytes 00 00 08 03; N, H and W as big-endian uint32; the pixels."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)})") from None
    start, pixels = content[:4].hex() or "nothing", np.frombuffer(content[16:], np.uint8)
    starts_well = start == "00000803" and len(content) >= 16
    require(starts_well, f"{path}: starts with {start}; an IDX file of images starts with 00000803")
    shape = struct.unpack(">3I", content[4:16])
    fits = len(pixels) == math.prod(shape)
    require(fits, f"{path}: holds {len(pixels)} pixels, but its header says {shape}")
    return torch.tensor(pixels.reshape(shape))


def cifar10(root: str, validation: int, resize: int = 32) -> Splits:
    """Return CIFAR10, (3, resize, resize); download it to `root` if a file is missing or wrong."""
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
    """Let torchvision download a data set to `root`, unless its `files` there are whole."""
    try:
        getattr(datasets, name)(root, download=True)
    except (OSError, RuntimeError) as error:  # no network or permission; or a wrong checksum
        reason = f"are missing or damaged, and downloading {name} failed ({one_line(error)})"
        raise InputError(f"{root}: {files} {reason}; put the files there") from None
