"""evaluate.py, sample.py and reproduce.py on models that their own command line has trained for seconds."""

import csv
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import cli
import evaluate
import paper
import reproduce
import sample
import train
from paper import KNOWN, Run, sooner
from rnode.checkpoint import load_checkpoint
from test_train import QUICK, column, metrics

SCRIPTS = {"train": train, "evaluate": evaluate, "sample": sample, "reproduce": reproduce}


def call(name, *overrides):
    """Run a script in this process as the command line would."""
    before, sys.argv = sys.argv, [f"{name}.py", *overrides]
    try:
        cli.run(SCRIPTS[name].main, f"{name}.py", "")
    finally:
        sys.argv = before


def refused(capsys, name, *overrides):
    """The one line that a mistake prints, and its exit code."""
    with pytest.raises(SystemExit) as stop:
        call(name, *overrides)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0], stop.value.code


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    model = ["model.hidden=8", "model.pieces=1", "dataset.batch_size=128", "dataset.test=40", "dataset.validation=40"]
    once = ["trainer.max_epochs=1", "trainer.enable_progress_bar=false", "wandb.mode=disabled"]
    call("train", *model, *once, f"hydra.run.dir={folder}")
    return folder


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    few = ["dataset=toy", "dataset.name=moons", "dataset.test=500", "dataset.validation=200", "pictures.samples=100"]
    short = ["trainer.max_epochs=12", "trainer.enable_progress_bar=false", "wandb.mode=disabled"]
    call("train", *few, *short, f"hydra.run.dir={folder}")
    return folder


def result(folder):
    return json.loads((folder / "evaluation.json").read_text())


