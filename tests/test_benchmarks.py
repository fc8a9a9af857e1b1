"""The benchmarks run and write what they say; their figures are not asserted."""

import csv
import importlib
import sys

import pytest
import torch

import plain
import rnode
from conftest import DOPRI5, RK4, randomize
from rnode import Probes, Solver

SMALL = ["--dataset", "digits", "--batch", "2", "--channels", "4", "--repetitions", "1"]


def test_the_plain_recipe_in_the_same_program_gives_the_same_state():
    """`model._target_=plain.multiscale` and the package's flow, with the same weights and probes, in float64."""
    flow = randomize(rnode.multiscale((1, 8, 8), Solver(RK4, DOPRI5), Probes(), hidden=5)).double()
    recipe = plain.multiscale((1, 8, 8), Solver(RK4, DOPRI5), Probes(), hidden=5).double()
    for ours, theirs in zip(flow.pieces, recipe.pieces, strict=True):
        theirs.field = plain.PlainNet(ours.field)
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    states = []
    for model in (flow, recipe):
        torch.manual_seed(1)
        states.append(model(x))
    for ours, expected in zip(*states, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert flow.nfe[0] == recipe.nfe[0] == 16 * len(flow.pieces)
    states[1].z.sum().backward()
    assert recipe.nfe[1] > 0


@pytest.mark.slow  # six benchmarks
@pytest.mark.parametrize(
    ("name", "arguments", "rows"),
    [
        ("step_digits", SMALL, 10),
        ("memory_digits", SMALL, 6),
        ("evaluation_digits", SMALL, 3),
        ("sampling_digits", SMALL, 4),
        ("ddp_digits", SMALL, 3),
        ("budget", [], 6),
    ],
)
def test_benchmarks_write_a_table(name, arguments, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    importlib.import_module(name.split("_")[0]).main()
    with open(f"outputs/benchmarks/{name}.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == rows
    assert all(None not in row.values() for row in table)
    assert "written to outputs/benchmarks" in capsys.readouterr().out
    if name != "budget":
        assert (tmp_path / f"outputs/benchmarks/{name}.png").stat().st_size > 1000
