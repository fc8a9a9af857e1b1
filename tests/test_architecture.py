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
from rnode.app.schema import COMMANDS

FILES = sorted((ROOT / "src").rglob("*.py"))
PAPER = sorted((ROOT / "src" / "rnode").glob("*.py"))
PRIVATE = {  # names of other libraries that are used although they are private, and why
    "_C": "the module of torch that has _are_functorch_transforms_active",
    "_are_functorch_transforms_active": "nothing public says that vmap or jvp is running",
    "_exit": "os._exit is public",
    "_get_train_description": "the only way to change the text of Lightning's progress bar",
    "_is_amx_tile_supported": "nothing public tells what bfloat16 costs on this processor",
    "_is_avx512_bf16_supported": "nothing public tells what bfloat16 costs on this processor",
}


def nodes(path):
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def private(name):
    return name.startswith("_") and not name.endswith("_")


def test_private_names_of_other_libraries_are_few_and_have_a_reason():
    functions, attributes, names, imports = set(), set(), set(), set()
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef):
                functions.add(node.name)
            elif isinstance(node, ast.Attribute):
                attributes.add(node.attr)
            elif isinstance(node, ast.Name):
                names.add(node.id)
            elif isinstance(node, ast.ImportFrom | ast.Import):
                imports |= {*ast.unparse(node).replace(",", " ").replace(".", " ").split()}
    assert {"compose", "torch", "functional"} <= imports
    assert set(filter(private, imports)) == set()  # hydra._internal above all
    used = attributes - functions - {"_replace", "_asdict"}  # of named tuples
    overridden = functions - attributes - names  # a library alone calls them
    assert "run_name" not in overridden
    assert set(filter(private, used | overridden)) <= set(PRIVATE)


def test_scripts_are_thin():
    scripts = sorted((ROOT / "src").glob("*.py"))
    assert [path.stem for path in scripts] == sorted(COMMANDS)
    for path in scripts:
        text = path.read_text(encoding="utf-8").replace(path.stem, "COMMAND")
        assert text == scripts[0].read_text(encoding="utf-8").replace(scripts[0].stem, "COMMAND")
        assert len(text.splitlines()) < 10


def sections():
    """The sections of the configuration, such as dataset and solver."""
    conf = ROOT / "conf"
    train = yaml.safe_load((conf / "train.yaml").read_text(encoding="utf-8"))
    names = {name for name, value in train.items() if isinstance(value, dict)}
    groups = {path.name for path in conf.iterdir() if path.is_dir()}
    return names - {"hydra"} | groups | {"reg", "trainer"}


def test_the_papers_files_name_no_configuration_key():
    key = re.compile(rf"(?<![\w.])(?:{'|'.join(sorted(sections()))})\.\w+")
    assert key.search("dataset.levels=1: must be at least 2")
    assert key.search("try a smaller optimizer.lr")
    found = []
    for path in PAPER:
        for node in nodes(path):
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


def test_public_names_are_imported_on_first_use_and_hide_no_modules():
    for name in rnode.__all__:
        assert getattr(rnode, name) is not None, name
    assert dir(rnode) == rnode.__all__
    with pytest.raises(AttributeError, match="module 'rnode' has no attribute 'mutliscale'"):
        _ = rnode.mutliscale
    assert not {path.stem for path in PAPER} & set(rnode.__all__)
    assert callable(objective)  # the function, whatever was imported before
    assert callable(multiscale)
