"""Image files in their true formats."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file

from data_files import cifar10_files, imagenet_files, mnist_files, write_idx
from rnode import InputError
from rnode.data.folder import celeba
from rnode.data.imagenet import imagenet
from rnode.data.images import cifar10, idx_images, read_idx, reduce_images
from rnode.data.splits import hold_out

RNG = np.random.default_rng(0)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(256, size=(50, 28, 28), dtype=np.uint8)


@pytest.mark.parametrize("ending", ["-idx3-ubyte", ".idx3-ubyte", "-idx3-ubyte.gz"])
@pytest.mark.parametrize("folder", ["", "MNIST/raw", "archive"])
def test_idx_files_are_found_in_their_usual_clothes(tmp_path, images, folder, ending):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    write_idx(tmp_path / folder / f"train-images{ending}", images)
    write_idx(tmp_path / folder / f"t10k-images{ending}", images[:7])
    splits = idx_images("MNIST", str(tmp_path), validation=10)
    assert [len(part) for part in splits[:3]] == [40, 10, 7]
    held_in, held_out = hold_out(torch.from_numpy(images)[:, None], 10, "validation")
    assert torch.equal(splits.train, held_in)
    assert torch.equal(splits.val, held_out)
    assert torch.equal(splits.test[:, 0], torch.from_numpy(images[:7]))


def test_the_content_says_whether_a_file_is_gzipped(tmp_path, images):
    for name, other in (("plain", "named.gz"), ("zipped.gz", "unnamed")):
        write_idx(tmp_path / name, images)
        (tmp_path / name).rename(tmp_path / other)
        assert torch.equal(read_idx(tmp_path / other), torch.from_numpy(images))


@pytest.mark.parametrize("name", ["KMNIST", "QMNIST", "EMNIST"])
def test_relatives_of_mnist_are_read_from_their_own_files(tmp_path, images, name):
    stems = {
        "KMNIST": ("train", "t10k"),
        "QMNIST": ("qmnist-train", "qmnist-test"),
        "EMNIST": ("emnist-balanced-train", "emnist-balanced-test"),
    }
    for stem in stems[name]:
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte.gz", images)
    test = idx_images(name, str(tmp_path), validation=10).test[:, 0]
    expected = torch.from_numpy(images)
    assert torch.equal(test, expected.mT if name == "EMNIST" else expected)


def test_two_folders_of_files_are_not_guessed_between(tmp_path, images):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_idx(tmp_path / folder / "train-images-idx3-ubyte", images)
    with pytest.raises(InputError, match="a and .*b hold train-images each; give one as root"):
        idx_images("MNIST", str(tmp_path), validation=10)


def test_nothing_is_downloaded_beside_other_data(tmp_path):
    (tmp_path / "holiday.jpg").touch()
    for load, name in (
        (lambda: idx_images("MNIST", str(tmp_path), 10), "MNIST"),
        (lambda: cifar10(str(tmp_path), 10), "CIFAR10"),
    ):
        with pytest.raises(InputError, match=rf"does not hold {name} but other data \(holiday.jpg"):
            load()
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_torchvision_reads_what_the_tests_write(tmp_path, images):
    write_idx(tmp_path / "images", images)
    assert torch.equal(read_image_file(str(tmp_path / "images")), read_idx(tmp_path / "images"))


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        ("", lambda content: b"", "starts with nothing"),
        ("", lambda content: content[:9], "starts with 00000803"),
        ("", lambda content: content[:-1], "holds 39199 pixels, but its header says (50, 28, 28)"),
        ("", lambda content: content + b"x", "holds 39201 pixels"),
        ("", lambda content: content[:4] + b"\xff" * 12 + content[16:], "holds 39200 pixels"),
        ("", lambda content: bytes([0, 0, 8, 1]) + content[4:], "starts with 00000801"),
        (".gz", lambda content: b"", "starts with nothing"),
        (".gz", lambda content: content[:5], "cannot be read"),
        (".gz", lambda content: content[:1000], "cannot be read"),
        (".gz", lambda content: content[:1000] + b"\xff" * 99 + content[1099:], "cannot be read"),
        (".gz", lambda content: b"\x89PNG" + content, "starts with 89504e47"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path, images, suffix, damage, message):
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    write_idx(path, images)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: .*{re.escape(message)}"):
        read_idx(path)


def test_missing_files_are_named(tmp_path, images, monkeypatch):
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    missing = "there is no t10k-images-idx3-ubyte, t10k-images.idx3-ubyte or either with .gz"
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}: {missing}, which MNIST needs")):
        idx_images("MNIST", str(tmp_path), validation=10)

    class Offline:
        base_folder, filename = datasets.CIFAR10.base_folder, datasets.CIFAR10.filename

        def __init__(self, root, train=True, download=False):
            raise OSError("no network\nat all") if download else RuntimeError("not found")

    for name in ("FashionMNIST", "CIFAR10"):
        monkeypatch.setattr(datasets, name, Offline)
    failed = r"downloading it failed \(no network at all\); put the files there: "
    empty = tmp_path / "empty"
    with pytest.raises(InputError, match=f"FashionMNIST is missing.*{failed}train-images-idx3-"):
        idx_images("FashionMNIST", str(empty), validation=10)
    with pytest.raises(InputError, match=f"CIFAR10 is missing.*{failed}cifar-10-batches-py"):
        cifar10(str(empty), validation=10)


def test_images_are_reduced_to_the_means_of_their_blocks(tmp_path, monkeypatch):
    images = torch.randint(256, (5, 3, 28, 28), dtype=torch.uint8)
    blocks = images.double().unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1))
    smaller = reduce_images(images, 14)
    assert smaller.dtype == torch.uint8
    assert (smaller.double() - blocks).abs().max() <= 0.5
    assert reduce_images(images, 28) is images

    mnist_files(tmp_path)
    small = idx_images("MNIST", str(tmp_path), validation=2, resize=14)
    assert small.train.shape == (28, 1, 14, 14)
    cifar10_files(tmp_path, monkeypatch)
    small = cifar10(str(tmp_path), validation=10, resize=16)
    assert [part.shape for part in small[:3]] == [(n, 3, 16, 16) for n in (30, 10, 8)]


def test_celeba_is_split_as_its_list_says(tmp_path):
    (tmp_path / "img_align_celeba").mkdir()
    lines = []
    for i in range(12):
        array = RNG.integers(256, size=(218, 178, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / "img_align_celeba" / f"{i:06}.jpg")
        lines.append(f"{i:06}.jpg {0 if i < 7 else 1 if i < 9 else 2}")
    (tmp_path / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    splits = celeba(str(tmp_path), size=16, crop=148, cache=str(tmp_path / "cache"))
    assert [tuple(part.shape) for part in splits[:3]] == [(n, 3, 16, 16) for n in (7, 2, 3)]


def test_imagenet_is_read_from_its_batches(tmp_path):
    first, second, test = imagenet_files(tmp_path, 8).values()
    options = {"size": 8, "validation": 3, "context": "label", "cache": str(tmp_path / "c")}
    splits = imagenet(str(tmp_path), **options)
    assert np.array_equal(splits.val, first[0][:3])
    assert np.array_equal(splits.train, np.concatenate([first[0][3:], second[0]]))
    assert np.array_equal(splits.test, test[0])
    classes = splits.context.columns["label"].classes
    assert [int(classes[i]) for i in splits.contexts[2].argmax(1)] == test[1].tolist()
    np.savez(tmp_path / "val_data.npz", data=np.zeros((4, 5), np.uint8), labels=np.ones(4))
    with pytest.raises(InputError, match=r"val_data.npz: data cannot be read \(cannot reshape"):
        imagenet(str(tmp_path), **options)
