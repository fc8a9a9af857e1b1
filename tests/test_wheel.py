"""The wheel, installed in a new environment and used in an empty folder."""

import re
import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest

from helpers import HANG, ONE_THREAD, ROOT, TWO_STEPS

pytestmark = pytest.mark.slow(reason="builds and installs the package, and runs seven commands")

OWN_DATA = """
import torch
from rnode import ImageTransform
from rnode.data.splits import Splits

def stripes(count):
    images = torch.arange(2).repeat(count, 1, 8, 4).byte()
    return Splits(images, images[:8], images[:8], ImageTransform(levels=2, alpha=0.05))
"""
OWN_CONFIG = """
# @package _global_
# two grey levels in stripes
dataset:
  _target_: rnode.data.datamodule.DataModule
  source: {_target_: own.stripes, _partial_: true}
  count: 40
  batch_size: 8
  eval_batch_size: 8
  seed: ${seed}
"""


def succeed(*command, cwd):
    options = {"cwd": cwd, "env": ONE_THREAD, "timeout": HANG, "capture_output": True}
    done = subprocess.run(list(map(str, command)), check=False, text=True, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def rnode(tmp_path_factory):
    """The command `rnode` of a new environment that finds the installed dependencies."""
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    for name in ("src", "conf", "benchmarks"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder]
    succeed(*build, cwd=source)
    (wheel,) = folder.glob("rnode_flows-*.whl")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    install = ["-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    succeed(sys.executable, *install, wheel, cwd=folder)
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = folder / succeed(*where, cwd=folder).strip()
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    installed = {path.relative_to(packages / "rnode") for path in packages.rglob("conf/**/*.yaml")}
    assert installed == {path.relative_to(ROOT) for path in ROOT.glob("conf/**/*.yaml")}
    return folder / "env" / "bin" / "rnode"


def test_every_command_works_in_an_empty_folder(rnode, tmp_path):
    assert re.fullmatch(r"rnode \d+\.\d+\.\d+\n", succeed(rnode, "--version", cwd=tmp_path))
    succeed(rnode, "train", *TWO_STEPS, "model.pieces=1", cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    (checkpoint,) = tmp_path.glob("outputs/digits/*/last.ckpt")
    checkpoint = checkpoint.relative_to(tmp_path)
    assert "bits_per_dim" in succeed(rnode, "evaluate", checkpoint, "samples=1", cwd=tmp_path)
    assert "NFE" in succeed(rnode, "sample", checkpoint, "n=4", cwd=tmp_path)
    assert len(list(tmp_path.glob("outputs/evaluate/*/evaluation.json"))) == 1
    assert len(list(tmp_path.glob("outputs/sample/*/samples.png"))) == 1
    assert "figure" in succeed(rnode, "reproduce", "--help", cwd=tmp_path)


def test_a_users_own_data_set_trains_and_is_sampled(rnode, tmp_path):
    (tmp_path / "own.py").write_text(OWN_DATA)
    own = tmp_path / "own" / "dataset" / "stripes.yaml"
    own.parent.mkdir(parents=True)
    own.write_text(OWN_CONFIG)
    options = ["--config-dir", "own", "dataset=stripes", *TWO_STEPS, "model.pieces=1"]
    assert "dataset.count" in succeed(rnode, "train", *options, "--help", cwd=tmp_path)
    succeed(rnode, "train", *options, "hydra.run.dir=run", cwd=tmp_path)
    sample = ["trust=[own]", "run/last.ckpt", "n=4", "hydra.run.dir=samples"]
    succeed(rnode, "sample", *sample, cwd=tmp_path)
    assert (tmp_path / "samples" / "samples.png").exists()
