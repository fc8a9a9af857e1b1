"""Options of every configuration group, each in a run of two steps."""

import re

import numpy as np
import pytest

from data_files import (
    array_files,
    cifar10_files,
    image_files,
    mnist_files,
)
from helpers import TWO_STEPS, column
from rnode.app.schema import CONF

pytestmark = pytest.mark.usefixtures("blank_figures")
# Their files are read as those of another data set are.
ALIKE = ("kmnist", "fashion_mnist", "imagenet32", "imagenet64")


def data_of(name, root, monkeypatch):
    """Write the files that a data set or an experiment reads, and return the overrides."""
    root.mkdir()
    at = [f"dataset.root={root}", "model.pieces=1"]
    if "mnist" in name:
        mnist_files(root)
        return [*at, "dataset.validation=5"]
    if "cifar10" in name:
        cifar10_files(root, monkeypatch)
        return [*at, "dataset.validation=5"]
    if size := re.search(r"imagenet(\d+)|arrays", name):
        array_files(root, int(size[1] or 8))
        return at
    if name == "folder":
        image_files(root)
        return [*at, "dataset.size=8"]
    if name == "patches":
        return ["dataset.size=8"]
    if name == "table":
        np.save(root / "data.npy", np.random.default_rng(0).normal(size=(90, 8)))
        return [f"dataset.path={root / 'data.npy'}"]
    return []


def options():
    """Every option of every group, but loggers and tasks, which have tests of their own."""
    slow = pytest.mark.slow(reason="more than 40 runs of 2 seconds, alike or different in numbers")
    for file in sorted(CONF.glob("*/*.yaml")):
        group = file.parent.name
        if group not in ("logger", "task"):
            quick = group in ("dataset", "model") and file.stem not in ALIKE
            yield pytest.param(group, file.stem, marks=() if quick else slow)


@pytest.mark.parametrize(("group", "name"), list(options()))
def test_every_option_of_every_group_takes_two_steps(run, tmp_path, monkeypatch, group, name):
    reads = group in ("dataset", "experiment")
    data = data_of(name, tmp_path / "data", monkeypatch) if reads else []
    data += ["model=mlp"] if group == "pretrain" else []  # a flow on one space
    folder = run(f"{group}={name}", *TWO_STEPS, *data)
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
        another("trainer.precision=64-true solver.train.method=midpoint"),
        "solver.dtype=float64 trainer.max_time=00:00:05:00 trainer.gradient_clip_val=1.0",
        "solver=dopri5 solver.train.method=bosh3 solver.gradient=adjoint solver.train.rtol=1e-3",
        "model=mlp divergence=exact +trainer.detect_anomaly=true",
        another("optimizer._target_=torch.optim.SGD +optimizer.momentum=0.9"),
        another("callbacks.best=null callbacks.save=null trainer.log_every_n_steps=0"),
        "trainer.limit_val_batches=0 solver.gradient=checkpoint",
        "+trainer.fast_dev_run=true",
    ],
)
def test_options_pass_through(run, overrides):
    folder = run(*TWO_STEPS, *overrides.split())
    without = re.search("checkpointing=false|fast_dev_run", overrides)
    assert (folder / "last.ckpt").exists() == (without is None)
