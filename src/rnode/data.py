"""Data sets, and the LightningDataModule that turns whole grey levels into what the flow trains on.

A source is a function that returns `Splits`: images as uint8 tensors (N, C, H, W), vectors as float tensors (N, d).
Sources that have no validation set of their own cut it from the training set by a permutation that never changes; the
test set is left as it is.
"""

import gzip
import inspect
import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from rnode.draws import sample_generators, step_seed
from rnode.errors import LARGEST, SHAPE, InputError, configured, is_int, is_shape, one_line, require
from rnode.transforms import Dequantize, Logit

SPLIT_SEED = 0  # of every split: the same images are held out whatever the seed of the run
NOISE = 0  # stream of the dequantization noise in evaluation (see sample_generators)


class Splits(NamedTuple):
    train: Tensor
    val: Tensor
    test: Tensor


class Batch(NamedTuple):
    """y (B, *shape), what the flow sees; log|det dy/dx| (B,) of the transforms; index (B,) of each sample in its split."""

    y: Tensor
    log_det: Tensor
    index: Tensor


class Indexed(Dataset):
    """A tensor's rows with their indices, fetched a whole batch at a time."""

    def __init__(self, rows: Tensor):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(indices)
        return self.rows[index], index


class Fresh(Dataset):
    """`count` vectors an epoch, drawn anew from a density for every batch.

    The batch's indices are the seed: every epoch of every run asks for them in an order of its own.
    """

    def __init__(self, density: Callable[[int, np.random.Generator], np.ndarray], count: int):
        self.density, self.count = density, count

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng(indices)
        return torch.from_numpy(self.density(len(indices), rng)).float(), torch.tensor(indices)


class Order(DistributedSampler):
    """A new order of the training samples each epoch, dealt out to the processes: decided by (seed, epoch).

    The first epoch it gives begins after `skip` samples, where a run that was cut off goes on.
    """

    def __init__(self, data: Dataset, replicas: int, rank: int, seed: int, skip: int):
        super().__init__(data, num_replicas=replicas, rank=rank, seed=seed)
        self.skip = skip

    def __iter__(self) -> Iterator[int]:
        skip, self.skip = self.skip, 0
        return itertools.islice(super().__iter__(), skip, None)


