"""The wheel, installed in a new environment and used in an empty folder."""

import re
import shutil
import sys
import venv
from pathlib import Path

import pytest

from helpers import ROOT, TWO_STEPS, succeed

pytestmark = pytest.mark.slow(reason="builds and installs the package, and runs seven commands")


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
    succeed(sys.executable, *install, wheel)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(succeed(python, "-c", where).strip())
    (packages / "dependencies.pth").write_text(str(Path(pytest.__file__).parents[1]))
    installed = {path.relative_to(packages / "rnode") for path in packages.rglob("conf/**/*.yaml")}
    assert installed == {path.relative_to(ROOT) for path in ROOT.glob("conf/**/*.yaml")}
    return folder / "env" / "bin" / "rnode"


def test_every_command_works_in_an_empty_folder(rnode, tmp_path):
    assert re.fullmatch(r"rnode \d+\.\d+\.\d+\n", succeed(rnode, "--version"))
    succeed(rnode, "train", *TWO_STEPS, "model.pieces=1")
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    (checkpoint,) = tmp_path.glob("outputs/digits/*/last.ckpt")
    checkpoint = checkpoint.relative_to(tmp_path)
    assert "bits_per_dim" in succeed(rnode, "evaluate", checkpoint, "samples=1")
    assert "4 samples by dopri5 in" in succeed(rnode, "sample", checkpoint, "n=4")
    assert len(list(tmp_path.glob("outputs/evaluate/*/evaluation.json"))) == 1
    assert len(list(tmp_path.glob("outputs/sample/*/samples.png"))) == 1
    assert "figure" in succeed(rnode, "reproduce", "--help")
