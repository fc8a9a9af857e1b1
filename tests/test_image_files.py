"""Data sets of images in their true formats: IDX, torchvision's, arrays of NumPy."""

import re

import numpy as np
import pytest
import torch
from torchvision import datasets

from data_files import array_files, cifar10_files, parts_of, write_idx
from rnode import InputError
from rnode.data.images import arrays, named_images, read_idx, reduce_images
from rnode.data.splits import hold_out

MNIST = {"name": "MNIST", "resize": 28, "validation": 10}


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(256, size=(50, 28, 28), dtype=np.uint8)


@pytest.mark.parametrize(("folder", "ending"), [("", ".gz"), ("MNIST/raw", "")])
def test_idx_files_are_found_in_their_usual_places(tmp_path, images, folder, ending):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for stem, count in (("train", 50), ("t10k", 7)):
        write_idx(tmp_path / folder / f"{stem}-images-idx3-ubyte{ending}", images[:count])
        labels = images[:count, 0, 0] % 5
        write_idx(tmp_path / folder / f"{stem}-labels-idx1-ubyte{ending}", labels)
    splits = named_images(root=str(tmp_path), context="label", **MNIST)
    parts = hold_out({"train": torch.from_numpy(images), "test": torch.tensor(images[:7])}, 10, 0)
    for name, part in parts.items():
        assert torch.equal(getattr(splits, name), part[:, None])
        assert torch.equal(splits.c[name].argmax(1), part[:, 0, 0].long() % 5)
    assert (splits.transform.levels, splits.transform.logit.alpha) == (256, 0.05)


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        ("", lambda content: b"\0\0\x09" + content[3:], "starts with 00000903, not 000008"),
        ("", lambda content: content + b"x", "cannot reshape array of size 39201"),
        (".gz", lambda content: content[:1000] + b"\xff" * 99 + content[1099:], "CRC|invalid"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path, images, suffix, damage, message):
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    write_idx(path, images)
    path.write_bytes(damage(path.read_bytes()))
    whole = f"^{re.escape(str(path))}: is not a whole IDX file"
    with pytest.raises(InputError, match=f"{whole}.*{message}"):
        read_idx(path)


def test_files_that_are_missing_and_cannot_be_downloaded_are_named(tmp_path, monkeypatch):
    def offline(root, train, download=False):
        raise OSError("no network\nat all") if download else RuntimeError("not found")

    files = {"FashionMNIST": "train-images-idx3-ubyte and t10k", "CIFAR10": "cifar-10-batches-py"}
    for name, words in files.items():
        monkeypatch.setattr(datasets, name, offline)
        failed = f"{name} is missing or damaged, and downloading it failed .no network at all.; put"
        with pytest.raises(InputError, match=f"{failed} the files there: {words}"):
            named_images(name, str(tmp_path / "empty"), 28, validation=10)


def test_cifar10_is_read_as_torchvision_stores_it(tmp_path, monkeypatch):
    pixels, labels = cifar10_files(tmp_path, monkeypatch)
    splits = named_images("CIFAR10", str(tmp_path), 32, validation=3, context="label")
    assert np.array_equal(splits.test.permute(0, 2, 3, 1), pixels)
    classes = splits.conditions.columns["label"].classes
    assert [classes[i] for i in splits.c["test"].argmax(1)] == labels
    small = named_images("CIFAR10", str(tmp_path), 16, validation=3)
    assert torch.equal(small.test, reduce_images(splits.test, 16))
    assert len(small.val) == 3


def test_images_are_reduced_to_the_means_of_their_blocks():
    images = torch.randint(256, (5, 3, 28, 28), dtype=torch.uint8)
    blocks = images.double().unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1))
    smaller = reduce_images(images, 14)
    assert smaller.dtype == torch.uint8
    assert (smaller.double() - blocks).abs().max() <= 0.5
    assert torch.equal(reduce_images(images, 28), images)


@pytest.mark.parametrize("order", ["grey", "channels last", "channels first"])
def test_arrays_are_read_and_conditioned_on_their_labels(tmp_path, order):
    known = array_files(tmp_path, 6, 1 if order == "grey" else 3)
    for name in ("train", "val", "test"):
        images = known[f"{name}_images"]
        saved = {"grey": images[..., 0], "channels first": images.transpose(0, 3, 1, 2)}
        np.save(tmp_path / f"{name}_images.npy", saved.get(order, images))
    splits = arrays(str(tmp_path), context="label")
    for name in ("train", "val", "test"):
        assert np.array_equal(getattr(splits, name).permute(0, 2, 3, 1), known[f"{name}_images"])
        assert splits.c[name].argmax(1).tolist() == known[f"{name}_labels"].ravel().tolist()
    for name in ("val", "test"):
        (tmp_path / f"{name}_images.npy").unlink()
    splits = arrays(str(tmp_path), validation=3, test=0.25, context="label")
    assert [len(part) for part in parts_of(splits)] == [6, 3, 3]