class DataModule(LightningDataModule):
    """Batches of a data set, transformed on the device after they have been sent there as they are.

    Images (levels given): u = (x + noise)/levels and y = logit(α + (1 − 2α)u), the noise drawn afresh for every training
    batch and, for evaluation, from (seed, index of the image). Vectors pass unchanged. `arguments` are the source's own.
    """

    def __init__(
        self,
        source: Callable[..., Splits],
        shape: Sequence[int],
        batch_size: int,
        eval_batch_size: int,
        levels: int | None = None,
        alpha: float | None = None,
        flip: bool = False,
        seed: int = 0,
        **arguments,
    ):
        super().__init__()
        inspect.signature(source).bind(**arguments)  # a misspelt one is found here, not after hours in a queue
        require(is_shape(shape), "dataset.shape", shape, SHAPE)
        require(isinstance(flip, bool), "dataset.flip", flip, "true or false")
        require(is_int(seed, at_least=0), "dataset.seed", seed, "a whole number, 0 or more")
        require(is_int(batch_size, at_least=1), "dataset.batch_size", batch_size, "a whole number, 1 or more")
        require(is_int(eval_batch_size, at_least=1), "dataset.eval_batch_size", eval_batch_size, "a whole number, 1 or more")
        self.source, self.arguments = source, arguments
        self.shape, self.flip, self.seed = tuple(shape), flip, seed
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.dequantize = None if levels is None else Dequantize(levels)
        self.logit = None if levels is None else Logit(alpha)
        self.splits: Splits | None = None

    def prepare_data(self) -> None:
        """Download once a node, before the other processes look for the files."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        if self.splits is not None:
            return
        with configured("dataset"):
            splits = self.source(**self.arguments)
        for name, rows in splits._asdict().items():
            require(len(rows) > 0, f"number of {name} samples", len(rows), "1 or more")
            if not isinstance(rows, Tensor):
                continue
            shape = tuple(rows.shape[1:])
            require(shape == self.shape, "dataset.shape", list(self.shape), f"{list(shape)}, as the {name} data are")
            if self.dequantize is not None:
                levels, largest = self.dequantize.levels, int(rows.max())
                require(largest < levels, "dataset.levels", levels, f"more than {largest}, which the {name} data hold")
        self.splits = splits

    def train_dataloader(self) -> DataLoader:
        data = self.splits.train
        data = Indexed(data) if isinstance(data, Tensor) else data
        trainer = self.trainer
        progress = trainer.fit_loop.epoch_loop.batch_progress  # that of a checkpoint, if the run goes on from one
        done = 0 if progress.is_last_batch else progress.current.processed
        order = Order(data, trainer.world_size, trainer.global_rank, self.seed, skip=done * self.batch_size)
        return DataLoader(data, self.batch_size, sampler=order, collate_fn=as_fetched)

    def val_dataloader(self) -> DataLoader:
        return self.eval_dataloader(self.splits.val)

    def test_dataloader(self) -> DataLoader:
        return self.eval_dataloader(self.splits.test)

    def eval_dataloader(self, rows: Tensor, rank: int = 0, processes: int = 1) -> DataLoader:
        """The rows in their order; for one of several processes, every so manieth."""
        data = Indexed(rows)
        if processes > 1:
            data = Subset(data, range(rank, len(rows), processes))
        # Its own generator: a loader draws a number each time it starts, and training's random stream is not to notice.
        return DataLoader(data, self.eval_batch_size, collate_fn=as_fetched, generator=torch.Generator())

    def on_before_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        trainer = self.trainer
        if trainer.training:
            batch_idx = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            torch.manual_seed(step_seed(self.seed, trainer.current_epoch, batch_idx, trainer.global_rank))
        return batch

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> Batch:
        x, index = batch
        training = self.trainer.training
        if self.flip and training:
            flipped = torch.rand(len(x), device=x.device) < 0.5
            x = torch.where(flipped[:, None, None, None], x.flip(-1), x)
        return self.transform(x, index, None if training else self.noise(sample_generators(index, self.seed, NOISE)))

    def noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Uniform noise for as many samples as there are `generators`, each drawn by its own: (B, *shape), on the CPU."""
        return torch.stack([torch.rand(self.shape, generator=g) for g in generators])

    def transform(self, x: Tensor, index: Tensor, noise: Tensor | None = None) -> Batch:
        """x (B, *shape) as the source gives it → Batch. `noise` (B, *shape) in [0, 1) is drawn uniformly if not given."""
        if self.dequantize is None:
            return Batch(x, x.new_zeros(len(x)), index)
        noise = torch.rand(x.shape, device=x.device) if noise is None else noise.to(x.device)
        u, log_det_u = self.dequantize(x, noise)
        y, log_det_y = self.logit(u)
        return Batch(y, log_det_u + log_det_y, index)

    def inverse(self, y: Tensor) -> Tensor:
        """y (B, *shape) → images in [0, 1] (B, C, H, W), for looking at; vectors (B, d) pass unchanged."""
        return y if self.logit is None else self.logit.inverse(y).clamp(0, 1)


