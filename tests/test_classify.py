"""Classifiers: the objective, and whole runs on images and tables."""

import csv
import functools
import json

import polars as pl
import pytest
import torch
from sklearn.datasets import load_iris

from helpers import DOPRI5, RK4, call, refused
from rnode import Solver
from rnode.training.classifier import Classifier

QUICK = ["trainer.enable_progress_bar=false", "trainer.accelerator=cpu"]


def test_the_loss_is_cross_entropy_and_the_penalties_by_dimension():
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    module = Classifier((1, 4, 4), 3, Solver(RK4, DOPRI5), sgd, 0.3, 0.7, hidden=2, layers=2)
    torch.nn.init.normal_(module.piece.field.layers[-1].weight)
    x, label = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
    torch.manual_seed(1)
    logits, solution = module(x)
    torch.manual_seed(1)
    loss = module.training_step([x, label], 0)
    log_prob = logits.log_softmax(1)[range(5), label]
    _, _, E, n = solution.state
    assert module.d == solution.state.z[0].numel() == 8
    expected = -log_prob.mean() + 0.3 * E.mean() / 8 + 0.7 * n.mean() / 8
    torch.testing.assert_close(loss, expected)


def test_a_run_classifies_digits_far_better_than_chance(tmp_path, capsys):
    run = [f"hydra.run.dir={tmp_path}", "trainer.max_epochs=2", "model.hidden=8", *QUICK]
    call("train", "task=classify", *run)
    out = capsys.readouterr().out
    assert "digits by a neural ODE classifier, hidden=8 layers=3, solver=auto" in out
    assert "epoch 2: accuracy 0." in out
    result = json.loads((tmp_path / "result.json").read_text())
    assert 0.6 < result["test/accuracy"] <= 1
    assert 0.3 < result["test/noisy"] <= result["test/accuracy"] + 0.02
    assert result["test/nfe"] >= 13  # dopri5, although a grid of 2 steps trains
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/accuracy"]]
    assert len(rows) == 2
    left = {path.name for path in tmp_path.iterdir()}
    assert {"best.ckpt", "curves.png", "config.yaml", "train.log"} <= left
    line, _ = refused(capsys, "evaluate", str(tmp_path / "best.ckpt"))
    assert "best.ckpt" in line


def test_a_run_classifies_the_rows_of_a_table(tmp_path):
    iris = load_iris()
    table = pl.DataFrame(iris.data, schema=["sepal", "width", "petal", "breadth"])
    species = pl.Series("species", iris.target_names[iris.target].tolist())
    table.with_columns(species).write_csv(tmp_path / "iris.csv")
    data = [f"dataset.path={tmp_path / 'iris.csv'}", "dataset.context=[species]"]
    sizes = ["dataset.batch_size=16", "model.hidden=8", "trainer.max_epochs=15"]
    place = f"hydra.run.dir={tmp_path / 'run'}"
    call("train", "task=classify", "dataset=table", *data, *sizes, place, *QUICK)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["test/accuracy"] > 0.7


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["pretrain=flow_matching"], "pretrain: task=classify does not use it"),
        (["model.pieces=2"], "model.pieces: task=classify does not use it"),
        (["dataset=toy"], "dataset=toy has no labels"),
        (["trainer.devices=2"], "trainer.devices=2: task=classify needs 1"),
    ],
)
def test_what_a_classifier_does_not_use_is_refused(overrides, words, tmp_path, capsys):
    place = f"hydra.run.dir={tmp_path}"
    line, _ = refused(capsys, "train", "task=classify", *overrides, place)
    assert words in line
