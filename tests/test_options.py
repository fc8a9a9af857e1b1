"""Options of every configuration group, each in a run of two steps."""

import re

import numpy as np
import pytest

from data_files import cifar10_files, image_files, imagenet_files, mnist_files, svhn_files
from helpers import TWO_STEPS, column
from rnode.app.schema import CONF
from rnode.data.images import IDX_IMAGES

pytestmark = pytest.mark.usefixtures("blank_figures")


def data_of(choice, root, monkeypatch):
    """Write the files that an option of a group reads, and return the overrides that name them."""
    root.mkdir()
    at = [f"dataset.root={root}", "model.pieces=1"]
    cache = [f"dataset.cache={root / 'cache'}"]
    if "mnist" in choice:
        named = IDX_IMAGES.get(choice.removeprefix("dataset=").upper(), IDX_IMAGES["MNIST"])
        mnist_files(root, named)
        return [*at, "dataset.validation=5"]
    if "cifar10" in choice:
        cifar10_files(root, monkeypatch)
        return [*at, "dataset.validation=5"]
    if "svhn" in choice:
        svhn_files(root, monkeypatch)
        return [*at, "dataset.validation=4"]
    if size := re.search(r"imagenet(\d+)", choice):
        imagenet_files(root, int(size[1]))
        return [*at, *cache, "dataset.validation=4"]
    if "patches" in choice:
        return ["dataset.size=8"]
    if "celeba" in choice or "folder" in choice:
        image_files(root / "img_align_celeba" if "celeba" in choice else root)
        return [*at, *cache, "dataset.size=8"]
    if re.search("dataset=(table|uci)|power|hepmass|miniboone|bsds300", choice):
        name = {"dataset=uci": "miniboone"}.get(choice, choice.split("=")[1])
        return uci_files(root, name)
    return []


def uci_files(root, name):
    (root / name).mkdir()
    rows = np.random.default_rng(0).normal(size=(90, 8))
    np.save(root / name / "data.npy", rows)
    if name == "table":
        return [f"dataset.path={root / name / 'data.npy'}"]
    if name == "bsds300":
        h5py = pytest.importorskip("h5py")
        with h5py.File(root / name / "BSDS300.hdf5", "w") as file:
            for part in ("train", "validation", "test"):
                file[part] = rows
    for part in ("train", "test") if name == "hepmass" else ():
        header = ",".join(["# label", *(f"f{i}" for i in range(7))])
        rows[:, 0] = np.arange(90) % 2
        path = root / name / f"1000_{part}.csv"
        np.savetxt(path, rows, delimiter=",", header=header, comments="")
    return [f"dataset.root={root}"]


def options():
    """Every option of every group, but loggers and tasks, which have tests of their own.

    Those of other groups than data sets and models differ in numbers alone, and some data sets
    are read as others are.
    """
    slow = pytest.mark.slow(reason="more than 40 runs of 2 seconds")
    alike = ("emnist", "kmnist", "qmnist", "fashion_mnist")
    alike += ("imagenet32", "imagenet64", "celeba", "uci")
    for f in sorted(CONF.glob("*/*.yaml")):
        if f.parent.name in ("logger", "task"):
            continue
        quick = f.parent.name in ("dataset", "model") and f.stem not in alike
        marks = () if quick else slow
        yield pytest.param(f"{f.parent.name}={f.stem}", marks=marks)


@pytest.mark.parametrize("choice", list(options()))
def test_every_option_of_every_group_takes_two_steps(run, tmp_path, monkeypatch, choice):
    data = data_of(choice, tmp_path / "data", monkeypatch)
    one_path = ["model=mlp"] * (choice == "pretrain=flow_matching")
    folder = run(choice, *TWO_STEPS, *data, *one_path)
    losses = column(folder, "train/loss")
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    for stage in ("train", "val", "test"):
        for key in ("bits_per_dim", "kinetic", "jacobian", "nfe_forward"):
            assert column(folder, f"{stage}/{key}"), (stage, key)
    assert column(folder, "train/kinetic")[-1] > 0  # measured whatever the λ


def another(overrides):
    return pytest.param(overrides, marks=pytest.mark.slow(reason="a case like the others"))


@pytest.mark.parametrize(
    "overrides",
    [
        "trainer.precision=bf16-mixed divergence=rademacher probes=2",
        another(
            "trainer.precision=64-true solver.train.method=midpoint solver.gradient=checkpoint"
        ),
        "solver.dtype=float64 trainer.max_time=00:00:05:00 trainer.gradient_clip_val=1.0",
        "solver=dopri5 solver.train.method=bosh3 solver.gradient=adjoint solver.train.rtol=1e-3",
        "model=mlp divergence=exact +trainer.detect_anomaly=true",
        another("optimizer._target_=torch.optim.SGD +optimizer.momentum=0.9"),
        another("callbacks.best=null callbacks.save=null trainer.log_every_n_steps=0"),
        "trainer.limit_val_batches=0",
        "+trainer.fast_dev_run=true",
    ],
)
def test_options_pass_through(run, overrides):
    folder = run(*TWO_STEPS, *overrides.split())
    without = re.search("save=null|fast_dev_run", overrides)
    assert (folder / "last.ckpt").exists() == (without is None)