def as_fetched(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


def hold_out(rows: Tensor, count: int, name: str) -> tuple[Tensor, Tensor]:
    """`rows` without `count` of them, and those."""
    right = f"a whole number from 1 to {len(rows) - 1}, with {len(rows)} samples to cut it from"
    require(is_int(count, at_least=1) and count < len(rows), name, count, right)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return rows[order[count:]], rows[order[:count]]


def digits(validation: int = 180, test: int = 360) -> Splits:
    """scikit-learn's 1,797 handwritten digits: (1, 8, 8), 17 grey levels."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).to(torch.uint8)[:, None]
    train, test_rows = hold_out(images, test, "dataset.test")
    train, val = hold_out(train, validation, "dataset.validation")
    return Splits(train, val, test_rows)


def patches(size: int = 32, stride: int = 8) -> Splits:
    """(3, size, size) patches of scikit-learn's two photographs (427×640).

    Of each photograph the left 70 % is for training, the next 15 % for validation, the rest for the test: no pixel is in
    two splits.
    """
    from sklearn.datasets import load_sample_images

    photos = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)  # (2, 3, 427, 640)
    width = photos.shape[3]
    ends = [0, int(0.70 * width), int(0.85 * width), width]
    largest = min(b - a for a, b in itertools.pairwise(ends))
    require(is_int(size, at_least=1) and size <= largest, "dataset.size", size, f"a whole number from 1 to {largest}")
    require(is_int(stride, at_least=1), "dataset.stride", stride, "a whole number, 1 or more")

    def cut(left: int, right: int) -> Tensor:
        windows = photos[..., left:right].unfold(2, size, stride).unfold(3, size, stride)  # (2, 3, rows, columns, s, s)
        return windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, size, size)

    return Splits(*(cut(a, b) for a, b in itertools.pairwise(ends)))


IDX_FILES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}


def idx_images(name: str, root: str, validation: int, resize: int = 28) -> Splits:
    """MNIST or FashionMNIST, (1, 28, 28): from IDX files, gzipped or plain, in `root`; downloaded there if missing.

    `resize`, where it is not 28, is the side to which the images are reduced.
    """
    require(name in ("MNIST", "FashionMNIST"), "dataset.name", name, "MNIST or FashionMNIST")
    require(isinstance(root, str), "dataset.root", root, "a folder")
    folders = [Path(root), Path(root) / name / "raw"]  # torchvision downloads to the second
    if not any(find_idx(folder, file) for folder in folders for file in IDX_FILES.values()):
        download(name, root)
    arrays = {}
    for split, file in IDX_FILES.items():
        path = next((found for folder in folders if (found := find_idx(folder, file))), None)
        if path is None:
            raise InputError(f"dataset.root={root}: holds no {file} or {file}.gz; put the four files of the data set there")
        arrays[split] = reduced(read_idx(path)[:, None], resize)
    train, val = hold_out(arrays["train"], validation, "dataset.validation")
    return Splits(train, val, arrays["test"])


def find_idx(folder: Path, file: str) -> Path | None:
    return next((path for path in (folder / file, folder / f"{file}.gz") if path.is_file()), None)


def read_idx(path: Path) -> Tensor:
    """Images of an IDX file, gzipped or plain: (N, H, W), uint8.

    The format: bytes 0, 0, type (8: uint8), number of dimensions; each dimension as a big-endian uint32; the values.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            header = file.read(16)
            if header[:4] != bytes([0, 0, 8, 3]) or len(header) < 16:
                start = header[:4].hex() or "nothing"
                raise InputError(f"{path}: starts with {start}; an IDX file of images starts with 00000803")
            shape = tuple(int(n) for n in np.frombuffer(header, ">u4", count=3, offset=4))
            pixels = file.read(math.prod(shape) + 1) if math.prod(shape) <= LARGEST else b""
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); it must be a whole IDX file, gzipped or plain") from None
    if len(pixels) != math.prod(shape):
        many = "more" if len(pixels) > math.prod(shape) else len(pixels)
        raise InputError(f"{path}: holds {many} bytes of pixels where its header says {shape}; it must be whole")
    return torch.from_numpy(np.frombuffer(pixels, np.uint8).reshape(shape).copy())


def cifar10(root: str, validation: int, resize: int = 32) -> Splits:
    """CIFAR10, (3, 32, 32): from `root`; downloaded there if missing. `resize` as for `idx_images`."""
    from torchvision.datasets import CIFAR10

    require(isinstance(root, str), "dataset.root", root, "a folder")

    def images(train: bool) -> Tensor:
        return reduced(torch.from_numpy(CIFAR10(root, train=train).data).permute(0, 3, 1, 2).contiguous(), resize)

    try:
        CIFAR10(root)
    except RuntimeError:  # torchvision's word for files that are missing or fail their checksum
        download("CIFAR10", root)
    train, val = hold_out(images(train=True), validation, "dataset.validation")
    return Splits(train, val, images(train=False))


def reduced(images: Tensor, side: int) -> Tensor:
    """(N, C, H, W) → (N, C, side, side), uint8: each pixel the rounded mean of the pixels that it covers."""
    largest = images.shape[-1]
    require(is_int(side, at_least=4) and side <= largest, "dataset.resize", side, f"a whole number from 4 to {largest}")
    if side == largest:
        return images
    return torch.cat([F.adaptive_avg_pool2d(part.float(), side).round().byte() for part in images.split(10000)])