def test_an_evaluation_reports_what_the_test_did_and_more(digits_run, tmp_path, capsys):
    folder = tmp_path / "evaluation"
    call("evaluate", f"ckpt_path={digits_run}/best.ckpt", "samples=3", f"hydra.run.dir={folder}")
    out = capsys.readouterr().out
    summary = result(folder)
    for name in ("bits_per_dim", "kinetic", "jacobian"):
        assert summary[name] == pytest.approx(column(digits_run, f"test/{name}")[0], abs=2e-5), name
    assert summary["standard_error_images"] == pytest.approx(column(digits_run, "test/bits_per_dim_se")[0], abs=2e-5)
    assert summary["nfe"] == pytest.approx(column(digits_run, "test/nfe_forward")[0])
    assert sum(summary["nfe_by_piece"]) == pytest.approx(summary["nfe"])
    assert 0 < summary["standard_error_probes"] < summary["standard_error_images"]
    assert summary["bound"] < summary["bits_per_dim"] + summary["standard_error_probes"]
    assert len(summary["bound_by_noises"]) == 3
    assert summary["divergence"] == "1 gaussian probe(s) a sample"
    assert summary["transport_cost"] > 0
    assert 0 < summary["straightness"] < 1
    assert summary["inverse_error"] < 1e-2
    for text in ("importance-weighted bound, 3 noises", "no bound", "over probes", "NFE by piece", "straightness"):
        assert text in out
    with open(folder / "samples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(int(row["index"]) for row in rows) == list(range(40))
    assert np.mean([float(row["bits_per_dim"]) for row in rows]) == pytest.approx(summary["bits_per_dim"])
    assert Image.open(folder / "extremes.png").size[0] > 600


def test_an_evaluation_takes_another_solver_split_and_seed(digits_run, tmp_path):
    checkpoint, one = f"ckpt_path={digits_run}/best.ckpt", "samples=1"
    call("evaluate", checkpoint, one, "split=val", f"hydra.run.dir={tmp_path / 'val'}")
    best = min(column(digits_run, "val/bits_per_dim"))
    assert result(tmp_path / "val")["bits_per_dim"] == pytest.approx(best, abs=2e-5)
    call("evaluate", checkpoint, one, "solver=rk4", f"hydra.run.dir={tmp_path / 'rk4'}")
    assert result(tmp_path / "rk4")["solver"]["method"] == "rk4"
    assert result(tmp_path / "rk4")["nfe"] == 16 * 3
    finer = ["solver.test.method=rk4", "solver.test.step_size=0.125", "solver.dtype=float64", "dataset.eval_batch_size=7"]
    call("evaluate", checkpoint, one, *finer, f"hydra.run.dir={tmp_path / 'finer'}")
    assert result(tmp_path / "finer")["nfe"] == 32 * 3
    test = column(digits_run, "test/bits_per_dim")[0]
    assert result(tmp_path / "finer")["bits_per_dim"] == pytest.approx(test, abs=2e-3)
    call("evaluate", checkpoint, one, "seed=1", "divergence=rademacher", "probes=2", f"hydra.run.dir={tmp_path / 'seed'}")
    other = result(tmp_path / "seed")
    assert other["divergence"] == "2 rademacher probe(s) a sample"
    assert 1e-5 < abs(other["bits_per_dim"] - test) < 0.2


def test_vectors_are_evaluated_exactly_and_have_no_bound(toy_run, tmp_path):
    call("evaluate", f"ckpt_path={toy_run}/best.ckpt", f"hydra.run.dir={tmp_path}")
    summary = result(tmp_path)
    assert summary["divergence"] == "exact"
    assert summary["standard_error_probes"] == 0
    assert "bound" not in summary
    assert "midpoint" not in summary
    assert (tmp_path / "extremes.png").exists()


def energy_distance(a, b):
    return 2 * np.mean(distances(a, b)) - np.mean(distances(a, a)) - np.mean(distances(b, b))


def distances(a, b):
    return np.linalg.norm(a[:, None] - b[None], axis=2)


def two_sample_p(a, b, rng, permutations=200):
    """p-value of the energy distance under permutations of the pooled points."""
    pooled, observed = np.concatenate([a, b]), energy_distance(a, b)
    larger = 0
    for _ in range(permutations):
        order = rng.permutation(len(pooled))
        larger += energy_distance(pooled[order[: len(a)]], pooled[order[len(a) :]]) >= observed
    return (larger + 1) / (permutations + 1)


def test_samples_of_a_trained_flow_agree_with_the_data_by_a_two_sample_test(toy_run, tmp_path):
    from rnode.data import DENSITIES

    call("sample", f"ckpt_path={toy_run}/best.ckpt", "n=250", f"hydra.run.dir={tmp_path}")
    samples, rng = np.load(tmp_path / "samples.npy"), np.random.default_rng(0)
    assert samples.shape == (250, 2)
    data = DENSITIES["moons"](250, rng)
    assert two_sample_p(samples, data, rng) > 0.01
    assert two_sample_p(rng.standard_normal((250, 2)), data, rng) < 0.01  # what an untrained flow gives
    assert Image.open(tmp_path / "plane.png").size[0] > 600
    assert (tmp_path / "samples.png").exists()


def test_samples_of_images_with_trajectory_and_interpolation(digits_run, tmp_path, capsys):
    arguments = [f"ckpt_path={digits_run}/best.ckpt", "n=10", "dataset.eval_batch_size=4"]
    call("sample", *arguments, "trajectory=true", "interpolate=[0,1]", f"hydra.run.dir={tmp_path / 'a'}")
    assert "10 samples, NFE" in capsys.readouterr().out
    samples = np.load(tmp_path / "a" / "samples.npy")
    assert samples.shape == (10, 1, 8, 8)
    assert samples.dtype == np.uint8
    assert samples.max() < 17
    with Image.open(tmp_path / "a" / "trajectory.gif") as animation:
        assert animation.n_frames >= 8
    assert Image.open(tmp_path / "a" / "strip.png").size[0] > 400
    width, height = Image.open(tmp_path / "a" / "interpolation.png").size
    assert width > 8 * height
    call("sample", *arguments, f"hydra.run.dir={tmp_path / 'b'}")
    assert np.array_equal(samples, np.load(tmp_path / "b" / "samples.npy"))
    assert not (tmp_path / "b" / "trajectory.gif").exists()
    call("sample", *arguments, "seed=1", "temperature=0.5", "solver=rk4", f"hydra.run.dir={tmp_path / 'c'}")
    assert not np.array_equal(samples, np.load(tmp_path / "c" / "samples.npy"))
    assert "NFE 48.0 a batch by rk4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("evaluate", [], "ckpt_path=None: must be a checkpoint"),
        ("evaluate", ["ckpt_path=nowhere.ckpt"], "there is no such file"),
        ("evaluate", ["ckpt_path=BEST", "samples=0"], "samples=0: must be"),
        ("evaluate", ["ckpt_path=BEST", "split=tset"], "split=tset: must be test or val or train"),
        ("evaluate", ["ckpt_path=BEST", "solver.train.method=rk4"], "solver.train.method"),
        ("evaluate", ["ckpt_path=BEST", "solver.test.method=rk5"], "method=rk5"),
        ("evaluate", ["ckpt_path=BEST", "solver.test.metod=rk4"], "there is no option solver.test.metod"),
        ("evaluate", ["ckpt_path=BEST", "+sampels=3"], "there is no option +sampels"),
        ("evaluate", ["ckpt_path=BEST", "dataset.root=elsewhere"], "dataset.root=elsewhere: must be left out"),
        ("evaluate", ["ckpt_path=BEST", "dataset.eval_batch_size=0"], "eval_batch_size=0"),
        ("evaluate", ["ckpt_path=BEST", "seed=-1"], "seed=-1"),
        ("evaluate", ["ckpt_path=BEST", "divergence=exactly"], "divergence=exactly"),
        ("evaluate", ["ckpt_path=BEST", "probes=0"], "probes=0"),
        ("sample", ["ckpt_path=BEST", "n=0"], "n=0: must be a whole number of samples, 1 or more"),
        ("sample", ["ckpt_path=BEST", "n=two"], "n=two"),
        ("sample", ["ckpt_path=BEST", "temperature=-1"], "temperature=-1"),
        ("sample", ["ckpt_path=BEST", "interpolate=[0,400]"], "interpolate=[0, 400]: must be two numbers of test images"),
        ("sample", ["ckpt_path=BEST", "interpolate=7"], "interpolate=7"),
        ("sample", ["ckpt_path=BEST", "trajectory=1"], "trajectory=1: must be true or false"),
        ("reproduce", ["figure=6"], "figure=6 table=None: must be one of figure=1, figure=2"),
        ("reproduce", [], "must be one of figure=1"),
        ("reproduce", ["figure=1", "table=1"], "must be one of"),
        ("reproduce", ["figure=2", "scale=large"], "scale=large: must be small or paper"),
        ("reproduce", ["figure=2", "train=false"], "holds no finished run for figure2"),
        ("reproduce", ["figur=2"], "there is no option figur; did you mean figure?"),
    ],
)
def test_mistakes_get_one_line(name, overrides, message, digits_run, tmp_path, capsys):
    overrides = [override.replace("BEST", f"{digits_run}/best.ckpt") for override in overrides]
    folder = tmp_path / "run"
    line, code = refused(capsys, name, *overrides, f"hydra.run.dir={folder}")
    assert message in line
    assert code == 2
    assert not [path for path in folder.glob("*") if path.suffix in (".png", ".npy", ".json", ".csv")]


