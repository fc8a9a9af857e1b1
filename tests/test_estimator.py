"""The estimator of scikit-learn, weights of rows, and what a score is due to."""

import copy
import json
import os
import pickle

import numpy as np
import polars as pl
import pytest
import torch
from matplotlib.figure import Figure
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import rnode
from helpers import call, metrics
from rnode import Density, InputError, State, objective
from rnode.data.closed_forms import fit_candidates, gaussian_bits
from rnode.data.datamodule import DataModule
from rnode.data.tables import table
from rnode.evaluation import standard_error, systematic

pytestmark = pytest.mark.usefixtures("blank_figures")

TINY = ["trainer.max_steps=2", "model.hidden=4", "trainer.accelerator=cpu", "base=gaussian"]
STILL = [*TINY, "optimizer.lr=0"]  # the density is that of its base
N = 300
X = np.random.default_rng(0).normal(size=(N, 2)) @ [[1.0, 0.5], [0.0, 2.0]] + 5
WEIGHTS = np.random.default_rng(1).integers(1, 5, N)
FAILS = {
    "check_dtype_object": "a cell that is no number is named, by a ValueError",
    "check_methods_subset_invariance": "a flow is solved in float32, to 1e-6 or so",
}


@pytest.mark.slow  # sixty fits
def test_scikit_learns_own_checks_pass():
    check_estimator(Density(overrides=TINY), expected_failed_checks=FAILS, on_skip=None)


def test_a_silent_fit_warns_of_what_it_leaves_out_and_guesses(capsys):
    frame = pl.DataFrame(X, ["a", "b"]).with_columns(pl.col("b").round(), city=pl.lit("Oslo"))
    with pytest.warns(UserWarning, match="noise of their unit: b"):
        Density(overrides=TINY).fit(frame)
    with pytest.warns(UserWarning, match=r"left out: city \(String\)"):
        Density(overrides=TINY).fit(frame)
    assert capsys.readouterr().out == ""


def test_columns_beside_x_do_not_replace_its_own():
    frame = pl.DataFrame(X, ["a", "sample_weight"])
    with pytest.raises(InputError, match="X: has a column sample_weight already; rename it"):
        Density(overrides=TINY).fit(frame, sample_weight=WEIGHTS)
    with pytest.raises(InputError, match="X: has a column a already; rename it"):
        Density(overrides=TINY).fit(frame, context={"a": WEIGHTS})


def test_a_pipeline_is_searched_over():
    pipeline = make_pipeline(StandardScaler(), Density(overrides=TINY))
    grid = {"density__overrides": [TINY, [*TINY, "model.layers=2"]]}
    search = GridSearchCV(pipeline, grid, cv=2).fit(X)
    assert search.best_score_ == pytest.approx(search.score(X), abs=0.4)
    assert search.score(X) == pytest.approx(search.best_estimator_.score_samples(X).mean())


@pytest.fixture(scope="module")
def density():
    """A flow of the distribution that X has if its rows count as WEIGHTS says."""
    frame = pl.DataFrame(X, ["a", "b"]).with_columns(b=pl.col("b").exp(), id=pl.int_range(N))
    fitted = rnode.fit(frame, columns=["a", "b"], log=["b"], sample_weight=WEIGHTS, overrides=STILL)
    return fitted, frame


def test_it_is_pickled_and_cloned_and_says_what_it_is(density, capsys):
    fitted, frame = density
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.log_prob(frame), fitted.score_samples(frame))
    assert fitted.score(frame, sample_weight=WEIGHTS) == pytest.approx(
        np.average(fitted.log_prob(frame), weights=WEIGHTS)
    )
    unfitted = clone(fitted)
    assert unfitted.get_params() == fitted.get_params()
    assert "2 columns, 240 training rows" in repr(fitted)
    assert "rows" not in repr(unfitted)
    for method in ("score", "plot", "sample", "contributions"):
        with pytest.raises(NotFittedError):
            getattr(unfitted, method)(frame)
    assert {"step", "val/seconds_total", "val/bits_per_dim"} <= set(fitted.history_.columns)
    for figure in (fitted.plot(), fitted.plot(frame), fitted.plot(n=9)):
        assert isinstance(figure, Figure)
        assert figure._repr_png_().startswith(b"\x89PNG")
    assert not os.listdir()
    assert capsys.readouterr().out == ""


