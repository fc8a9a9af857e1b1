"""dataset=folder and its kin: image files as other programs write them."""

import itertools
import os

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

import rnode
from data_files import write_idx
from helpers import TWO_STEPS, call, column, refused
from rnode import InputError
from rnode.data import folder as folders
from rnode.data.decoding import Format, decode
from rnode.data.folder import image_folder

RNG = np.random.default_rng(0)
RGB = RNG.integers(256, size=(6, 8, 3), dtype=np.uint8)
GREY = RNG.integers(256, size=(6, 8), dtype=np.uint8)


def pixels(path, channels, size=(6, 8), **options):
    result = decode(path, Format(channels, size, **options))
    assert not isinstance(result, InputError), result
    return result[0]


@pytest.mark.parametrize("ending", ["png", "bmp", "tiff", "webp"])
def test_lossless_files_keep_their_pixels(tmp_path, ending):
    Image.fromarray(RGB).save(tmp_path / f"a.{ending}", lossless=True)
    assert np.array_equal(pixels(tmp_path / f"a.{ending}", 3), RGB.transpose(2, 0, 1))
    if ending != "webp":
        Image.fromarray(GREY).save(tmp_path / f"b.{ending}")
        assert np.array_equal(pixels(tmp_path / f"b.{ending}", 1)[0], GREY)


