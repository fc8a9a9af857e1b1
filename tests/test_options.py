"""Options of every configuration group, each in a run of two steps."""

import numpy as np
import pytest

from data_files import array_files, cifar10_files, image_files, mnist_files
from helpers import TWO_STEPS, column
from rnode.app.schema import CONF

pytestmark = pytest.mark.usefixtures("blank_figures")
DATA = ("arrays", "cifar10", "digits", "folder", "mnist", "patches", "table", "toy")
GROUPS = ("dataset", "experiment", "model", "regularizer", "solver")


def data_of(name, root, monkeypatch):
    """Write the files that a data set or an experiment reads, and return the overrides."""
    root.mkdir()
    at = [f"dataset.root={root}", "model.pieces=1"]
    if "mnist" in name:
        mnist_files(root)
    if "cifar10" in name:
        cifar10_files(root, monkeypatch)
    if "mnist" in name or "cifar10" in name:
        return [*at, "dataset.validation=5"]
    if name in ("arrays", "imagenet64"):
        array_files(root, 8 if name == "arrays" else 64)
        return at
    if name == "folder":
        image_files(root)
        return [*at, "dataset.size=8"]
    if name == "patches":
        return ["dataset.size=8"]
    if name == "table":
        np.save(root / "data.npy", np.random.default_rng(0).normal(size=(90, 8)))
        return [f"dataset.path={root / 'data.npy'}"]
    return ["solver=rk4"] if name == "paper" else []  # the adjoint needs integrals=system


def options():
    """Options of the groups; data sets that are read as another one is have tests elsewhere."""
    slow = pytest.mark.slow(reason="more than 20 runs of 2 seconds, alike or different in numbers")
    for file in sorted(CONF.glob("*/*.yaml")):
        group, name = file.parent.name, file.stem
        if group in GROUPS and name != "celeba64" and (group != "dataset" or name in DATA):
            marks = () if group in ("dataset", "model") else slow
            yield pytest.param(group, name, marks=marks)


@pytest.mark.parametrize(("group", "name"), list(options()))
def test_every_option_of_every_group_takes_two_steps(run, tmp_path, monkeypatch, group, name):
    reads = group in ("dataset", "experiment")
    data = data_of(name, tmp_path / "data", monkeypatch) if reads else []
    folder = run(f"{group}={name}", *TWO_STEPS, *data)
    losses = column(folder, "train/loss")
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    for stage in ("train", "val", "test"):
        for key in ("bits_per_dim", "kinetic", "nfe_forward"):
            assert column(folder, f"{stage}/{key}"), (stage, key)
    assert column(folder, "train/kinetic")[-1] > 0  # measured whatever the λ


@pytest.mark.parametrize(
    "overrides",
    [
        "trainer.precision=bf16-mixed divergence=rademacher probes=2",
        "solver.dtype=float64 trainer.max_time=00:00:05:00 trainer.gradient_clip_val=1.0",
        "solver=dopri5 solver.train.method=bosh3 solver.gradient=adjoint solver.train.rtol=1e-3",
        "model=mlp divergence=exact optimizer._target_=torch.optim.SGD +optimizer.momentum=0.9",
        "trainer.limit_val_batches=0 solver.gradient=checkpoint callbacks.figures=null",
    ],
)
def test_options_pass_through(run, overrides):
    assert (run(*TWO_STEPS, *overrides.split()) / "last.ckpt").exists()
