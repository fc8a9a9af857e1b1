"""dataset=folder: image files as other programs write them."""

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

import rnode
from data_files import image_files, parts_of
from helpers import TWO_STEPS, call, refused
from rnode import InputError
from rnode.data.folder import decode, image_folder

RNG = np.random.default_rng(0)
RGB = RNG.integers(256, size=(6, 8, 3), dtype=np.uint8)
GREY = RNG.integers(256, size=(6, 8), dtype=np.uint8)


def saved(image, name, channels, size=(6, 8), **options):
    """The pixels that are read from an image once it is saved."""
    image.save(name, **options)
    return decode(name, (channels, *size)).astype(int)


def test_every_kind_of_image_becomes_grey_or_rgb():
    for name in ("a.png", "a.bmp", "a.tiff", "a.webp"):
        found = saved(Image.fromarray(RGB), name, 3, lossless=True)
        assert np.array_equal(found, RGB.transpose(2, 0, 1))
    cmyk = Image.fromarray(np.full((6, 8, 3), 77, np.uint8)).convert("CMYK")
    assert np.abs(saved(cmyk, "c.jpg", 3, quality=100) - 77).max() <= 3
    turned = Image.fromarray(np.repeat(np.repeat(GREY // 32 * 32, 8, 0), 8, 1))
    exif = turned.getexif()
    exif[0x0112] = 6  # shown a quarter turn to the right
    found = saved(turned, "e.jpg", 1, (64, 48), exif=exif, quality=100)[0]
    assert np.abs(found - np.rot90(np.asarray(turned), -1)).max() < 12


def test_images_are_cropped_and_scaled():
    ramp = np.tile(np.arange(0, 240, 6, dtype=np.uint8), (20, 1))  # 20×40
    half = saved(Image.fromarray(ramp), "a.png", 1, (10, 10))[0]
    expected = ramp[::2, 10:30:2] + 3.0  # the middle square, each pixel the mean of four
    assert np.abs(half - expected).max() <= 2
    assert np.array_equal(saved(Image.fromarray(ramp), "a.png", 1, (20, 8))[0], ramp[:, 16:24])


def load(folder, **options):
    return image_folder(str(folder), **{"channels": 1, "size": 4} | options)


def test_each_image_is_in_one_split_whose_cut_never_changes(tmp_path):
    images = image_files(tmp_path, 100, (4, 4))
    splits = load(tmp_path, validation=0.2, test=10, context="label", alpha=0.01)
    assert [len(part) for part in parts_of(splits)] == [72, 18, 10]
    number = {image.tobytes(): i for i, image in enumerate(images)}
    found = [number[row.numpy().tobytes()] for part in parts_of(splits) for row in part]
    assert sorted(found) == list(range(100))
    labels = torch.cat([splits.c[name] for name in ("train", "val", "test")]).argmax(1)
    assert labels.tolist() == [i % 2 for i in found]
    assert (splits.transform.levels, splits.transform.logit.alpha) == (256, 0.01)
    again = load(tmp_path, validation=18, test=0.1)
    assert all(map(torch.equal, parts_of(splits), parts_of(again)))
    assert found[-3:] == [91, 7, 83]  # as in every version


def test_a_broken_file_is_named_or_left_out(tmp_path, capsys):
    image_files(tmp_path, 100, (4, 4))
    path = tmp_path / "1" / "001.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=r"001.png: is not a whole image .*; on_error=skip"):
        load(tmp_path, context="label")
    splits = load(tmp_path, on_error="skip", context="label")
    assert sum(map(len, parts_of(splits))) == 99
    assert sum(int(c[:, 1].sum()) for c in splits.c.values()) == 49
    assert "broken files left out: 1, such as" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("root", "message"), [("nowhere", "there is no such folder"), ("empty", "holds no image")]
)
def test_a_folder_without_images_is_one_line(tmp_path, capsys, root, message):
    (tmp_path / "empty").mkdir()
    line = refused(capsys, "train", "dataset=folder", f"dataset.root={root}")
    assert f"{root}: {message}" in line


def test_the_command_scores_a_folder_given_the_class_that_each_image_lies_in(tmp_path):
    images = image_files(tmp_path / "images", 40, (8, 8))
    options = "root=images size=8 channels=1 context=label eval_batch_size=40"
    data = ["dataset=folder", *(f"dataset.{option}" for option in options.split())]
    call("train", *TWO_STEPS, *data, "hydra.run.dir=run")
    call("score", "run/last.ckpt", "path=images", "hydra.run.dir=scores")
    scores = pl.read_csv("scores/scores.csv")
    order = [*range(0, 40, 2), *range(1, 40, 2)]
    assert scores["file"].to_list() == [f"{i % 2}/{i:03}.png" for i in order]
    labels = {"label": [str(i % 2) for i in order]}
    expected = rnode.load("run/last.ckpt").log_prob(images[order], labels)
    np.testing.assert_allclose(scores["log_prob"], expected, atol=1e-4)