def test_every_kind_of_image_becomes_eight_bits_of_grey_or_rgb(tmp_path):
    def saved(image, name, **options):
        image.save(tmp_path / name, **options)
        return tmp_path / name

    wide = GREY.astype(np.uint16) * 257  # 16 bits whose first eight are GREY
    assert np.array_equal(pixels(saved(Image.fromarray(wide), "16.png"), 1)[0], GREY)
    assert np.array_equal(pixels(saved(Image.fromarray(wide), "16.tiff"), 3)[1], GREY)
    black = Image.fromarray(np.where(GREY > 127, 255, 0).astype(np.uint8)).convert("1")
    assert set(np.unique(pixels(saved(black, "1.png"), 1))) == {0, 255}
    alpha = np.where(np.arange(8) < 4, 255, 0).astype(np.uint8) * np.ones((6, 1), np.uint8)
    clear = Image.fromarray(np.dstack([RGB, alpha]))
    found = pixels(saved(clear, "rgba.png"), 3)
    assert np.array_equal(found[:, :, :4], RGB.transpose(2, 0, 1)[:, :, :4])
    assert not found[:, :, 4:].any()  # transparent pixels lie on black
    palette = Image.fromarray(GREY // 64).convert("P")
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9])
    found = pixels(saved(palette, "p.png", transparency=3), 3)
    assert np.array_equal(found[0], np.where(GREY // 64 == 0, 200, 0))
    cmyk = Image.fromarray(np.full((6, 8, 3), 77, np.uint8)).convert("CMYK")
    assert np.abs(pixels(saved(cmyk, "c.jpg", quality=100), 3).astype(int) - 77).max() <= 3
    turned = Image.fromarray(np.repeat(np.repeat(GREY // 32 * 32, 8, 0), 8, 1))
    exif = turned.getexif()
    exif[0x0112] = 6  # shown a quarter turn to the right
    found = pixels(saved(turned, "e.jpg", exif=exif, quality=100), 1, (64, 48))[0].astype(int)
    assert np.abs(found - np.rot90(np.asarray(turned), -1)).max() < 12
    first, second = Image.fromarray(GREY // 128 * 255), Image.fromarray(255 - GREY)
    found = pixels(saved(first, "g.gif", save_all=True, append_images=[second]), 1)[0]
    assert np.array_equal(found, GREY // 128 * 255)


def test_images_are_cropped_scaled_padded_and_reduced(tmp_path):
    ramp = np.tile(np.arange(0, 240, 6, dtype=np.uint8), (20, 1))  # 20×40
    Image.fromarray(ramp).save(tmp_path / "a.png")
    half = pixels(tmp_path / "a.png", 1, 10)[0]
    expected = ramp[::2, 10:30:2] + 3.0  # the middle square, each pixel the mean of four
    assert np.abs(half - expected).max() <= 2
    assert np.array_equal(pixels(tmp_path / "a.png", 1, 8, crop=8)[0], ramp[6:14, 16:24])
    padded = pixels(tmp_path / "a.png", 1, (20, 40), pad=44)[0]
    assert padded.shape == (44, 44)
    assert np.array_equal(padded[12:32, 2:42], ramp)
    assert padded.sum() == ramp.sum(dtype=int)
    five = pixels(tmp_path / "a.png", 1, (20, 40), bits=5)[0]
    assert np.array_equal(five, ramp // 8)


@pytest.fixture
def images(tmp_path):
    """100 images in two classes, and the file of each by its pixels."""
    by_pixels = {}
    for i in range(100):
        array = RNG.integers(256, size=(4, 4), dtype=np.uint8)
        path = tmp_path / "data" / ("even" if i % 2 == 0 else "odd") / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
        by_pixels[array.tobytes()] = path
    return tmp_path / "data", by_pixels


def load(folder, **options):
    small = {"channels": 1, "size": 4, "cache": str(folder.parent / "cache")}
    return image_folder(str(folder), **small | options)


def test_each_image_is_in_one_split_whose_cut_never_changes(images):
    folder, by_pixels = images
    splits = load(folder, validation=0.2, test=10, context="label")
    assert [len(part) for part in splits[:3]] == [72, 18, 10]
    found = [row.numpy().tobytes() for part in splits[:3] for row in part]
    assert sorted(found) == sorted(by_pixels)
    labels = torch.cat(splits.contexts).argmax(1)
    assert [by_pixels[row].parent.name for row in found] == [("even", "odd")[k] for k in labels]
    again = load(folder, validation=0.2, test=10, cache=str(folder.parent / "other"))
    assert all(torch.equal(a, b) for a, b in zip(splits[:3], again[:3], strict=True))


def test_folders_named_as_splits_are_the_splits(tmp_path):
    for part, count in (("train", 20), ("test", 5)):
        for i in range(count):
            (tmp_path / "d" / part / "c").mkdir(parents=True, exist_ok=True)
            array = RNG.integers(256, size=(4, 4), dtype=np.uint8)
            Image.fromarray(array).save(tmp_path / "d" / part / "c" / f"{i}.png")
    splits = load(tmp_path / "d", validation=3, context="label")
    assert [len(part) for part in splits[:3]] == [17, 3, 5]
    assert splits.context.columns["label"].classes == ("c",)


def test_copies_are_told_and_kept_once_in_the_split_held_out(images, capsys):
    folder, _ = images
    for part in ("train", "test"):
        (folder / "d" / part).mkdir(parents=True)
    for i, path in enumerate(sorted(folder.glob("even/*"))[:20]):
        path.rename(folder / "d" / "train" / f"{i}.png")
    first = folder / "d" / "train" / "0.png"
    (folder / "d" / "test" / "x.png").write_bytes(first.read_bytes())
    splits = load(folder / "d", validation=2)
    assert [len(part) for part in splits[:3]] == [17, 2, 1]
    printed = capsys.readouterr().out
    assert "copies of other files left out: 1, such as train/0.png, equal to test/x.png" in printed


def test_the_cache_is_used_again_until_a_file_changes(images, monkeypatch):
    folder, _ = images
    before = load(folder)
    (rows,) = (folder.parent / "cache").glob("*.npy")
    stamp = rows.stat().st_mtime_ns
    monkeypatch.setattr(folders, "decode_all", None)  # nothing is decoded again
    assert torch.equal(load(folder).test, before.test)
    assert rows.stat().st_mtime_ns == stamp
    monkeypatch.undo()
    changed = sorted(folder.glob("*/*"))[0]
    Image.fromarray(np.full((4, 4), 3, np.uint8)).save(changed)
    os.utime(changed, (1, 1))
    after = load(folder)
    assert len(list((folder.parent / "cache").glob("*.npy"))) == 2
    assert any((row == 3).all() for part in after[:3] for row in part)


def test_interrupted_decoding_leaves_nothing_that_a_later_run_takes_for_whole(images, monkeypatch):
    folder, _ = images

    def interrupted(*args):
        yield decode(next(folder.glob("*/*")), Format(1, 4))
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, "decode_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(folder)
    left = {path.suffix for path in (folder.parent / "cache").iterdir()}
    assert left <= {".lock"}
    monkeypatch.undo()
    assert sum(map(len, load(folder)[:3])) == 100


def test_a_broken_file_is_named_or_left_out(images, capsys):
    folder, _ = images
    path = folder / "odd" / "001.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=r"001.png: is not a whole image .*; on_error=skip"):
        load(folder)
    assert sum(map(len, load(folder, on_error="skip")[:3])) == 99
    assert "broken files left out: 1, such as odd/001.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("root=nowhere", "root=nowhere: there is no such folder"),
        ("root=empty", "root=empty: holds no image"),
        ("root=one", "test=1: must be 1 to 0, out of 1 samples"),
        ("channels=2", "dataset.channels=2: must be 1 or 3"),
        ("context=label root=one", "context=label: one/a.png lies in no folder of a class"),
        ("context=class", "dataset.context=class: must be"),
        ("pad=2", "pad=2: must be at least 4, the size"),
        ("validation=500", "validation=500: must be 1 to 89, out of 90 samples"),
        ("bits=9", "dataset.bits=9: must be"),
    ],
)
def test_a_users_mistake_is_one_line(images, monkeypatch, capsys, options, message):
    folder, _ = images
    monkeypatch.chdir(folder.parent)
    for name in ("empty", "one"):
        (folder.parent / name).mkdir()
    Image.fromarray(GREY).save(folder.parent / "one" / "a.png")
    given = ["root=data", "size=4", "channels=1", "cache=cache", *options.split()]
    line, code = refused(capsys, "train", "dataset=folder", *(f"dataset.{o}" for o in given))
    assert message in line
    assert code == 2
    assert not list(folder.parent.rglob("*.npy"))
    assert not list(folder.parent.rglob("*.ckpt"))


@pytest.mark.slow  # decodes 2,000 files and trains twice
def test_a_folder_trains_as_the_same_images_in_an_idx_file_do(tmp_path):
    """FashionMNIST written out as PNG by class, or random images if it is not installed."""
    source = "/usr/share/datasets/fashion-mnist"
    if os.path.isdir(source):
        from pathlib import Path

        from rnode.data.images import find_idx, read_idx

        all_images = [
            read_idx(find_idx("FashionMNIST", stem, Path(source)))
            for stem in ("train-images", "t10k-images")
        ]
        train, test = all_images[0][:1600].numpy(), all_images[1][:400].numpy()
    else:
        train, test = RNG.integers(256, size=(2, 1600, 28, 28), dtype=np.uint8)
        test = test[:400]
    for name, stem, array in (("train", "train-images", train), ("test", "t10k-images", test)):
        kind = np.arange(len(array)) * 10 // len(array)  # ten classes, in their order
        for i, image in enumerate(array):
            path = tmp_path / "png" / name / str(kind[i]) / f"{i:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        (tmp_path / "idx").mkdir(exist_ok=True)
        write_idx(tmp_path / "idx" / f"{stem}-idx3-ubyte", array)
    common = [
        "model.hidden=4",
        "model.pieces=1",
        "dataset.batch_size=50",
        "seed=3",
        "trainer.max_steps=8",
        "trainer.limit_test_batches=2",
        "logger.wandb.mode=disabled",
        "dataset.validation=100",
        "dataset.eval_batch_size=50",
        "dataset.alpha=1e-5",
        "trainer.enable_progress_bar=false",
        "trainer.log_every_n_steps=1",
        "optimizer.lr=1e-3",  # a preset of grey levels has another rate than a folder
        "warmup_steps=0",
    ]
    png = [
        "dataset=folder",
        f"dataset.root={tmp_path / 'png'}",
        "dataset.channels=1",
        "dataset.size=28",
        f"dataset.cache={tmp_path / 'cache'}",
    ]
    idx = ["dataset=fashion_mnist", f"dataset.root={tmp_path / 'idx'}"]
    for name, data in (("png", png), ("idx", idx)):
        call("train", *data, *common, f"hydra.run.dir={tmp_path / f'run-{name}'}")
    for key in ("train/bits_per_dim", "val/bits_per_dim", "test/bits_per_dim"):
        found = [column(tmp_path / f"run-{name}", key) for name in ("png", "idx")]
        assert found[0] == found[1]
        assert found[0]


def test_the_command_scores_a_folder_given_the_class_that_each_image_lies_in(tmp_path):
    for kind, name in itertools.product(("a", "b"), range(20)):
        (tmp_path / "images" / kind).mkdir(parents=True, exist_ok=True)
        pixels = RNG.integers(256, size=(8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / kind / f"{name:02}.png")
    data = ["dataset=folder", f"dataset.root={tmp_path / 'images'}", "dataset.size=8"]
    data += ["dataset.channels=1", "dataset.context=label", f"dataset.cache={tmp_path / 'cache'}"]
    data += [*TWO_STEPS, "dataset.eval_batch_size=40"]
    call("train", *data, f"hydra.run.dir={tmp_path / 'run'}")
    best, to = tmp_path / "run" / "last.ckpt", f"hydra.run.dir={tmp_path / 'scores'}"
    call("score", f"ckpt_path={best}", f"path={tmp_path / 'images'}", to)
    scores = pl.read_csv(tmp_path / "scores" / "scores.csv")
    assert scores["file"].to_list() == [f"{k}/{n:02}.png" for k in "ab" for n in range(20)]
    images = [np.array(Image.open(tmp_path / "images" / file)) for file in scores["file"]]
    expected = rnode.load(best).log_prob(np.stack(images), {"label": 20 * ["a"] + 20 * ["b"]})
    np.testing.assert_allclose(scores["log_prob"], expected, atol=1e-4)
