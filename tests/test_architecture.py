"""What the layout of the source promises."""

import ast

import pytest

import rnode
from helpers import ROOT
from rnode import multiscale, objective

FILES = sorted((ROOT / "src").rglob("*.py"))
PAPER = sorted((ROOT / "src" / "rnode").glob("*.py"))
PRIVATE = {  # names of other libraries that are used although they are private, and why
    "_C": "the module of torch that has _are_functorch_transforms_active",
    "_are_functorch_transforms_active": "nothing public says that vmap or jvp is running",
    "_exit": "os._exit is public",
    "_is_amx_tile_supported": "nothing public tells what bfloat16 costs on this processor",
    "_is_avx512_bf16_supported": "nothing public tells what bfloat16 costs on this processor",
}


def private(name):
    return name.startswith("_") and not name.endswith("_")


def test_private_names_of_other_libraries_are_few_and_have_a_reason():
    functions, attributes, imports = set(), set(), set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                functions.add(node.name)
            elif isinstance(node, ast.Attribute):
                attributes.add(node.attr)
            elif isinstance(node, ast.ImportFrom | ast.Import):
                imports |= {*ast.unparse(node).replace(",", " ").replace(".", " ").split()}
    assert {"compose", "torch", "functional"} <= imports
    assert not any(map(private, imports))  # hydra._internal above all
    used = attributes - functions - {"_replace", "_asdict"}  # of named tuples
    assert set(filter(private, used)) <= set(PRIVATE)


def test_public_names_are_imported_on_first_use_and_hide_no_modules():
    for name in rnode.__all__:
        assert getattr(rnode, name) is not None, name
    assert dir(rnode) == rnode.__all__
    with pytest.raises(AttributeError, match="module 'rnode' has no attribute 'mutliscale'"):
        _ = rnode.mutliscale
    assert not {path.stem for path in PAPER} & set(rnode.__all__)
    assert callable(objective)  # the function, whatever was imported before
    assert callable(multiscale)
