"""Images of one's own: every kind of file, folder and array, and small data."""

import os
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from matplotlib.axes import Axes
from PIL import Image

from helpers import TWO_STEPS, call, metrics
from rnode import InputError
from rnode.app.validation import compose_config, validate
from rnode.data.datamodule import DataModule
from rnode.data.densities import toy
from rnode.data.folder import decode, find_images, image_folder
from rnode.data.images import arrays
from rnode.data.splits import Splits
from rnode.training import gaussian
from rnode.training.plots import plot_corner
from rnode.transforms import Column, TableTransform

GREY = np.random.default_rng(0).integers(256, size=(10, 8, 8))
GREY[:, 0, :2] = 0, 255
BYTES = GREY.astype("u1")
WIDE = (GREY.astype("f4") / 255, GREY.astype("i4"), GREY.astype("u2"))  # more than 8 bits


def write(folder, images=BYTES, ending="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.{ending}")
    return folder


@pytest.mark.parametrize("images", WIDE)
def test_pixels_of_more_than_8_bits_are_refused_by_name(tmp_path, images):
    write(tmp_path, images, "tiff")
    with pytest.raises(InputError, match=r"\d.tiff: has pixels of more than 8 bits .*save it with"):
        image_folder(str(tmp_path))
    np.save(tmp_path / "train_images.npy", images)
    with pytest.raises(InputError, match=r"train_images.npy: .* type \w*: must be uint8 from 0"):
        arrays(str(tmp_path))


def test_pixels_of_16_bits_in_colour_are_refused_by_name(tmp_path):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)  # Pillow cannot write 16 bits of colour
    rows = b"".join(b"\0" + bytes(row) for row in np.zeros((8, 48), "u1"))
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
    (tmp_path / "0.png").write_bytes(content)
    with pytest.raises(InputError, match=r"0.png: has pixels of more than 8 bits"):
        decode(tmp_path / "0.png", (3, 8, 8))


def test_what_is_lost_of_image_files_is_printed(tmp_path, capsys):
    write(tmp_path)
    Image.fromarray(np.zeros((8, 8, 4), "u1")).save(tmp_path / "transparent.png")
    frames = [Image.fromarray(image) for image in BYTES]
    frames[0].save(tmp_path / "frames.gif", save_all=True, append_images=frames[1:])
    image_folder(str(tmp_path))
    printed = capsys.readouterr().out
    assert "1 of 12 images lose their transparency" in printed
    assert "1 of 12 images lose their later frames" in printed


def test_constant_images_are_named(tmp_path, capsys):
    write(tmp_path, np.ones((10, 8, 8), "u1") * np.arange(10, dtype="u1")[:, None, None])
    image_folder(str(tmp_path))
    assert "8 of 8 images have one colour alone, as " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(28, 28)], (1, 28, 28)),
        ([(48, 64, 3)], (3, 48, 64)),
        ([(8, 8), (8, 8, 3)], (3, 8, 8)),
        ([(8, 8), (8, 12)], (1, 64, 64)),
        ([(512, 512)], (1, 64, 64)),
    ],
)
def test_images_keep_the_size_and_mode_that_they_share(tmp_path, capsys, shapes, expected):
    images = [np.random.randint(256, size=shape, dtype="u1") for shape in shapes * 5]
    splits = image_folder(str(write(tmp_path, images)), test=1, validation=1)
    assert splits.train.shape[1:] == expected
    scaled = "images are scaled and cut to size=64×64" in capsys.readouterr().out
    assert scaled == (expected[1:] == (64, 64))


@pytest.mark.parametrize(
    ("train", "val"), [("train", "val"), ("Train", "VALID"), ("Training", "validation")]
)
def test_names_of_splits_are_known_in_any_case_and_the_rest_is_named(tmp_path, capsys, train, val):
    for folder in (f"{train}/cat", f"{train}/.ipynb_checkpoints", "unlabeled", ".hidden"):
        write(tmp_path / folder)
    write(tmp_path / val / "cat", BYTES[:3])
    (tmp_path / "a.heic").touch()
    splits = image_folder(str(tmp_path), context="label", test=2)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (8, 3, 2)
    assert splits.conditions.columns["label"].classes == ("cat",)
    printed = capsys.readouterr().out
    for name in (".hidden (1)", ".ipynb_checkpoints (1)", ".heic (1)", "unlabeled (10)"):
        assert name in printed


def test_a_class_may_be_called_train_but_none_unlabeled(tmp_path, capsys):
    for name in ("train", "plane"):
        write(tmp_path / name)
    splits = image_folder(str(tmp_path), context="label")
    assert splits.conditions.columns["label"].classes == ("plane", "train")
    assert "train: not a split, which needs train and val or test" in capsys.readouterr().out
    write(tmp_path / "Unlabeled")
    with pytest.raises(InputError, match="context=label: there are images without a label"):
        image_folder(str(tmp_path), context="label")


