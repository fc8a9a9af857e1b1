"""Data files in their true formats, as tests write them, and what was read or written."""

import gzip
import pickle
from pathlib import Path

import numpy as np
from PIL import Image


def write_idx(path, array):
    """Write images (N, H, W) or labels (N,) as MNIST's files, gzipped if the name ends in .gz."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def mnist_files(folder):
    """Write MNIST's files with 30 training and 8 test images."""
    images = np.random.default_rng(0).integers(256, size=(30, 28, 28))
    write_idx(folder / "train-images-idx3-ubyte.gz", images)
    write_idx(folder / "t10k-images-idx3-ubyte", images[:8])


def cifar10_files(folder, monkeypatch):
    """Write CIFAR10's files with 8 images each, whose checksums torchvision then does not check.

    Return the test images (N, 32, 32, 3) and the names of their classes.
    """
    from torchvision.datasets import CIFAR10, cifar

    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5: Path(path).is_file())
    base, rng = folder / CIFAR10.base_folder, np.random.default_rng(0)
    base.mkdir()
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        images = rng.integers(256, size=(8, 3, 32, 32), dtype=np.uint8)
        batch = {"data": images.reshape(8, -1), "labels": [0, 1] * 4}
        (base / name).write_bytes(pickle.dumps(batch))
    (base / CIFAR10.meta["filename"]).write_bytes(pickle.dumps({"label_names": ["cat", "dog"]}))
    return images.transpose(0, 2, 3, 1), ["cat", "dog"] * 4


def array_files(folder, size, channels=3):
    """Write 12 training, 5 validation and 4 test images with labels as .npy; return them."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, count in (("train", 12), ("val", 5), ("test", 4)):
        shape = (count, size, size, channels)
        arrays[f"{name}_images"] = rng.integers(256, size=shape, dtype=np.uint8)
        arrays[f"{name}_labels"] = np.arange(count)[:, None] % 4
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return arrays


def image_files(folder, count=40, shape=(8, 8, 3)):
    """Write `count` PNG files in two folders, of two classes; return the images."""
    images = np.random.default_rng(0).integers(256, size=(count, *shape), dtype=np.uint8)
    for i, image in enumerate(images):
        path = folder / str(i % 2) / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return images


def parts_of(splits):
    return splits.fit().parts
