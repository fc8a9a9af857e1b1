"""Data files in their true formats, as tests write them, and what W&B has written."""

import gzip
import hashlib
import pickle
import struct

import numpy as np


def write_idx(path, images):
    """Write images (N, H, W) in the format of MNIST, gzipped if the name ends in .gz."""
    header = bytes([0, 0, 8, 3]) + np.array(images.shape, ">u4").tobytes()
    content = header + images.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def mnist_files(folder, names=("train-images", "t10k-images")):
    """Write MNIST's files with 30 training and 8 test images."""
    images = np.random.default_rng(0).integers(256, size=(30, 28, 28))
    write_idx(folder / f"{names[0]}-idx3-ubyte.gz", images)
    write_idx(folder / f"{names[1]}-idx3-ubyte", images[:8])


def cifar10_files(folder, monkeypatch):
    """Write CIFAR10's files with 8 images each, and patch their checksums into torchvision."""
    from torchvision.datasets import CIFAR10

    base = folder / CIFAR10.base_folder
    base.mkdir()
    rng = np.random.default_rng(0)

    def write(name, content):
        data = pickle.dumps(content)
        (base / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def batch(name):
        images = rng.integers(256, size=(8, 3072), dtype=np.uint8)
        return write(name, {"data": images, "labels": [0] * 8})

    monkeypatch.setattr(CIFAR10, "train_list", [batch(name) for name, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [batch(name) for name, _ in CIFAR10.test_list])
    filename, md5 = write(CIFAR10.meta["filename"], {"label_names": ["x"]})
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"filename": filename, "md5": md5})


def svhn_files(folder, monkeypatch):
    """Write SVHN's files with 9 images each, and patch their checksums into torchvision."""
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    rng, listed = np.random.default_rng(0), {}
    for split in ("train", "test"):
        path = folder / f"{split}_32x32.mat"
        pixels = rng.integers(256, size=(32, 32, 3, 9), dtype=np.uint8)
        savemat(path, {"X": pixels, "y": np.arange(1, 10)[:, None]})
        listed[split] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", listed)


def imagenet_files(folder, size):
    """Write two training batches and a test batch of ImageNet as they are distributed."""
    rng, batches = np.random.default_rng(0), {}
    for name, count in (("train_data_batch_1", 9), ("train_data_batch_2", 6), ("val_data", 4)):
        data = rng.integers(256, size=(count, 3 * size * size), dtype=np.uint8)
        labels = rng.integers(1, 1001, size=count)
        np.savez(folder / f"{name}.npz", data=data, labels=labels, mean=np.zeros(3 * size * size))
        batches[name] = data.reshape(-1, 3, size, size), labels
    return batches


def image_files(folder, count=40):
    """Write `count` small PNG files in two folders, of two classes."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / str(i % 2) / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(path)


def wandb_records(folder):
    """The records of a run's offline W&B files, by the name of the W&B folder.

    A .wandb file is a LevelDB log with a header of 7 bytes: blocks of 32 KiB hold parts of records.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, position, record = path.read_bytes(), 7, b""
        while position < len(data):
            left = 32768 - position % 32768
            if left < 7:  # the padding of a block
                position += left
                continue
            _, length, kind = struct.unpack_from("<IHB", data, position)
            record += data[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # a whole record, or its last part
                found.setdefault(path.parent.name, []).append(Record.FromString(record))
                record = b""
    return found
