"""Images of one's own: every kind of file, folder and array, and small data."""

import os
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from hydra.utils import instantiate
from matplotlib.axes import Axes
from PIL import Image

import rnode
from helpers import TWO_STEPS, call, metrics
from rnode import InputError
from rnode.app.validation import compose_config, validate
from rnode.data.datamodule import DataModule, default_batch_size
from rnode.data.folder import find_images, image_folder
from rnode.data.images import arrays
from rnode.data.splits import Splits
from rnode.training import gaussian
from rnode.training.plots import plot_corner
from rnode.transforms import Column, TableTransform

GREY = np.random.default_rng(0).integers(256, size=(10, 8, 8))
GREY[:, 0, :2] = 0, 255
BYTES = GREY.astype("u1")
WIDE = {  # pixels of more than 8 bits, all of which show GREY
    "shares": (GREY / 255).astype("f4"),
    "floats to 255": GREY.astype("f4"),
    "int32": GREY.astype("i4"),
    "int32 of 16 bits": (GREY * 257).astype("i4"),
    "uint16 of 8 bits": GREY.astype("u2"),
    "uint16 of 12 bits": np.round(GREY * 4095 / 255).astype("u2"),
    "uint16": (GREY * 257).astype("u2"),
}
WRONG = {
    "negative": GREY - 9.0,
    "beyond 16 bits": GREY * 300.0,
    "missing": np.where(GREY == 255, np.nan, GREY),
}


def write(folder, images=BYTES, ending="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.{ending}")
    return folder


def all_of(splits):
    images = torch.cat([splits.train, splits.val, splits.test]).numpy()[:, 0]
    return images[np.lexsort(images.reshape(len(images), -1).T)]


@pytest.mark.parametrize(
    ("name", "door"),
    [
        (name, door)
        for door in ("tiff", "png", "npy")
        for name in WIDE
        if door != "png" or name[0] == "u"
    ],
)
def test_pixels_of_every_type_are_scaled_by_their_range(tmp_path, capsys, name, door):
    images = WIDE[name]
    if door == "npy":
        np.save(tmp_path / "train_images.npy", images)
        splits = arrays(str(tmp_path))
    else:
        write(tmp_path, images, door)
        splits = image_folder(str(tmp_path))
    expected = GREY[np.lexsort(GREY.reshape(10, -1).T)]
    assert np.array_equal(all_of(splits), expected)
    assert f"{splits.transform.white} is white" in capsys.readouterr().out


@pytest.mark.parametrize("name", WRONG)
def test_pixels_without_a_scale_are_refused_by_name(tmp_path, name):
    write(tmp_path, WRONG[name].astype("f4"), "tiff")
    with pytest.raises(InputError, match=r"\d.tiff: pixels from .*: must be from 0 to "):
        image_folder(str(tmp_path))
    np.save(tmp_path / "train_images.npy", WRONG[name])
    with pytest.raises(InputError, match=r"train_images.npy: pixels from .*: must be from 0 to "):
        arrays(str(tmp_path))


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
        ([(30, 30, 4)], (3, 64, 64)),  # a multiscale flow cannot halve 15
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
        ({"train_images": np.full((9, 8, 8), "a")}, "type <U1: must be numbers"),
        ({"train_images": GREY, "val_images": GREY[:, :4]}, "images of several shapes"),
        ({"train_images": GREY, "train_labels": np.eye(10)}, "has 100 labels of 10 images"),
        ({"train_images": GREY, "train_labels": b""}, "train_labels.npy: is not a whole"),
    ],
)
def test_damaged_arrays_are_named(tmp_path, files, message):
    for name, content in files.items():
        path = tmp_path / f"{name}.npy"
        path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    with pytest.raises(InputError, match=message):
        arrays(str(tmp_path))


def test_arrays_may_have_their_channels_first(tmp_path):
    images = np.random.randint(256, size=(10, 3, 8, 8), dtype="u1")
    for saved in (images, images.transpose(0, 2, 3, 1)):
        np.save(tmp_path / "train_images.npy", saved)
        np.save(tmp_path / "test_images.npy", saved)
        assert np.array_equal(arrays(str(tmp_path), validation=1).test, images)


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


@pytest.mark.parametrize(("n", "size"), [(8, 16), (240, 30), (4096, 64), (10**6, 64)])
def test_the_batch_size_follows_the_number_of_samples(n, size):
    assert default_batch_size(n, 64) == size


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory):
    """The folder of a run of 5 steps, 2 an epoch, on images of 12 bits."""
    folder = tmp_path_factory.mktemp("folder")
    images = [np.random.randint(4096, size=(8, 8)).astype("u2") for _ in range(40)]
    write(folder / "images", [*images[:39], images[39] | 4095], "tiff")
    few = [one for one in TWO_STEPS if "batch_size=4" not in one and "max" not in one]
    few += ["dataset=folder", f"dataset.root={folder / 'images'}", "trainer.max_steps=5"]
    few += ["trainer.max_epochs=9", "callbacks.interval.every_n_steps=3"]
    call("train", *few, f"hydra.run.dir={folder / 'run'}")
    return folder


def test_small_data_are_validated_after_so_many_steps_and_at_the_end(folder_run):
    rows = metrics(folder_run / "run")
    assert [int(row["step"]) for row in rows if "val/bits_per_dim" in row] == [
        3,
        4,
    ]


def test_an_image_is_scored_as_it_was_scaled_in_training(folder_run):
    dark = np.random.randint(200, size=(2, 8, 8)).astype("u2")
    path = write(folder_run / "dark", dark, "tiff")
    call("score", str(folder_run / "run"), f"path={path}", f"hydra.run.dir={folder_run / 'out'}")
    scores = pl.read_csv(folder_run / "out" / "scores.csv")["log_prob"].to_numpy()
    density = rnode.load(folder_run / "run")
    expected = density.log_prob(np.round(dark * (255 / 4095)).astype("u1"))
    np.testing.assert_allclose(scores, expected, rtol=1e-4)


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
    plot_corner(tmp_path / "a.png", {"a": points}, ["a", "b", "c"])
    plot_corner(tmp_path / "a.png", {"a": torch.randn(9000, 1)}, ["a"])
    assert bins == [7, 7, 7, 50]
