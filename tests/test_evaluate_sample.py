"""The commands evaluate and sample, on models that the command train has trained for seconds."""

import json
import re
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image, ImageSequence

import rnode
from helpers import ROOT, call, column, refused
from rnode import Method
from rnode.data.densities import DENSITIES
from rnode.training.plots import plot_trajectory


def test_the_flow_in_assets_samples_clothing(tmp_path):
    """The likelihood of the samples is near that of validation images."""
    path = ROOT / "assets" / "fashion_mnist.ckpt"
    call("sample", str(path), f"hydra.run.dir={tmp_path}")
    samples = np.load(tmp_path / "samples.npy")
    assert samples.shape == (64, 1, 14, 14)
    density = rnode.load(path)
    held_out = float(density.validation_bits_.mean())
    assert held_out < 3.6  # a Gaussian has 4.57
    bits = -density.log_prob(samples) / (196 * np.log(2))
    assert bits.mean() == pytest.approx(held_out, abs=0.6)


def evaluate(folder, run, *overrides):
    call("evaluate", f"ckpt_path={run}/best.ckpt", f"hydra.run.dir={folder}", *overrides)
    return json.loads((folder / "evaluation.json").read_text())


def test_an_evaluation_agrees_with_the_test_of_the_run(digits_run, tmp_path, capsys):
    summary = evaluate(tmp_path, digits_run, "samples=3")
    printed = capsys.readouterr().out
    names = {name: name for name in ("bits_per_dim", "kinetic", "jacobian")}
    names |= {"standard_error_images": "bits_per_dim_se", "nfe": "nfe_forward"}
    for name, key in names.items():
        assert summary[name] == pytest.approx(column(digits_run, f"test/{key}")[0], abs=2e-5), name
    assert sum(summary["nfe_by_piece"]) == pytest.approx(summary["nfe"])
    assert 0 < summary["standard_error_probes"] < summary["standard_error_images"]
    assert len(summary["bound_by_noises"]) == 3
    assert summary["bound_by_noises"][0] == pytest.approx(summary["bits_per_dim"])
    assert summary["bound"] < summary["bits_per_dim"] + summary["standard_error_probes"]
    assert summary["divergence"] == "1 gaussian probe(s) a sample"
    assert (summary["split"], summary["seed"], summary["dimensions"]) == ("test", 0, 64)
    for name in ("bits_per_dim", "standard_error_images", "bound", "midpoint", "nfe_max"):
        assert re.search(rf"{name} .* {summary[name]:.5g} ", printed)
    frame = pl.read_csv(tmp_path / "samples.csv")
    assert frame["index"].to_list() == list(range(40))
    for name in ("bits_per_dim", "bound"):
        assert frame[name].mean() == pytest.approx(summary[name])
    assert Image.open(tmp_path / "extremes.png").size[0] > 600


def test_an_evaluation_takes_another_split_solver_and_seed(digits_run, tmp_path):
    summary = evaluate(tmp_path / "val", digits_run, "samples=1", "split=val")
    best = min(column(digits_run, "val/bits_per_dim"))
    assert summary["bits_per_dim"] == pytest.approx(best, abs=2e-5)
    finer = ["solver.test.method=rk4", "solver.test.steps=8", "solver.dtype=float64"]
    summary = evaluate(tmp_path / "finer", digits_run, *finer, "dataset.eval_batch_size=7")
    assert summary["solver"]["method"] == "rk4"
    assert summary["nfe"] == 32 * 3
    test = column(digits_run, "test/bits_per_dim")[0]
    assert summary["bits_per_dim"] == pytest.approx(test, abs=2e-3)
    other = ["seed=1", "divergence=rademacher", "probes=2"]
    summary = evaluate(tmp_path / "other", digits_run, *other)
    assert summary["divergence"] == "2 rademacher probe(s) a sample"
    assert 1e-5 < abs(summary["bits_per_dim"] - test) < 0.2


def test_many_samples_take_a_grid_that_agrees_with_dopri5_and_scores_do_not(digits_run):
    found = {}
    for method in (Method("auto"), Method("dopri5")):
        density = rnode.load(digits_run)
        density.flow_.solver = replace(density.flow_.solver, test=method)
        images = density.sample(70, seed=0).astype(float)
        bits = density.bits_per_dim(rnode.load(digits_run).sample(70, seed=1))
        found[method.method] = (density.agreement_, images, bits)
    words, images, bits = found["auto"]
    assert words.startswith("rk4 with ")
    assert found["dopri5"][0] == "dopri5"
    assert abs(images - found["dopri5"][1]).mean() < 0.05  # of 17 grey levels
    np.testing.assert_array_equal(bits, found["dopri5"][2])