def test_links_are_followed_to_each_file_once(tmp_path, capsys):
    root = tmp_path / "root"
    write(tmp_path / "elsewhere")
    write(root / "all")
    (root / "train" / "a").mkdir(parents=True)
    for i in range(8):
        os.symlink(f"../../all/{i}.png", root / "train" / "a" / f"{i}.png")
    os.symlink(tmp_path / "elsewhere", root / "test")
    os.symlink(root, root / "train" / "loop")
    os.symlink(root / "train", root / "train" / "self")
    names = [path.relative_to(root).as_posix() for path in find_images(root)]
    expected = {f"train/a/{i}.png" for i in range(8)} | {f"test/{i}.png" for i in range(10)}
    assert expected <= set(names)
    assert len(names) == 20  # two of all/ are nowhere else
    assert "found again by a link" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train_images": b""}, "train_images.npy: is not a whole .npy file"),
        ({"train_images": np.array([{}])}, "train_images.npy: is not a whole .npy file"),
        ({"train_images": BYTES, "val_images": BYTES[:, :4]}, "images of several shapes"),
        ({"train_images": BYTES, "train_labels": np.eye(10)}, "has 100 labels of 10 images"),
    ],
)
def test_damaged_arrays_are_named(tmp_path, files, message):
    for name, content in files.items():
        path = tmp_path / f"{name}.npy"
        path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    with pytest.raises(InputError, match=message):
        arrays(str(tmp_path))


@pytest.mark.parametrize("dataset", ["patches", "folder"])
def test_a_size_may_be_height_and_width(tmp_path, dataset):
    cfg = compose_config("train", [f"dataset={dataset}", "dataset.size=[8,12]", "folder=x"])
    if dataset == "folder":
        cfg.dataset.root = str(write(tmp_path))
    validate("train", cfg)
    data = instantiate(cfg.dataset)
    data.setup()
    assert data.shape[1:] == (8, 12)


# Small data


@pytest.mark.parametrize(("n", "size"), [(8, 16), (240, 30), (4096, 512), (10**6, 512)])
def test_the_batch_size_follows_the_number_of_samples(n, size):
    data = DataModule(toy, None, 100, name="moons", train=n)
    data.setup()
    assert data.batch_size == size


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory):
    """The folder of a run of 5 steps, 2 an epoch."""
    folder = tmp_path_factory.mktemp("folder")
    write(folder / "images", np.random.randint(256, size=(40, 8, 8)).astype("u1"))
    few = [one for one in TWO_STEPS if "batch_size=4" not in one and "max" not in one]
    few += ["dataset=folder", f"dataset.root={folder / 'images'}", "trainer.max_steps=5"]
    few += ["trainer.max_epochs=9", "callbacks.interval.every_n_steps=3"]
    call("train", *few, f"hydra.run.dir={folder / 'run'}")
    return folder / "run"


def test_small_data_are_validated_after_so_many_steps_and_at_the_end(folder_run):
    rows = metrics(folder_run)
    steps = [int(row["step"]) for row in rows if "val/bits_per_dim" in row]
    assert steps == [3, 4]


@pytest.mark.parametrize(
    ("limit", "devices", "expected"),
    [(1.0, 1, 95), (1, 1, 10), (3, 2, 60), (0.5, 1, 50), (0.5, 2, 40), (99, 1, 95), (0.01, 1, 0)],
)
def test_the_gaussian_is_measured_on_the_samples_of_a_validation(limit, devices, expected):
    data = SimpleNamespace(splits=SimpleNamespace(val=range(95)), eval_batch_size=10)
    trainer = SimpleNamespace(limit_val_batches=limit, world_size=devices)
    assert gaussian.validation_rows(trainer, data) == expected


def test_the_gaussian_of_few_samples_is_shrunk():
    parts = [torch.randn(n, 60, dtype=torch.float64) for n in (30, 100, 100)]
    transform = TableTransform([Column(f"x{i}") for i in range(60)])
    data = DataModule(lambda: Splits(*parts, transform), 10, 10)
    data.setup()
    assert gaussian.gaussian_bits(data, 100, seed=0) < 2.3  # the truth has 2.05


def test_corner_plots_have_bins_for_their_points_and_axes_for_any(tmp_path, monkeypatch):
    bins = []
    monkeypatch.setattr(Axes, "hist", lambda self, x, edges, **_: bins.append(len(edges) - 1))
    points = torch.randn(39, 3, dtype=torch.float64)
    points[:, 1] = 1e300
    points[0, 2] = torch.inf
    plot_corner({"a": points}, ["a", "b", "c"])
    plot_corner({"a": torch.randn(9000, 1)}, ["a"])
    assert bins == [7, 7, 7, 50]