def test_it_prints_if_it_is_asked_to_and_takes_a_context_beside_an_array(capsys):
    labels = np.where(X[:, 0] > 5, "high", "low")
    fitted = Density(verbose=True, overrides=TINY).fit(X, context={"level": labels})
    assert "test set" in capsys.readouterr().out
    assert fitted.n_features_in_ == 3
    low, high = (
        fitted.sample(99, {"level": level})["column_0"].mean() for level in ("low", "high")
    )
    assert low < 5 < high


def test_contributions_are_the_gradient_of_the_gaussian(density):
    """With s standardized and y = s W, ∇ log p is −W S⁻¹ (y − m), and −std for log|db/d log b|."""
    fitted, frame = copy.deepcopy(density)
    transform, base = fitted.data_.transform, fitted.flow_.base
    transform.radial = None
    a, b = transform.columns
    assert (a.log, b.log) == (False, True)
    s = (X[:20] - [a.mean, b.mean]) / [a.std, b.std]
    factor = base.factors[0].double().numpy()
    W = transform.whitening.numpy()
    y = s @ W - base.means[0].double().numpy()
    expected = -np.linalg.solve(factor @ factor.T, y.T).T @ W.T - [0, b.std]
    found = fitted.contributions(frame[:20])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert fitted.contributions(frame[:0]).shape == (0, 2)


def repeated(values):
    """Each row as often as its weight says."""
    return np.repeat(values, WEIGHTS, axis=0)


def module(path, frame, **options):
    """The data of a table whose validation and test rows are those of its training."""
    frame = pl.concat([frame.with_columns(part=pl.lit(part)) for part in ("train", "val", "test")])
    frame.write_parquet(path)
    data = DataModule(table, 64, 500, path=str(path), split_column="part", **options)
    data.setup()
    return data


def test_closed_forms_of_integer_weights_are_those_of_repeated_rows(tmp_path):
    x = np.stack([np.exp(X[:, 0] / 2), X[:, 1], (X**2).sum(1)], axis=1)
    columns = pl.DataFrame(x, ["a", "b", "c"])
    weighted = module(tmp_path / "w.parquet", columns.with_columns(w=WEIGHTS), weight="w")
    of_rows = module(tmp_path / "r.parquet", pl.DataFrame(repeated(x), columns.columns))
    both = [(each, len(each.splits.val)) for each in (weighted, of_rows)]
    fits = [fit_candidates(data, "auto", rows, 0, np.inf) for data, rows in both]
    assert len(fits[0]) > 8
    for pair in zip(*fits, strict=True):
        a, b = pair
        assert a.name == b.name
        assert a.nats == pytest.approx(b.nats, rel=1e-8)
        for one, other in zip(a.base.buffers(), b.base.buffers(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
        y, z = (
            candidate.transform.forward(torch.from_numpy(x), torch.zeros(N, 3))
            for candidate in pair
        )
        torch.testing.assert_close(y, z)
    bits = [gaussian_bits(data, rows, 0) for data, rows in both]
    assert bits[0] == pytest.approx(bits[1], rel=1e-8)


def test_the_objective_of_integer_weights_is_that_of_repeated_rows():
    state = State(torch.from_numpy(X), *torch.randn(3, N, dtype=torch.float64))
    of_rows = State(*(torch.from_numpy(repeated(part.numpy())) for part in state))
    weights = torch.from_numpy(WEIGHTS / WEIGHTS.mean())
    found, expected = objective(state, 0.1, 0.2, weights=weights), objective(of_rows, 0.1, 0.2)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_the_standard_error_of_a_weighted_mean_is_that_of_draws():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 200))
    weights = np.exp(x / 2 + rng.normal(size=x.shape) / 2)
    means = (weights * x).sum(1) / weights.sum(1)
    found = [
        float(standard_error(*map(torch.from_numpy, pair))) for pair in zip(x, weights, strict=True)
    ]
    assert np.median(found) == pytest.approx(means.std(), rel=0.15)