def energy_distance(a, b):
    pairs = ((a, b), (a, a), (b, b))
    between, *within = (np.linalg.norm(x[:, None] - y[None], axis=2).mean() for x, y in pairs)
    return 2 * between - sum(within)


def test_samples_of_a_trained_flow_are_distributed_as_its_data(toy_run, tmp_path):
    call("sample", f"ckpt_path={toy_run}/best.ckpt", "n=250", f"hydra.run.dir={tmp_path}")
    frame = pl.read_csv(tmp_path / "samples.csv")
    assert frame.columns == ["x1", "x2"]
    rng = np.random.default_rng(0)
    data = DENSITIES["moons"](250, rng)
    assert energy_distance(frame.to_numpy(), data) < 0.05
    assert energy_distance(rng.standard_normal((250, 2)), data) > 0.05
    same = rnode.load(toy_run).sample(250, seed=0)
    np.testing.assert_allclose(frame.to_numpy(), same.to_numpy(), rtol=1e-5, atol=1e-5)
    assert Image.open(tmp_path / "samples.png").size[0] > 400


def test_a_density_in_the_plane_is_exact_and_integrates_to_one(toy_run, tmp_path):
    summary = evaluate(tmp_path, toy_run, "probes=2")
    assert (summary["divergence"], summary["standard_error_probes"]) == ("exact", 0)
    assert "bound" not in summary
    flow = rnode.load(toy_run / "last.ckpt").flow_
    side = torch.linspace(-6, 6, 241)
    points = torch.from_numpy(DENSITIES["moons"](2000, np.random.default_rng(5))).float()
    with torch.no_grad():
        density = flow.log_prob(torch.cartesian_prod(side, side)).exp()
        untrained = torch.distributions.Normal(0, 1).log_prob(points).sum(1)
        gained = flow.log_prob(points).mean() - untrained.mean()
    assert gained > 0.3
    assert density.sum() * (side[1] - side[0]) ** 2 == pytest.approx(1, abs=0.003)


def test_samples_of_images_and_their_animation(digits_run, tmp_path):
    def sample(name, *overrides):
        options = ["n=10", "dataset.eval_batch_size=4", f"hydra.run.dir={tmp_path / name}"]
        call("sample", f"ckpt_path={digits_run}/best.ckpt", *options, *overrides)
        return np.load(tmp_path / name / "samples.npy")

    samples = sample("a", "trajectory=true")
    assert samples.shape == (10, 1, 8, 8)
    assert samples.dtype == np.uint8
    assert samples.max() < 17
    with Image.open(tmp_path / "a" / "trajectory.gif") as animation:
        assert animation.n_frames == 48
    assert np.array_equal(samples, sample("b"))
    assert not (tmp_path / "b" / "trajectory.gif").exists()
    other = sample("c", "seed=1", "temperature=0.5", "solver.test.method=rk4")
    assert not np.array_equal(samples, other)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_animation_has_a_steady_speed_and_holds_its_last_frame(channels, tmp_path):
    heights = torch.tensor([0, 0.1, 0.7, 0.75, 0.75, 1])  # grey levels of the solver's frames
    plot_trajectory(heights.view(-1, 1, 1, 1, 1).expand(-1, 2, channels, 4, 4), tmp_path)
    levels, durations = [], []
    with Image.open(tmp_path / "trajectory.gif") as animation:
        assert 600 < animation.width < 900
        for frame in ImageSequence.Iterator(animation):
            levels.append(np.asarray(frame.convert("RGB"))[100, 100])
            durations.append(frame.info["duration"])
    steady = np.linspace(0, 255, 48).repeat(3).reshape(48, 3)
    np.testing.assert_allclose(levels, steady, atol=0.51)
    assert durations == [60] * 47 + [2000]


@pytest.mark.parametrize(
    ("command", "overrides", "words"),
    [
        ("evaluate", [], "ckpt_path"),
        ("evaluate", ["TOY", "split=train"], "split=train: Input should be"),
        ("evaluate", ["DIGITS", "dataset.root=elsewhere"], "dataset.root"),
        ("evaluate", ["DIGITS", "solver.train.method=rk4"], "no option solver.train"),
        ("sample", ["TOY", "context.city=Oslo"], "context.city: the conditions are none"),
    ],
)
def test_mistakes_get_one_line(command, overrides, words, digits_run, toy_run, tmp_path, capsys):
    paths = {"DIGITS": f"{digits_run}/best.ckpt", "TOY": f"ckpt_path={toy_run}/best.ckpt"}
    overrides = [paths.get(override, override) for override in overrides]
    assert words in refused(capsys, command, *overrides, f"hydra.run.dir={tmp_path}")
    assert not [path for path in tmp_path.glob("*") if path.suffix in (".png", ".npy", ".json")]
