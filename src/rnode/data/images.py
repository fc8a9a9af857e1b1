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
    """Return a data set of IDX_IMAGES, (1, resize, resize), from IDX files, gzipped or plain.

    The files are in `root`, in one folder there, or in `root`/{name}/raw, to which torchvision
    downloads them if there are none. `validation` of the training images are held out.
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
    return Splits(*hold_out(train, validation, "validation"), test)


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


def read_idx(path: Path) -> Tensor:
    """Read images (N, H, W): bytes 00 00 08 03; N, H and W as big-endian uint32; the pixels."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
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
        pixels = torch.from_numpy(datasets.CIFAR10(Path(root).expanduser(), train=train).data)
        return reduce_images(pixels.permute(0, 3, 1, 2).contiguous(), resize)

    return Splits(*hold_out(images(train=True), validation, "validation"), images(train=False))


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