def download(name: str, root: str) -> None:
    """Have torchvision download a data set to `root`, or say in one line that it could not."""
    from torchvision import datasets

    try:
        getattr(datasets, name)(root, download=True)
    except (OSError, RuntimeError) as error:  # no network, no permission; or a file that fails its checksum
        raise InputError(
            f"dataset.root={root}: {name} is not there or not whole, and downloading it failed ({one_line(error)}); "
            "put its files there"
        ) from None


def toy(name: str, train: int = 20000, validation: int = 2000, test: int = 10000) -> Splits:
    """Densities in the plane, and one on the line.

    Training points are drawn afresh for every batch; validation and test sets never change.
    """
    require(name in DENSITIES, "dataset.name", name, f"one of {', '.join(DENSITIES)}")
    for key, count in (("train", train), ("validation", validation), ("test", test)):
        require(is_int(count, at_least=1), f"dataset.{key}", count, "a whole number, 1 or more")
    density = DENSITIES[name]

    def fixed(count: int, stream: int) -> Tensor:
        return torch.from_numpy(density(count, np.random.default_rng((SPLIT_SEED, stream)))).float()

    return Splits(Fresh(density, train), fixed(validation, 1), fixed(test, 2))


def eight_gaussians(n: int, rng: np.random.Generator) -> np.ndarray:
    """Eight normals of standard deviation 0.14 on a circle of radius 2: entropy 0.985 nats."""
    angle = rng.integers(8, size=n) * (np.pi / 4)
    return 2 * np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.14 * rng.standard_normal((n, 2))


def two_gaussians(n: int, rng: np.random.Generator) -> np.ndarray:
    """One-dimensional: normals of standard deviation 0.4 at −1.6 and 1.2, the second twice as likely."""
    return 2.8 * (rng.random((n, 1)) < 2 / 3) - 1.6 + 0.4 * rng.standard_normal((n, 1))


def moons(n: int, rng: np.random.Generator) -> np.ndarray:
    from sklearn.datasets import make_moons

    points, _ = make_moons(n, noise=0.1, random_state=int(rng.integers(2**31)))
    return 2 * points - np.array([1.0, 0.5])


def circles(n: int, rng: np.random.Generator) -> np.ndarray:
    from sklearn.datasets import make_circles

    points, _ = make_circles(n, factor=0.5, noise=0.06, random_state=int(rng.integers(2**31)))
    return 2 * points


def pinwheel(n: int, rng: np.random.Generator) -> np.ndarray:
    """Five normals, long along a ray and narrow across it, wound up: the further out, the further turned."""
    along, across = 1.2 + 0.35 * rng.standard_normal(n), 0.12 * rng.standard_normal(n)
    angle = rng.integers(5, size=n) * (2 * np.pi / 5) + 0.8 * along
    cos, sin = np.cos(angle), np.sin(angle)
    return 1.3 * np.stack([along * cos - across * sin, along * sin + across * cos], axis=1)


def checkerboard(n: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform on the eight dark unit squares of [−2, 2]²: entropy log 8 = 2.079 nats."""
    square = rng.integers(8, size=n)
    row = square // 2
    corner = np.stack([2 * (square % 2) + row % 2, row], axis=1) - 2.0
    return corner + rng.random((n, 2))


def spirals(n: int, rng: np.random.Generator) -> np.ndarray:
    """Two arms, each one and a half turns about the origin, denser towards it in proportion to the arc's length."""
    angle = np.sqrt(rng.random(n)) * 3 * np.pi
    arm = np.where(rng.random(n) < 0.5, -1.0, 1.0)[:, None]
    points = arm * np.stack([-np.cos(angle), np.sin(angle)], axis=1) * angle[:, None] / np.pi
    return 0.9 * points + 0.08 * rng.standard_normal((n, 2))


def rings(n: int, rng: np.random.Generator) -> np.ndarray:
    """Four concentric circles, equally likely, with noise."""
    radius = 0.6 * (1 + rng.integers(4, size=n)) + 0.06 * rng.standard_normal(n)
    angle = 2 * np.pi * rng.random(n)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


DENSITIES = {
    "eight_gaussians": eight_gaussians,
    "moons": moons,
    "circles": circles,
    "pinwheel": pinwheel,
    "checkerboard": checkerboard,
    "spirals": spirals,
    "rings": rings,
    "two_gaussians": two_gaussians,
}
