"""The commands evaluate and sample, on models that the command train has trained for seconds."""

import json

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

import rnode
from helpers import call, column, make_flow, refused
from rnode.app.sample import interpolate
from rnode.data.datamodule import DataModule
from rnode.data.densities import DENSITIES
from rnode.data.images import digits


def evaluate(folder, run, *overrides):
    call("evaluate", f"ckpt_path={run}/best.ckpt", f"hydra.run.dir={folder}", *overrides)
    return json.loads((folder / "evaluation.json").read_text())


def test_an_evaluation_agrees_with_the_test_of_the_run(digits_run, tmp_path, capsys):
    summary = evaluate(tmp_path, digits_run, "samples=3")
    printed = capsys.readouterr().out
    for name, key in {
        "bits_per_dim": "bits_per_dim",
        "standard_error_images": "bits_per_dim_se",
        "kinetic": "kinetic",
        "jacobian": "jacobian",
        "nfe": "nfe_forward",
    }.items():
        assert summary[name] == pytest.approx(column(digits_run, f"test/{key}")[0], abs=2e-5), name
    assert sum(summary["nfe_by_piece"]) == pytest.approx(summary["nfe"])
    assert 0 < summary["standard_error_probes"] < summary["standard_error_images"]
    assert len(summary["bound_by_noises"]) == 3
    assert summary["bound_by_noises"][0] == pytest.approx(summary["bits_per_dim"])
    assert summary["bound"] < summary["bits_per_dim"] + summary["standard_error_probes"]
    assert summary["divergence"] == "1 gaussian probe(s) a sample"
    assert (summary["split"], summary["seed"], summary["dimensions"]) == ("test", 0, 64)
    text = (tmp_path / "evaluation.txt").read_text(encoding="utf-8")
    bits, error = summary["bits_per_dim"], summary["standard_error_images"]
    nats = 64 * np.log(2)
    for cell in (
        f"{bits * nats:.3f} ± {error * nats:.3f}",
        f"{summary['bound']:.4f} ± {summary['bound_standard_error']:.4f}",
        "bound, 3 noises",
        f"{summary['nfe']:.1f} ({summary['nfe_min']} – {summary['nfe_max']})",
    ):
        assert cell in text
        assert cell in printed
    frame = pl.read_csv(tmp_path / "samples.csv")
    assert frame["index"].to_list() == list(range(40))
    assert frame["bits_per_dim"].mean() == pytest.approx(bits)
    assert frame["bound"].mean() == pytest.approx(summary["bound"])
    assert Image.open(tmp_path / "extremes.png").size[0] > 600


def test_an_evaluation_takes_another_split_solver_and_seed(digits_run, tmp_path):
    summary = evaluate(tmp_path / "val", digits_run, "samples=1", "split=val")
    best = min(column(digits_run, "val/bits_per_dim"))
    assert summary["bits_per_dim"] == pytest.approx(best, abs=2e-5)
    summary = evaluate(tmp_path / "rk4", digits_run, "samples=1", "solver=rk4")
    assert summary["solver"]["method"] == "rk4"
    assert summary["nfe"] == 16 * 3
    finer = ["solver.test.method=rk4", "solver.test.steps=8", "solver.dtype=float64"]
    summary = evaluate(tmp_path / "finer", digits_run, *finer, "dataset.eval_batch_size=7")
    assert summary["nfe"] == 32 * 3
    test = column(digits_run, "test/bits_per_dim")[0]
    assert summary["bits_per_dim"] == pytest.approx(test, abs=2e-3)
    other = ["seed=1", "divergence=rademacher", "probes=2"]
    summary = evaluate(tmp_path / "other", digits_run, *other)
    assert summary["divergence"] == "2 rademacher probe(s) a sample"
    assert 1e-5 < abs(summary["bits_per_dim"] - test) < 0.2


def test_a_narrow_table_is_evaluated_exactly_and_has_no_bound(toy_run, tmp_path):
    summary = evaluate(tmp_path, toy_run, "probes=2")
    assert summary["divergence"] == "exact"
    assert summary["standard_error_probes"] == 0
    assert "bound" not in summary
    assert "noises" not in (tmp_path / "evaluation.txt").read_text(encoding="utf-8")
    assert not (tmp_path / "extremes.png").exists()


