"""What the layout of the source promises."""

import ast
import re

import pytest

import rnode
from helpers import ROOT
from rnode.app.schema import COMMANDS

PRIVATE = {  # names of other libraries that are used although they are private, and why
    "_C": "the module of torch that has _are_functorch_transforms_active",
    "_are_functorch_transforms_active": "nothing public says that vmap or jvp is running",
    "_exit": "os._exit is public",
    "_is_amx_tile_supported": "nothing public tells what bfloat16 costs",
    "_is_avx512_bf16_supported": "nothing public tells what bfloat16 costs",
    "_validate_args": "how a subclass of Distribution knows that it checks its arguments",
    "_validate_sample": "how a subclass of Distribution checks them",
}


def test_private_names_of_other_libraries_are_few_and_have_a_reason():
    functions, attributes, imports = set(), set(), set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                functions.add(node.name)
            elif isinstance(node, ast.Attribute):
                attributes.add(node.attr)
            elif isinstance(node, ast.ImportFrom | ast.Import):
                imports |= {*ast.unparse(node).replace(",", " ").replace(".", " ").split()}
    assert {"compose", "torch", "functional"} <= imports
    private = re.compile("_.*(?<!_)$").match
    assert not any(map(private, imports))  # hydra._internal above all
    used = attributes - functions - {"_replace", "_asdict"}  # of named tuples
    assert set(filter(private, used)) <= set(PRIVATE)


def test_scripts_are_thin():
    scripts = sorted((ROOT / "src").glob("*.py"))
    assert [path.stem for path in scripts] == sorted(COMMANDS)
    texts = {path.read_text(encoding="utf-8").replace(path.stem, "COMMAND") for path in scripts}
    assert len(texts) == 1
    assert len(texts.pop().splitlines()) < 10


def test_public_names_are_imported_on_first_use_and_hide_no_modules():
    for name in rnode.__all__:
        assert getattr(rnode, name) is not None, name
    assert dir(rnode) == rnode.__all__
    with pytest.raises(AttributeError, match="module 'rnode' has no attribute 'mutliscale'"):
        _ = rnode.mutliscale
    modules = (ROOT / "src" / "rnode").glob("*.py")
    assert not {path.stem for path in modules} & set(rnode.__all__)
