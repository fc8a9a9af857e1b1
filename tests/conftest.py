"""Fixtures that several test files share."""

import os

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from helpers import TWO_STEPS, Run, call, randomize
from rnode import Field, TimeConv2d, TimeLinear

os.environ["OMP_NUM_THREADS"] = "1"  # for runs
torch.set_num_threads(1)  # the tests' tensors are small, and pytest-xdist runs one process a core


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Every test has a folder and a random state of its own."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture
def blank_figures(monkeypatch):
    """Figures are made, but their files hold a pixel: drawing them takes most of a short run."""

    def save(self, file, **options):
        Image.new("RGB", (1, 1)).save(file, "png")

    monkeypatch.setattr(Figure, "savefig", save)


@pytest.fixture(params=["conv", "dense"])
def field_z_c(request):
    """A field of random weights with two conditions, and a batch (z, c) for it, float64."""
    layer, sizes, shape = {
        "conv": (TimeConv2d, [2, 7, 5, 2], (2, 4, 3)),
        "dense": (TimeLinear, [6, 9, 8, 9, 6], (6,)),
    }[request.param]
    field = randomize(Field(layer, sizes, k=2).double())
    z, c = torch.randn(3, *shape), torch.randn(3, 2)
    return field, z.double(), c.double()


@pytest.fixture
def run(tmp_path):
    """run(*overrides, folder="run") trains in this process and returns the run folder."""

    def train(*overrides, folder="run"):
        call("train", f"hydra.run.dir={tmp_path / folder}", *overrides)
        return tmp_path / folder

    return train


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of a run of SMALL that nothing disturbed. Tests must not change it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    Run(folder).finish()
    return folder


def trained(*overrides):
    """A fixture: the folder of a run, which tests must not change."""

    @pytest.fixture(scope="session")
    def folder(tmp_path_factory):
        folder = tmp_path_factory.mktemp("trained")
        call("train", *overrides, f"hydra.run.dir={folder}")
        return folder

    return folder


SILENT = ["trainer.enable_progress_bar=false", "logger=csv"]
DIGITS = ["dataset.batch_size=128", "dataset.test=40", "dataset.validation=40"]
MOONS = ["dataset=toy", "dataset.name=moons", "dataset.test=500", "dataset.validation=200"]
tiny_run = trained(*TWO_STEPS, "model.pieces=1")
digits_run = trained(*SILENT, *DIGITS, "trainer.max_epochs=1", "model.hidden=8", "model.pieces=1")
toy_run = trained(*SILENT, *MOONS, "trainer.max_epochs=4", "model.hidden=32", "dataset.train=10000")