def test_a_damaged_file_and_one_that_is_not_ours_are_refused(digits_run, tmp_path, capsys):
    whole = (digits_run / "best.ckpt").read_bytes()
    for name, content in (("empty", b""), ("cut", whole[: len(whole) // 2]), ("text", b"not a checkpoint")):
        (tmp_path / name).write_bytes(content)
        line, code = refused(capsys, "evaluate", f"ckpt_path={tmp_path / name}", f"hydra.run.dir={tmp_path / 'run'}")
        assert "is damaged or not a checkpoint of a run of ours" in line
        assert code == 2
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.ckpt")
    line, _ = refused(capsys, "sample", f"ckpt_path={tmp_path}/foreign.ckpt", f"hydra.run.dir={tmp_path / 'run'}")
    assert "carries no configuration" in line


def changed(run, path, change):
    checkpoint = load_checkpoint(str(run / "best.ckpt"))
    change(checkpoint)
    torch.save(checkpoint, path)
    return f"ckpt_path={path}"


@pytest.mark.parametrize(
    ("where", "target"),
    [
        (("dataset",), "os.system"),
        (("dataset", "source"), "rnode.data.download"),
        (("model",), "rnode.data.np.load"),
        (("solver", "test"), "builtins.exec"),
        (("solver",), "rnode"),
    ],
)
def test_a_checkpoints_configuration_can_build_nothing_but_what_conf_names(where, target, digits_run, tmp_path, capsys):
    def change(checkpoint):
        section = checkpoint["config"]
        for key in where:
            section = section[key]
        section["_target_"] = target

    path = changed(digits_run, tmp_path / "bad.ckpt", change)
    line, code = refused(capsys, "evaluate", path, f"hydra.run.dir={tmp_path / 'run'}")
    assert f"would call {target}, which is not of this project" in line
    assert code == 2


@pytest.mark.parametrize("hide", ["deep", "text", "section", "weights", "type"])
def test_a_configuration_that_is_not_plain_or_not_whole_is_refused(hide, digits_run, tmp_path, capsys):
    def change(checkpoint):
        config = checkpoint["config"]
        if hide == "deep":
            config["dataset"]["size"] = [{"x": {"_target_": "os.system"}}]
        elif hide == "text":
            config["dataset"]["test"] = "${oc.env:HOME}"
        elif hide == "section":
            del config["solver"]
        elif hide == "weights":
            checkpoint["state_dict"] = {}
        else:
            config["model"] = "multiscale"

    path = changed(digits_run, tmp_path / "bad.ckpt", change)
    _, code = refused(capsys, "evaluate", path, f"hydra.run.dir={tmp_path / 'run'}")
    assert code == 2


def test_a_finished_or_interrupted_run_goes_on_in_its_own_folder(tmp_path):
    """ckpt_path=auto: one metrics.csv, every epoch in it once, and what was trained before is not trained again."""
    small = ["model.hidden=4", "model.pieces=1", "dataset.batch_size=256", "trainer.log_every_n_steps=1"]
    quiet = ["trainer.enable_progress_bar=false", "wandb.mode=disabled", "ckpt_path=auto", *small]
    call("train", *quiet, "trainer.max_epochs=1", f"hydra.run.dir={tmp_path / 'cut'}")
    call("train", *quiet, "trainer.max_epochs=2", f"hydra.run.dir={tmp_path / 'cut'}")
    call("train", *quiet, "trainer.max_epochs=2", f"hydra.run.dir={tmp_path / 'whole'}")
    cut, whole = (column(tmp_path / name, "train/loss") for name in ("cut", "whole"))
    assert len(cut) == len(whole) > 8
    assert cut[:5] == pytest.approx(whole[:5], rel=1e-5)
    assert cut[5] < cut[0] - 0.3
    for key in ("val/bits_per_dim", "test/bits_per_dim", "train/seconds_per_epoch"):
        assert len(column(tmp_path / "cut", key)) == len(column(tmp_path / "whole", key)), key
    assert [row["epoch"] for row in metrics(tmp_path / "cut") if row["val/bits_per_dim"]] == ["0", "1"]


def test_a_sweep_goes_on_after_a_run_that_diverged(tmp_path, capsys):
    arguments = [*QUICK, "model.pieces=1", "dataset.batch_size=256", "wandb.mode=disabled", "trainer.log_every_n_steps=1"]
    with pytest.raises(SystemExit) as stop:
        call("train", "-m", *arguments, "optimizer.lr=1e6,1e-3", f"hydra.sweep.dir={tmp_path}")
    assert stop.value.code == 1
    assert "training step" in capsys.readouterr().err
    assert "last good checkpoint" in (tmp_path / "0" / "diverged.txt").read_text()
    assert column(tmp_path / "1", "test/bits_per_dim")


def make_run(folder, recipe, seed, bits, seconds, *, diverged=False, data="digits"):
    """A finished run as its folder would have it."""
    run = Run(data, recipe, seed, (), folder / f"{data}_{recipe}_{seed}")
    run.folder.mkdir(parents=True)
    keys = ["epoch", "step", "val/bits_per_dim", "train/seconds_per_epoch", "train/nfe_forward", "train/jacobian"]
    keys += ["train/kinetic", "test/bits_per_dim", "test/nfe_forward"]
    with open(run.folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        for epoch, value in enumerate(bits):
            writer.writerow({"epoch": epoch, "step": epoch, "val/bits_per_dim": value})
            curves = {"train/nfe_forward": 100 + epoch, "train/jacobian": 1 + epoch, "train/kinetic": 2}
            writer.writerow({"epoch": epoch, "step": epoch, **curves})
            writer.writerow({"epoch": epoch, "step": epoch, "train/seconds_per_epoch": seconds})
        if not diverged:
            last = {"test/bits_per_dim": bits[-1], "test/nfe_forward": 150}
            writer.writerow({"epoch": len(bits), "step": len(bits), **last})
    if not diverged:
        (run.folder / "result.json").write_text(json.dumps({"test/bits_per_dim": bits[-1]}))
    if diverged:
        (run.folder / "diverged.txt").write_text("the loss became NaN")
    return run


def test_how_much_sooner_is_read_off_the_curves(tmp_path):
    slow = make_run(tmp_path, "ffjord", 0, [4.0, 3.0, 2.0], 10)
    fast = make_run(tmp_path, "fast", 0, [3.0, 2.0, 1.5], 2)
    never = make_run(tmp_path, "kinetic", 0, [4.0, 3.5, 3.0], 2)
    assert slow.seconds == [10, 20, 30]
    assert slow.seconds_to(2.5) == pytest.approx(25)
    assert fast.seconds_to(3.0) == 2
    assert never.seconds_to(2.5) is None
    ratios = sooner([slow, fast, never])
    # Both to 2.01: FFJORD between 20 and 30 s, the other between 2 and 4.
    assert ratios["fast"] == [pytest.approx(29.9 / 3.98)]
    assert ratios["kinetic"] == [0.0]


def test_figures_and_table_are_drawn_from_runs(tmp_path):
    runs = [
        make_run(tmp_path, recipe, seed, [4.0, 3.0, 2.0 + 0.01 * seed], seconds)
        for recipe, seconds in (("ffjord", 30), ("rnode", 8), ("fast", 5))
        for seed in (0, 1)
    ]
    ended = make_run(tmp_path, "unregularized", 0, [3.5, 3.2], 8, diverged=True)
    assert ended.over
    assert not ended.finished
    for name, needed in (("figure2", runs), ("figure3", runs[:1]), ("figure4", [ended, runs[2]]), ("table1", runs)):
        verdict = KNOWN[name].draw(needed, tmp_path / name)
        assert verdict.startswith("The paper's claim"), name
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert (tmp_path / f"{name}.csv").stat().st_size > 30
    with open(tmp_path / "table1.csv", newline="") as file:
        rows = {row["flow"]: row for row in csv.DictReader(file)}
    assert rows["RNODE, our default (auto)"]["FFJORD's time / this"] == "6.00 (6.00 – 6.00)"
    assert rows["FFJORD (dopri5)"]["test bits/dim"] == "2.0050 ± 0.0071"
    assert rows["RNODE (published)"]["test bits/dim"] == "3.38"
    assert "6.00 (6.00 – 6.00) times sooner" in KNOWN["table1"].draw(runs, tmp_path / "table1")


def test_every_figure_names_runs_that_train_can_make(tmp_path):
    recipes = {file.stem for file in (cli.CONF / "recipe").glob("*.yaml")}
    for name, figure in KNOWN.items():
        for scale in paper.SCALES:
            runs = figure.runs(scale, tmp_path)
            assert {run.recipe for run in runs} <= recipes, name
            assert {run.data for run in runs} <= set(paper.DATA), name
            assert len({run.folder for run in runs}) == len(runs), name


@pytest.mark.slow  # two training runs in their own processes
def test_a_figure_from_nothing_and_again_from_its_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(paper.DATA, "line", [*paper.DATA["line"], "trainer.max_epochs=1", "dataset.train=4000"])
    folder = tmp_path / "small"
    call("reproduce", "figure=1", f"hydra.run.dir={folder}")
    assert "The paper's claim" in capsys.readouterr().out
    assert Image.open(folder / "figure1.png").size[0] > 800
    written = {path: path.stat().st_mtime_ns for path in (folder / "runs").glob("*/metrics.csv")}
    assert len(written) == 2
    (folder / "figure1.png").unlink()
    call("reproduce", "figure=1", f"hydra.run.dir={folder}")
    assert (folder / "figure1.png").exists()
    assert written == {path: path.stat().st_mtime_ns for path in (folder / "runs").glob("*/metrics.csv")}
