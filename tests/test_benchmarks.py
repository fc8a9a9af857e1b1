"""The benchmarks run and write their records. The figures are not checked."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import common
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
    torch.manual_seed(1)
    ours = flow.solve(x)
    torch.manual_seed(1)
    theirs = recipe.solve(x)
    torch.testing.assert_close(ours.state, theirs.state, rtol=1e-10, atol=1e-12)
    assert ours.nfe_forward == theirs.nfe_forward == 16 * len(flow.pieces)
    theirs.state.z.sum().backward()
    assert theirs.nfe_backward > 0


def test_weights_of_plain_networks_are_carried_into_a_flow():
    """Of networks that see softplus(a) and concatenate time, as the released code's do."""
    flow = rnode.multiscale((1, 8, 8), Solver(RK4, DOPRI5), Probes(), hidden=5).double()
    weights = [0.3 * torch.randn_like(parameter) for parameter in flow.parameters()]
    ffjord.load(flow, ffjord.carry_over(weights))
    t = torch.tensor(0.3).double()
    pairs = zip(weights[::2], weights[1::2], strict=True)
    for piece in flow.pieces:
        h = z = torch.randn(3, piece.field.layers[-1].out_channels, 4, 4).double()
        for i in range(4):
            h = torch.cat([t.expand(3, 1, 4, 4), F.softplus(h) if i else h], 1)
            h = F.conv2d(h, *next(pairs), padding=1)
        torch.testing.assert_close(piece.field(t, z, z.new_empty(3, 0)), h, rtol=1e-10, atol=1e-10)


def test_a_record_has_rows_and_what_they_depend_on(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/some/where/step.py", "--seeds", "0 1"])
    monkeypatch.setattr(common, "DEVICE", torch.device("cpu"))
    rows = [{"contender": "±", "seconds": "0.50"}]
    common.write_record("some", "a title", rows)
    record = json.loads(Path("benchmarks/results/some.json").read_text(encoding="utf-8"))
    assert record["rows"] == rows
    assert record["command"] == "python benchmarks/step.py --seeds '0 1'"
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert record["commit"]
    assert "1 thread" in record["machine"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", record["date"])
    assert "0.50" in capsys.readouterr().out


@pytest.mark.slow(reason="eight benchmarks")
@pytest.mark.parametrize(
    ("name", "arguments", "rows"),
    [
        ("step_digits", QUICK, 10),
        ("evaluation_digits", QUICK, 4),
        ("sampling_digits", QUICK, 5),
        ("ddp_digits", QUICK, 3),
        ("runs_digits", ["--quick", "--overrides", "model.hidden=4", "model.pieces=1"], 3),
        ("budget", [], 6),
        ("growth", ["--quick"], 5),
        ("recipe_digits", ["--quick"], 1),
    ],
)
def test_benchmarks_write_a_record(name, arguments, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    importlib.import_module(name.split("_")[0]).main()
    folder = "outputs/benchmarks" if "--quick" in arguments else "benchmarks/results"
    record = json.loads(Path(folder, f"{name}.json").read_text(encoding="utf-8"))
    assert len(record["rows"]) == rows
    assert all(row.keys() == record["rows"][0].keys() for row in record["rows"])
    assert f"written to {folder}" in capsys.readouterr().out
