"""The commands evaluate and sample, on models that the command train has trained for seconds."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import call, column, refused
from rnode.app.build import load_flow
from rnode.data.densities import DENSITIES


def evaluate(folder, run, *overrides):
    call("evaluate", f"ckpt_path={run}/best.ckpt", f"hydra.run.dir={folder}", *overrides)
    return json.loads((folder / "evaluation.json").read_text())


def test_an_evaluation_agrees_with_the_test_of_the_run(digits_run, tmp_path, capsys):
    summary = evaluate(tmp_path, digits_run, "samples=3")
    out = capsys.readouterr().out
    for name in ("bits_per_dim", "kinetic", "jacobian"):
        tested = column(digits_run, f"test/{name}")[0]
        assert summary[name] == pytest.approx(tested, abs=2e-5), name
    error = column(digits_run, "test/bits_per_dim_se")[0]
    assert summary["standard_error_images"] == pytest.approx(error, abs=2e-5)
    assert summary["nfe"] == pytest.approx(column(digits_run, "test/nfe_forward")[0])
    assert sum(summary["nfe_by_piece"]) == pytest.approx(summary["nfe"])
    assert 0 < summary["standard_error_probes"] < summary["standard_error_images"]
    assert summary["bound"] < summary["bits_per_dim"] + summary["standard_error_probes"]
    assert len(summary["bound_by_noises"]) == 3
    assert summary["divergence"] == "1 gaussian probe(s) a sample"
    assert summary["transport_cost"] > 0
    assert 0 < summary["straightness"] < 1
    assert summary["inverse_error"] < 1e-2
    for text in ("bound, 3 noises", "no bound", "over probes", "NFE by piece", "straightness"):
        assert text in out
        assert text in (tmp_path / "evaluation.txt").read_text(encoding="utf-8")
    with open(tmp_path / "samples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(int(row["index"]) for row in rows) == list(range(40))
    bits = [float(row["bits_per_dim"]) for row in rows]
    assert np.mean(bits) == pytest.approx(summary["bits_per_dim"])
    assert Image.open(tmp_path / "extremes.png").size[0] > 600


def test_an_evaluation_takes_another_split_solver_and_seed(digits_run, tmp_path):
    summary = evaluate(tmp_path / "val", digits_run, "samples=1", "split=val")
    best = min(column(digits_run, "val/bits_per_dim"))
    assert summary["bits_per_dim"] == pytest.approx(best, abs=2e-5)
    summary = evaluate(tmp_path / "rk4", digits_run, "samples=1", "solver=rk4")
    assert summary["solver"]["method"] == "rk4"
    assert summary["nfe"] == 16 * 3
    finer = ["solver.test.method=rk4", "solver.test.step_size=0.125", "solver.dtype=float64"]
    finer += ["samples=1", "dataset.eval_batch_size=7"]
    summary = evaluate(tmp_path / "finer", digits_run, *finer)
    assert summary["nfe"] == 32 * 3
    test = column(digits_run, "test/bits_per_dim")[0]
    assert summary["bits_per_dim"] == pytest.approx(test, abs=2e-3)
    other = ["samples=1", "seed=1", "divergence=rademacher", "probes=2"]
    summary = evaluate(tmp_path / "other", digits_run, *other)
    assert summary["divergence"] == "2 rademacher probe(s) a sample"
    assert 1e-5 < abs(summary["bits_per_dim"] - test) < 0.2


def test_vectors_are_evaluated_exactly_and_have_no_bound(toy_run, tmp_path):
    summary = evaluate(tmp_path, toy_run)
    assert summary["divergence"] == "exact"
    assert summary["standard_error_probes"] == 0
    assert "bound" not in summary
    assert "midpoint" not in summary
    assert (tmp_path / "extremes.png").exists()


def distances(a, b):
    return np.linalg.norm(a[:, None] - b[None], axis=2)


def energy_distance(a, b):
    return 2 * distances(a, b).mean() - distances(a, a).mean() - distances(b, b).mean()


def two_sample_p(a, b, rng, permutations=200):
    """p-value of the energy distance under permutations of the pooled points."""
    pooled, observed = np.concatenate([a, b]), energy_distance(a, b)
    larger = 0
    for _ in range(permutations):
        order = rng.permutation(len(pooled))
        first, second = pooled[order[: len(a)]], pooled[order[len(a) :]]
        larger += energy_distance(first, second) >= observed
    return (larger + 1) / (permutations + 1)


def test_samples_of_a_trained_flow_pass_a_two_sample_test(toy_run, tmp_path):
    call("sample", f"ckpt_path={toy_run}/best.ckpt", "n=250", f"hydra.run.dir={tmp_path}")
    samples, rng = np.load(tmp_path / "samples.npy"), np.random.default_rng(0)
    assert samples.shape == (250, 2)
    data = DENSITIES["moons"](250, rng)
    assert two_sample_p(samples, data, rng) > 0.01
    untrained = rng.standard_normal((250, 2))
    assert two_sample_p(untrained, data, rng) < 0.01
    assert Image.open(tmp_path / "plane.png").size[0] > 600
    assert (tmp_path / "samples.png").exists()


def test_a_density_trained_on_2d_data_integrates_to_one(toy_run):
    _, flow = load_flow(str(toy_run / "last.ckpt"))
    side = torch.linspace(-6, 6, 241)
    points = torch.from_numpy(DENSITIES["moons"](2000, np.random.default_rng(5))).float()
    with torch.no_grad():
        density = flow.log_prob(torch.cartesian_prod(side, side)).exp()
        untrained = torch.distributions.Normal(0, 1).log_prob(points).sum(1)
        gained = flow.log_prob(points).mean() - untrained.mean()
    assert gained > 0.3
    assert density.sum() * (side[1] - side[0]) ** 2 == pytest.approx(1, abs=0.003)


def test_samples_of_images_with_trajectory_and_interpolation(digits_run, tmp_path, capsys):
    a, b, c = (tmp_path / name for name in "abc")
    arguments = [f"ckpt_path={digits_run}/best.ckpt", "n=10", "dataset.eval_batch_size=4"]
    pictures = ["trajectory=true", "interpolate=[0,1]"]
    call("sample", *arguments, *pictures, f"hydra.run.dir={a}")
    assert "10 samples, NFE" in capsys.readouterr().out
    samples = np.load(a / "samples.npy")
    assert samples.shape == (10, 1, 8, 8)
    assert samples.dtype == np.uint8
    assert samples.max() < 17
    with Image.open(a / "trajectory.gif") as animation:
        assert animation.n_frames == 37
    assert Image.open(a / "strip.png").size[0] > 400
    width, height = Image.open(a / "interpolation.png").size
    assert width > 5 * height
    call("sample", *arguments, f"hydra.run.dir={b}")
    assert np.array_equal(samples, np.load(b / "samples.npy"))
    assert not (b / "trajectory.gif").exists()
    call("sample", *arguments, "seed=1", "temperature=0.5", "solver=rk4", f"hydra.run.dir={c}")
    assert not np.array_equal(samples, np.load(c / "samples.npy"))
    assert "NFE 48.0 a batch by rk4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "overrides", "words"),
    [
        ("evaluate", [], "ckpt_path"),
        ("evaluate", ["ckpt_path=nowhere.ckpt"], "there is no such file"),
        ("evaluate", ["nowhere.ckpt"], "there is no such file"),
        ("evaluate", ["DIGITS", "split=tset"], "split=tset: must be 'test', 'val' or 'train'"),
        ("evaluate", ["TOY", "split=train"], "split=train: must be val or test"),
        ("evaluate", ["DIGITS", "samples=0"], "samples=0: must be at least 1"),
        ("evaluate", ["DIGITS", "dataset.eval_batch_size=0"], "dataset.eval_batch_size=0"),
        ("evaluate", ["DIGITS", "dataset.root=elsewhere"], "dataset.root"),
        ("evaluate", ["DIGITS", "solver.train.method=rk4"], "solver.train.method"),
        ("evaluate", ["DIGITS", "solver.test.method=rk5"], "solver.test.method=rk5"),
        ("evaluate", ["DIGITS", "solver.test.metod=rk4"], "solver.test.metod"),
        ("evaluate", ["DIGITS", "+sampels=3"], "sampels"),
        ("sample", ["DIGITS", "temperature=-1"], "temperature=-1: must be at least 0"),
        ("sample", ["DIGITS", "interpolate=[0,400]"], "interpolate=[0, 400]: must be two indices"),
        ("sample", ["DIGITS", "interpolate=7"], "interpolate=7"),
        ("sample", ["TOY", "interpolate=[0,1]"], "interpolate=[0, 1]: must be left out"),
    ],
)
def test_mistakes_get_one_line(command, overrides, words, digits_run, toy_run, tmp_path, capsys):
    paths = {"DIGITS": f"{digits_run}/best.ckpt", "TOY": f"ckpt_path={toy_run}/best.ckpt"}
    overrides = [paths.get(override, override) for override in overrides]
    line, code = refused(capsys, command, *overrides, f"hydra.run.dir={tmp_path}")
    assert words in line
    assert code == 2
    assert not [path for path in tmp_path.glob("*") if path.suffix in (".png", ".npy", ".json")]