def energy_distance(a, b):
    between, within_a, within_b = (
        np.linalg.norm(x[:, None] - y[None], axis=2).mean() for x, y in ((a, b), (a, a), (b, b))
    )
    return 2 * between - within_a - within_b


def two_sample_p(a, b, rng, permutations=200):
    """p-value of the energy distance under permutations of the pooled points."""
    pooled = np.concatenate([a, b])
    splits = (np.split(rng.permutation(pooled), [len(a)]) for _ in range(permutations))
    larger = sum(energy_distance(*split) >= energy_distance(a, b) for split in splits)
    return (larger + 1) / (permutations + 1)


def test_samples_of_a_trained_flow_pass_a_two_sample_test(toy_run, tmp_path):
    call("sample", f"ckpt_path={toy_run}/best.ckpt", "n=250", f"hydra.run.dir={tmp_path}")
    frame = pl.read_csv(tmp_path / "samples.csv")
    assert frame.columns == ["x1", "x2"]
    rng = np.random.default_rng(0)
    data = DENSITIES["moons"](250, rng)
    assert two_sample_p(frame.to_numpy(), data, rng) > 0.01
    assert two_sample_p(rng.standard_normal((250, 2)), data, rng) < 0.01
    same = rnode.load(toy_run).sample(250)
    np.testing.assert_allclose(frame.to_numpy(), same.to_numpy(), rtol=1e-5, atol=1e-5)
    for name in ("plane.png", "samples.png"):
        assert Image.open(tmp_path / name).size[0] > 400


def test_a_density_trained_on_2d_data_integrates_to_one(toy_run):
    flow = rnode.load(toy_run / "last.ckpt").flow
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


def test_an_interpolation_is_an_arc_in_z_between_two_images_and_their_conditions():
    data = DataModule(digits, 20, 20, context="label")
    data.setup()
    flow = make_flow((1, 8, 8), k=10, pieces=1).eval()
    with torch.no_grad():
        images = interpolate(flow, data, [5, 359])
        x, index, c = data.fetch("test", [5, 359])
        z = flow(data.transform(x, index, c, torch.full(x.shape, 0.5)).y, c).z
        middle = flow.inverse(z.sum(0, keepdim=True) / 2**0.5, c.mean(0))
    assert not torch.equal(*c)
    # A pixel of grey level g is at the centre of its bin.
    torch.testing.assert_close(images[[0, -1]], (x + 0.5) / 17, rtol=0, atol=1e-3)
    middle = data.transform.inverse(middle).float()
    torch.testing.assert_close(images[5:6], middle, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("command", "overrides", "words"),
    [
        ("evaluate", [], "ckpt_path"),
        ("evaluate", ["nowhere.ckpt"], "there is no such file"),
        ("evaluate", ["TOY", "split=train"], "split=train: must be val or test"),
        ("evaluate", ["DIGITS", "dataset.root=elsewhere"], "dataset.root"),
        ("evaluate", ["DIGITS", "solver.train.method=rk4"], "solver.train.method"),
        ("sample", ["DIGITS", "temperature=-1"], "temperature=-1: must be at least 0"),
        ("sample", ["DIGITS", "interpolate=[0,40]"], "[0, 40]: must be two indices of test images"),
        ("sample", ["TOY", "interpolate=[0,1]"], "interpolate=[0, 1]: needs a flow of images"),
        ("sample", ["TOY", "context.city=Oslo"], "context.city: the conditions are none"),
    ],
)
def test_mistakes_get_one_line(command, overrides, words, digits_run, toy_run, tmp_path, capsys):
    paths = {"DIGITS": f"{digits_run}/best.ckpt", "TOY": f"ckpt_path={toy_run}/best.ckpt"}
    overrides = [paths.get(override, override) for override in overrides]
    line, code = refused(capsys, command, *overrides, f"hydra.run.dir={tmp_path}")
    assert words in line
    assert code == 2
    assert not [path for path in tmp_path.glob("*") if path.suffix in (".png", ".npy", ".json")]
