"""Options of every configuration group, each in a run of two steps."""

import re

import numpy as np
import pytest

from data_files import (
    array_files,
    celeba_files,
    cifar10_files,
    image_files,
    mnist_files,
    svhn_files,
)
from helpers import TWO_STEPS, column
from rnode.app.schema import CONF
from rnode.data.images import FILES

pytestmark = pytest.mark.usefixtures("blank_figures")


def data_of(choice, root, monkeypatch):
    """Write the files that an option of a group reads, and return the overrides that name them."""
    root.mkdir()
    at = [f"dataset.root={root}", "model.pieces=1"]
    if "mnist" in choice:
        mnist_files(root, FILES.get(choice.removeprefix("dataset=").upper(), FILES["MNIST"]))
        return [*at, "dataset.validation=5"]
    if "cifar10" in choice:
        cifar10_files(root, monkeypatch)
        return [*at, "dataset.validation=5"]
    if "svhn" in choice:
        svhn_files(root, monkeypatch)
        return [*at, "dataset.validation=4"]
    if size := re.search(r"imagenet(\d+)|arrays", choice):
        array_files(root, int(size[1] or 8))
        return at
    if "patches" in choice:
        return ["dataset.size=8"]
    if "celeba" in choice:
        celeba_files(root)
        return [*at, "dataset.size=8"]
    if "folder" in choice:
        image_files(root)
        return [*at, "dataset.size=8"]
    if "dataset=table" in choice:
        np.save(root / "data.npy", np.random.default_rng(0).normal(size=(90, 8)))
        return [f"dataset.path={root / 'data.npy'}"]
    return []


def options():
    """Every option of every group, but loggers and tasks, which have tests of their own.

    Those of other groups than data sets and models differ in numbers alone, and some data sets
    are read as others are.
    """
    slow = pytest.mark.slow(reason="more than 40 runs of 2 seconds")
    alike = ("emnist", "kmnist", "qmnist", "fashion_mnist")
    alike += ("imagenet32", "imagenet64", "celeba")
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