def test_systematic_rows_are_as_often_as_their_weights_say():
    assert systematic(torch.tensor([1.0, 4.0, 1.0]), 6).tolist() == [0, 1, 1, 1, 1, 2]
    assert systematic(torch.tensor([1.0, 4.0, 1.0]), 3).tolist() == [0, 1, 1]
    assert systematic(torch.ones(9999), 9999).tolist() == list(range(9999))
    weights = torch.rand(1000).double()
    counts = systematic(weights, 5000).bincount(minlength=1000)
    assert (counts - 5000 * weights / weights.sum()).abs().max() < 1


def test_weights_of_a_file_count_in_training_validation_and_evaluation(run, tmp_path):
    frame = pl.DataFrame(X, ["a", "b"]).with_columns(w=pl.Series(WEIGHTS) * (X[:, 0] > 4))
    frame.write_csv(path := tmp_path / "rows.csv")
    table = ["dataset=table", f"dataset.path={path}", "dataset.weight=w", *STILL]
    once = ["base=normal", "trainer.max_steps=1", "trainer.log_every_n_steps=1"]
    folder = run(*table, *once, "dataset.batch_size=999")
    fitted = rnode.load(folder)
    fitted.data_.setup()
    splits = fitted.data_.splits
    assert sum(map(len, splits.parts)) == (X[:, 0] > 4).sum()
    assert fitted.columns_ == ["a", "b"]
    weights = [part.numpy() for part in splits.weights]
    of = dict(zip(frame["a"], frame["w"], strict=True))
    assert weights[0].tolist() == [of[a] for a in splits.train[:, 0].tolist()]
    y = splits.transform.forward(splits.train, torch.zeros(splits.train.shape))[0]
    np.testing.assert_allclose(np.average(y, 0, weights[0]), 0, atol=1e-5)
    covariance = np.cov(y.T, fweights=weights[0])
    np.testing.assert_allclose(covariance, np.eye(2), atol=1e-4)
    nats = -np.average(rnode.log_normal(y), weights=weights[0]) / 2
    rows = metrics(folder)
    assert float(next(row["train/loss"] for row in rows if "train/loss" in row)) == pytest.approx(
        nats
    )
    tested = np.average(fitted.bits_per_dim(splits.test.numpy()), weights=weights[2])
    call("evaluate", str(folder), f"hydra.run.dir={tmp_path / 'evaluation'}")
    evaluation = json.loads((tmp_path / "evaluation/evaluation.json").read_text())
    result = json.loads((folder / "result.json").read_text())
    assert result["test/bits_per_dim"] == pytest.approx(tested, rel=1e-5)
    assert evaluation["bits_per_dim"] == pytest.approx(tested, rel=1e-5)
    error = evaluation["standard_error_images"]
    assert result["test/bits_per_dim_se"] == pytest.approx(error, rel=1e-4)
    call("score", str(folder), f"path={path}", "contributions=true", "hydra.run.dir=scores")
    scores = pl.read_csv("scores/scores.csv")
    found = scores.select("contribution_a", "contribution_b").to_numpy()
    np.testing.assert_allclose(found, fitted.contributions(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (-np.ones(N), "weight=sample_weight: is -1 to -1; must be 0 or more"),
        (np.zeros(N), "weight=sample_weight: is 0 to 0; must be 0 or more, and not zero"),
        (np.full(N, np.nan), "missing or infinite in sample_weight"),
        (np.ones(3), "X: must hold columns of one length"),
        ("c", "weight=c: must be among a, b"),
        ("a", "columns=a: must be among b"),
    ],
)
def test_weights_that_cannot_be_used_are_named(weights, message):
    frame = pl.DataFrame(X, ["a", "b"])
    with pytest.raises(InputError, match=message):
        rnode.fit(frame, columns=["a", "b"], sample_weight=weights, overrides=TINY)
