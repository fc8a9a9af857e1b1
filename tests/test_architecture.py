"""What the layout of the source promises."""

import ast
import re
import subprocess
import sys

import pytest
import yaml

import rnode
from helpers import HANG, ROOT
from rnode import multiscale, objective
from rnode.app.cli import ABOUT

SOURCE = ROOT / "src"
FILES = sorted(SOURCE.glob("rnode/**/*.py"))
PAPER = sorted(SOURCE.glob("rnode/*.py"))
SCRIPTS = sorted(SOURCE.glob("*.py"))


def lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_file_has_more_than_300_lines():
    assert len(FILES) > 20
    assert {path.name: lines(path) for path in FILES if lines(path) > 300} == {}


def test_scripts_are_thin():
    names = [path.stem for path in SCRIPTS]
    assert names == sorted(ABOUT)
    assert {path.name: lines(path) for path in SCRIPTS if lines(path) >= 30} == {}


def sections():
    """The sections of the configuration, such as dataset and solver."""
    conf = ROOT / "conf"
    train = yaml.safe_load((conf / "train.yaml").read_text())
    regularizer = (conf / "regularizer" / "rnode.yaml").read_text()
    (package,) = re.findall(r"^# @package (\w+)$", regularizer, re.MULTILINE)
    names = {name for name, value in train.items() if isinstance(value, dict)}
    groups = {path.name for path in conf.iterdir() if path.is_dir()}
    return names - {"hydra"} | groups | {package, "trainer"}


def test_the_papers_files_name_no_configuration_key():
    key = re.compile(rf"(?<![\w.])(?:{'|'.join(sorted(sections()))})\.\w+")
    assert key.search("dataset.levels=1: must be at least 2")
    assert key.search("try a smaller optimizer.lr")
    found = []
    for path in PAPER:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found += [f"{path.name}: {match}" for match in key.findall(node.value)]
    assert found == []


@pytest.mark.parametrize("module", ["rnode", "rnode.errors", "rnode.app.cli"])
def test_light_modules_import_no_heavy_ones(module):
    """Otherwise --help and the line about a mistake would wait for torch."""
    heavy = {"torch", "numpy", "pytorch_lightning", "matplotlib", "wandb", "sklearn"}
    command = [sys.executable, "-c", f"import sys, {module}; print(*sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=True)
    imported = set(done.stdout.split())
    assert module in imported
    assert not heavy & imported


def test_every_public_name_is_imported_on_first_use():
    for name in rnode.__all__:
        assert getattr(rnode, name) is not None, name
    assert dir(rnode) == rnode.__all__
    with pytest.raises(AttributeError, match="module 'rnode' has no attribute 'mutliscale'"):
        _ = rnode.mutliscale


def test_public_names_do_not_hide_modules():
    """`from rnode import objective` gives the function, whatever was imported before."""
    modules = {path.stem for path in PAPER}
    assert not modules & set(rnode.__all__)
    assert callable(objective)
    assert callable(multiscale)
