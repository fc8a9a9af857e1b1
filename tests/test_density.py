"""A trained density from Python, and the commands that score and sample."""

import copy
import re

import numpy as np
import polars as pl
import pytest
import torch

import rnode
from helpers import call
from rnode import InputError

pytestmark = pytest.mark.usefixtures("blank_figures")

QUIET = ["trainer.enable_progress_bar=false", "logger=csv", "trainer.accelerator=cpu"]
MEAN, SPREAD = {"low": -2.0, "high": 3.0}, {"low": 0.5, "high": 1.5}


@pytest.fixture(scope="module")
def rows():
    """A normal column given a label, and one whose mean is linear in a number."""
    rng, n = np.random.default_rng(0), 6000
    level, slope = rng.choice(["low", "high"], n), rng.uniform(-1, 1, n)
    a = np.array([MEAN[v] + SPREAD[v] * e for v, e in zip(level, rng.normal(size=n), strict=True)])
    b = 50 + 20 * slope + 5 * rng.normal(size=n)
    return pl.DataFrame({"id": np.arange(n), "a": a, "b": b, "level": level, "slope": slope})


@pytest.fixture(scope="module")
def fitted(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted") / "run"
    names = {"columns": ["a", "b"], "context": ["level", "slope"]}
    # The temperature scales the noise of each component, and so z as a whole if there is one.
    overrides = ["trainer.max_epochs=20", "model.hidden=32", "base=gaussian", *QUIET]
    density = rnode.fit(rows, **names, max_time="01:00:00", folder=folder, overrides=overrides)
    return density, folder


def true_log_prob(rows):
    level, slope, a, b = (rows[name].to_numpy() for name in ("level", "slope", "a", "b"))
    mean, spread = (np.array([table[v] for v in level]) for table in (MEAN, SPREAD))
    z = torch.from_numpy(np.stack([(a - mean) / spread, (b - 50 - 20 * slope) / 5], 1))
    return (rnode.log_normal(z).numpy() - np.log(5 * spread)).astype(float)


def test_conditional_likelihood_and_samples_match_the_closed_form(fitted, rows):
    density, _ = fitted
    gap = true_log_prob(rows) - density.log_prob(rows)
    assert -0.02 < gap.mean() < 0.05  # the Kullback-Leibler divergence, in nats
    given = {"level": "high", "slope": 0.5}
    samples = density.sample(3000, given)
    assert samples.columns == density.columns_ == ["a", "b"]
    assert samples.mean().row(0) == pytest.approx((3.0, 60.0), rel=0.05)
    assert samples.select(pl.all().std()).row(0) == pytest.approx((1.5, 5.0), rel=0.1)
    halved = density.sample(3000, given, temperature=0.5)
    assert halved["b"].std() == pytest.approx(samples["b"].std() / 2, rel=0.05)


def test_a_loaded_density_scores_alike_and_exactly(fitted, rows):
    density, folder = fitted
    few = rows[:50]
    expected = density.log_prob(few)
    np.testing.assert_array_equal(rnode.load(folder).log_prob(few), expected)
    np.testing.assert_allclose(-expected / (2 * np.log(2)), density.bits_per_dim(few))
    assert density.evaluate(few)["standard_error"].tolist() == [0.0] * 50
    assert density.score(few) == pytest.approx(expected.mean())
    rows_and_cost = r"Density\(.*\): 2 columns, 4800 training rows, .* nats .*, .* seconds"
    assert re.fullmatch(rows_and_cost, repr(density), re.DOTALL)


def test_the_rank_is_the_share_of_validation_samples_that_are_more_likely(fitted, rows):
    density, _ = fitted
    assert 0.4 < density.rank(rows).mean() < 0.6
    bits = density.bits_per_dim(rows[:1])
    ranked = copy.copy(density)
    ranked.validation_bits_ = torch.tensor([-9.0, bits[0] - 1e-3, 9.0, 10.0])
    assert ranked.rank(rows[:1]).tolist() == [0.5]
    ranked.validation_bits_ = torch.zeros(0)
    assert np.isnan(ranked.rank(rows[:2])).all()


def test_pixels_are_checked_and_score_as_the_evaluation_does(digits_run):
    density = rnode.load(digits_run / "best.ckpt")
    density.data_.setup()
    test = density.data_.splits.test[:20]
    scores = density.evaluate(test)
    call("evaluate", str(digits_run), "samples=1", "hydra.run.dir=evaluation")
    evaluated = pl.read_csv("evaluation/samples.csv")["bits_per_dim"].to_numpy()[:20]
    half = np.abs(scores["bits_per_dim"] - evaluated)  # the mean is of this and other probes
    np.testing.assert_allclose(scores["standard_error"] / 64 / np.log(2), half, atol=1e-4)
    assert 1e-4 < half.max() < 0.05
    np.testing.assert_array_equal(density.bits_per_dim(test[:, 0].numpy()), scores["bits_per_dim"])
    np.save("test.npy", test)
    score = ("score", str(digits_run), "hydra.run.dir=scores")
    call(*score, "path=test.npy", "seed=1")
    other = density.set_params(seed=1).bits_per_dim(test)
    scored = pl.read_csv("scores/scores.csv")["bits_per_dim"]
    np.testing.assert_allclose(scored, other, rtol=1e-6)
    images = density.sample(3)
    assert density.columns_ is None
    assert images.dtype == np.uint8
    assert images.shape == (3, 1, 8, 8)
    for x in (test / 16, test + 1, -test.int(), test[:, :, :4]):
        with pytest.raises(InputError, match=r"must be \(N, \*\(1, 8, 8\)\) of .* from 0 to 16"):
            density.log_prob(x)


def test_the_commands_score_a_file_in_its_order_and_sample(fitted, rows, capsys):
    density, folder = fitted
    shuffled = rows[100:160].sample(fraction=1.0, shuffle=True, seed=1)
    shuffled.write_csv("new.csv")
    call("score", str(folder), "path=new.csv", "id=[id]", "hydra.run.dir=out")
    scores = pl.read_csv("out/scores.csv")
    assert scores.columns[:2] == ["row", "id"]
    assert scores["row"].to_list() == list(range(60))
    assert scores["id"].to_list() == shuffled["id"].to_list()
    expected = density.log_prob(shuffled)
    np.testing.assert_allclose(scores["log_prob"], expected, atol=1e-6)
    printed = capsys.readouterr().out
    for number in (expected.mean(), expected.min(), expected.max()):
        assert f"{number:.9f}"[:6] in printed
    given = {"level": "low", "slope": 0.25}
    values = [f"context.{name}={value}" for name, value in given.items()]
    call("sample", str(folder / "best.ckpt"), *values, "n=7", "hydra.run.dir=samples")
    frame = pl.read_csv("samples/samples.csv")
    assert frame.columns == ["a", "b", "level", "slope"]
    assert frame["level"].to_list() == ["low"] * 7
    np.testing.assert_allclose(frame["b"], density.sample(7, given, seed=0)["b"], rtol=1e-6)


@pytest.mark.parametrize("layers", [3, 4])
def test_tables_are_evaluated_without_an_error_of_probes(layers):
    rows = np.random.default_rng(0).normal(size=(200, 17))
    overrides = ["trainer.max_steps=1", "model.hidden=4", f"model.layers={layers}", *QUIET]
    density = rnode.fit(rows, overrides=overrides)
    assert density.flow_.exact
    assert not density.evaluate(rows[:9])["standard_error"].any()
