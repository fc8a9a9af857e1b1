"""Densities in the plane, and one on the line."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import make_circles, make_moons
from torch import Tensor

from rnode.data.splits import SPLIT_SEED, Splits
from rnode.errors import require_choice
from rnode.transforms import Column, TableTransform

Density = Callable[[int, np.random.Generator], np.ndarray]  # samples n vectors, (n, d)


@dataclass
class FreshSamples:
    """`count` vectors, sampled anew for every batch; its indices, in their order, are the seed."""

    density: Density
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Tensor) -> Tensor:
        return sample(self.density, len(index), index.tolist())


def sample(density: Density, count: int, seed: Sequence[int]) -> Tensor:
    return torch.from_numpy(density(count, np.random.default_rng(seed))).float()


def toy(name: str, train: int = 20000, validation: int = 2000, test: int = 10000) -> Splits:
    """Return a density of DENSITIES: fresh training samples, fixed validation and test samples."""
    require_choice("name", name, DENSITIES)
    density = DENSITIES[name]
    val = sample(density, validation, (SPLIT_SEED, 1))
    columns = [Column(f"x{i}") for i in range(1, val.shape[1] + 1)]
    held_out = sample(density, test, (SPLIT_SEED, 2))
    return Splits(FreshSamples(density, train), val, held_out, TableTransform(columns))


def eight_gaussians(n: int, rng: np.random.Generator) -> np.ndarray:
    """Eight normals of standard deviation 0.14 on a circle of radius 2: entropy 0.985 nats."""
    angle = rng.integers(8, size=n) * (np.pi / 4)
    mean = 2 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return mean + 0.14 * rng.standard_normal((n, 2))


def moons(n: int, rng: np.random.Generator) -> np.ndarray:
    return 2 * make_moons(n, noise=0.1, random_state=int(rng.integers(2**31)))[0] - [1.0, 0.5]


def circles(n: int, rng: np.random.Generator) -> np.ndarray:
    return 2 * make_circles(n, factor=0.5, noise=0.06, random_state=int(rng.integers(2**31)))[0]


def checkerboard(n: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform on the eight dark unit squares of [−2, 2]²: entropy log 8 = 2.079 nats."""
    row, column = np.divmod(rng.integers(8, size=n), 2)
    return np.stack([2 * column + row % 2, row], axis=1) - 2.0 + rng.random((n, 2))


def spirals(n: int, rng: np.random.Generator) -> np.ndarray:
    """Two arms of one and a half turns about the origin, uniform in the square of the angle."""
    angle = np.sqrt(rng.random(n)) * 3 * np.pi
    arm = np.where(rng.random(n) < 0.5, -1.0, 1.0)[:, None]
    points = arm * np.stack([-np.cos(angle), np.sin(angle)], axis=1) * angle[:, None] / np.pi
    return 0.9 * points + 0.08 * rng.standard_normal((n, 2))


def two_gaussians(n: int, rng: np.random.Generator) -> np.ndarray:
    """One-dimensional: normals of standard deviation 0.4 at −1.6 and 1.2, the second 2/3 likely."""
    return 2.8 * (rng.random((n, 1)) < 2 / 3) - 1.6 + 0.4 * rng.standard_normal((n, 1))


_ALL = (eight_gaussians, moons, circles, checkerboard, spirals, two_gaussians)
DENSITIES = {density.__name__: density for density in _ALL}
