"""The command reproduce: what is read from runs, figures and verdicts of made-up runs, a figure."""

import csv
import json

import polars as pl
import pytest
from PIL import Image
from rnode.paper import discussion
from rnode.paper import runs as paper
from rnode.paper.figures import PLOTS
from rnode.paper.runs import FIGURES, Job, speed_ups

from helpers import call, refused


def make_run(folder, recipe, seed, bits, seconds, *, diverged=False, data="digits"):
    """Write the folder of a run: validation bits/dim by epoch, seconds of each epoch."""
    run = Job(data, recipe, seed, (), folder / f"{data}_{recipe}_{seed}")
    run.folder.mkdir(parents=True)
    rows = []
    for epoch, value in enumerate(bits):
        trained = {"train/nfe_forward": 100 + epoch, "train/jacobian": 1 + epoch}
        spent = {"val/seconds_total": seconds * (epoch + 1)}
        logged = ({"val/bits_per_dim": value}, trained | {"train/kinetic": 2}, spent)
        rows += [{"epoch": epoch, "step": epoch, **row} for row in logged]
    if diverged:
        (run.folder / "diverged.txt").write_text("the loss became NaN")
    else:
        last = {"test/bits_per_dim": bits[-1], "test/nfe_forward": 150}
        rows.append({"epoch": len(bits), "step": len(bits), **last})
        (run.folder / "result.json").write_text(json.dumps(last))
    pl.DataFrame(rows, infer_schema_length=None).write_csv(run.folder / "metrics.csv")
    return run


def read_rows(path):
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_speed_ups_are_read_from_the_curves(tmp_path):
    slow = make_run(tmp_path, "ffjord", 0, [4.0, 3.0, 2.0], 10)
    fast = make_run(tmp_path, "fast", 0, [3.0, 2.0, 1.5], 2)
    never = make_run(tmp_path, "kinetic", 0, [4.0, 3.5, 3.0], 2)
    assert slow.seconds == [10, 20, 30]
    assert slow.seconds_to(2.5) == pytest.approx(25)
    assert fast.seconds_to(3.0) == 2
    assert never.seconds_to(2.5) is None
    ratios = speed_ups([slow, fast, never])
    # Both to 2.01: FFJORD between 20 and 30 s, the other between 2 and 4 s.
    assert ratios["fast"] == [pytest.approx(29.9 / 3.98)]
    assert ratios["kinetic"] == [0.0]


def test_figures_and_table_are_plotted_from_runs(tmp_path):
    runs = [
        make_run(tmp_path, recipe, seed, [4.0, 3.0, 2.0 + 0.01 * seed], seconds)
        for recipe, seconds in (("ffjord", 30), ("rnode", 8), ("fast", 5))
        for seed in (0, 1)
    ]
    ended = make_run(tmp_path, "unregularized", 0, [3.5, 3.2], 8, diverged=True)
    assert ended.ended
    assert not ended.finished
    needed = {"figure2": runs, "figure3": runs[:1], "figure4": [ended, runs[2]], "table1": runs}
    verdicts = {name: PLOTS[name](members, tmp_path / name) for name, members in needed.items()}
    for name, verdict in verdicts.items():
        assert verdict.startswith("The paper's claim "), name
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert (tmp_path / f"{name}.csv").stat().st_size > 30
    rows = {row["flow"]: row for row in read_rows(tmp_path / "table1.csv")}
    ours = rows["RNODE, our default (auto)"]
    assert ours["FFJORD's time / this"] == "6.00 (6.00 – 6.00)"
    assert rows["FFJORD (dopri5)"]["test bits/dim"] == "2.0050 (2.0000 – 2.0100)"
    assert rows["RNODE (published)"]["test bits/dim"] == "3.38"
    assert rows["RNODE (published)"]["FFJORD's time / this"] == "2.8"
    assert rows["Glow (published)"]["test bits/dim"] == "3.81"  # the last one, on ImageNet64
    assert rows["Glow (published)"]["source"] == "Glow, arXiv:1807.03039"
    assert "holds here" in verdicts["table1"]
    assert "6.00 (6.00 – 6.00) times sooner" in verdicts["table1"]
    assert "Runs that diverged: no penalty (rk4)" in verdicts["figure4"]


@pytest.mark.slow(reason="four training runs in processes of their own")
def test_a_figure_trains_its_runs_once(tmp_path, monkeypatch, capsys):
    stages = ("train", "val", "test")
    short = ["trainer.max_epochs=1", *(f"trainer.limit_{stage}_batches=2" for stage in stages)]
    monkeypatch.setitem(paper.DATA, "digits", [*paper.DATA["digits"], *short])
    monkeypatch.setitem(FIGURES, "figure5", FIGURES["figure5"]._replace(seeds=1))
    times = []
    for _ in range(2):
        call("reproduce", "figure=5", f"hydra.run.dir={tmp_path}")
        assert "The paper" in capsys.readouterr().out
        files = sorted((tmp_path / "runs").glob("*/metrics.csv"))
        times.append([path.stat().st_mtime_ns for path in files])
    assert len(files) == 2
    assert times[0] == times[1]
    assert Image.open(tmp_path / "figure5.png").size[0] > 800
    recipes = [row["recipe"] for row in read_rows(tmp_path / "figure5.csv")]
    assert len(recipes) == len(set(recipes)) == 2


def test_mistakes_get_one_line(tmp_path, capsys):
    for overrides, words in (
        (["figure=1", "table=1"], "give one of figure=1 to figure=5, table=1 and discussion=1"),
        (["figure=2"], "holds no finished run for figure2"),
    ):
        untrained = ["train=false", f"hydra.run.dir={tmp_path}"]
        assert words in refused(capsys, "reproduce", *overrides, *untrained)


def test_a_classifier_trains_and_is_measured():
    splits, levels = discussion.load_splits("digits", "")
    for name in ("train", "val", "test"):
        setattr(splits, name, getattr(splits, name)[:64])
        splits.c[name] = splits.c[name][:64]
    validation, test = discussion.classify(splits, levels, "rnode", seed=0, epochs=1)
    assert validation.keys() == {*discussion.MEASURES, "seconds"}
    assert test["nfe"] >= 13  # dopri5, whatever it trains by
    assert test["kinetic"] > 0
    assert 0 <= test["noisy"] <= 1
