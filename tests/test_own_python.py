"""A density from Python: rows of every kind, and what `fit` leaves as it was."""

import logging
import os
import random
import signal
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import matplotlib
import numpy as np
import polars as pl
import pytest
import torch

import rnode
from helpers import SHORT
from rnode import InputError

pytestmark = pytest.mark.usefixtures("blank_figures")
N = 60
X = np.random.default_rng(0).normal(size=(N, 2)).astype(np.float32).astype(float)
FLAGS = np.arange(N) % 2 == 0
FRAME = pl.DataFrame({"a": X[:, 0], "b": X[:, 1], "flag": FLAGS})


class Pandas:
    """What is read of a DataFrame of pandas."""

    def __init__(self, columns):
        self.items = columns.items


@pytest.fixture(scope="module")
def density(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit") / "run"
    return rnode.fit(FRAME, context=["flag"], folder=folder, overrides=SHORT)


ROWS = {
    "order": FRAME.select("flag", "b", "a"),
    "more": FRAME.with_columns(day=pl.date(2020, 1, 1), text=pl.lit("x"), list=pl.lit([1])),
    "text": FRAME.with_columns(pl.col("a", "b").cast(pl.String), pl.col("flag").cast(pl.String)),
    "dictionary": FRAME.to_dict(as_series=False),
    "columns": {"a": X[:, 0].astype(object), "b": torch.tensor(X[:, 1]), "flag": FLAGS},
    "pandas": Pandas(
        {"mixed": np.array([1, "x"] * 30, object), "b": X[:, 1], "a": X[:, 0], "flag": FLAGS}
    ),
}
ARRAYS = {
    "array": X,
    "list": X.tolist(),
    "long double": X.astype(np.longdouble),
    "nothing masked": np.ma.masked_array(X),
    "gradient": torch.tensor(X, requires_grad=True),
}


@pytest.mark.parametrize("kind", [*ROWS, *ARRAYS])
def test_rows_of_every_kind_score_alike(kind, density):
    expected = density.log_prob(FRAME)
    if kind in ROWS:
        np.testing.assert_allclose(density.log_prob(ROWS[kind]), expected, atol=1e-6)
    else:
        for context in ({"flag": FLAGS}, {"flag": torch.tensor(FLAGS)}, FRAME[["flag", "a"]]):
            np.testing.assert_allclose(density.log_prob(ARRAYS[kind], context), expected, atol=1e-6)


def test_bfloat16_is_rounded_and_no_rows_are_no_scores(density):
    rounded = torch.tensor(X).bfloat16()
    expected = density.log_prob(rounded.double(), {"flag": FLAGS})
    np.testing.assert_array_equal(density.log_prob(rounded, {"flag": FLAGS}), expected)
    assert density.log_prob(FRAME[:0]).shape == (0,)
    assert density.rank(X[:0], {"flag": True}).shape == (0,)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.ma.masked_array(X[:3], mask=[[0, 0], [1, 0], [0, 0]]), "X: a is nan in row 1"),
        (np.zeros((3, 4)), "X has 4 features, but Density is expecting 2 .*: a, b"),
        (np.zeros((3, 2, 2)), "Found array with dim 3"),
        (pl.DataFrame({"column_0": [1.0], "column_1": [2.0]}), "X: lacks a, b"),
        ({"a": [1, 2], "b": [1]}, "X: must hold columns of one length"),
        ({"a": [1, "x"], "b": [1, 2]}, "X: a is x in row 1, no number"),
        ({"a": [1, None], "b": [1, 2]}, "X: a is nan in row 1|X: a is None in row 1"),
        ({"a": [1, np.inf], "b": [1, 2]}, "X: a is inf in row 1"),
        (
            {"a": [1], " a": [2], "b": [1]},
            "X: two columns have the name a",
        ),
    ],
)
def test_rows_that_cannot_be_scored_are_named(rows, message, density):
    with pytest.raises(ValueError, match=message):
        density.log_prob(rows, {"flag": True})


def test_samples_are_new_unless_a_seed_is_given(density):
    given = {"flag": True}
    assert not density.sample(5, given).equals(density.sample(5, given))
    assert density.sample(5, given, seed=3).equals(density.sample(5, given, seed=3))
    assert density.sample(4, FRAME[:4]).height == 4
    empty = density.sample(0, given)
    assert (empty.columns, empty.height) == (["a", "b"], 0)
    with pytest.raises(InputError, match="n=-1: must be 0 or more"):
        density.sample(-1, given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": "a"}, "^columns=a: Input should be a"),
        ({"columns": ["a", "a"]}, "^columns=a: is there twice"),
        ({"columns": ["a", "flag"], "context": ["flag"]}, "^columns=flag: must be among a, b"),
        ({"columns": ["hole", "a"]}, r"in hole \(1\); missing='drop' leaves"),
        ({"columns": ["a"], "context": ["day"]}, "^context=day: must be among a, b, hole, flag"),
        ({"missing": "dropp"}, "^missing=dropp: Input should be 'stop' or 'drop'"),
        ({"max_time": "5"}, "^max_time=5: must be"),
        ({"max_tim": "5"}, "unexpected keyword argument 'max_tim'"),
    ],
)
def test_mistakes_are_answered_in_the_words_of_python(options, message):
    hole = pl.Series([None, *X[1:, 0]])
    frame = FRAME.with_columns(day=pl.date(2020, 1, 1), hole=hole)
    with pytest.raises((InputError, TypeError), match=message):
        rnode.fit(frame, overrides=SHORT, **options)


def test_options_may_be_arrays_and_columns_booleans():
    fitted = rnode.fit(
        FRAME,
        columns=np.array(["flag", "a"]),
        integer=pl.Series(["flag"]),
        logit={"a": np.array([-9, 9])},
        test=np.int64(7),
        overrides=SHORT,
    )
    samples = fitted.sample(50)
    assert samples.schema == {"flag": pl.Int64, "a": pl.Float64}
    assert samples["a"].is_between(-9, 9).all()


def state():
    """What belongs to the caller of `fit`."""
    names = [
        n for n, each in logging.root.manager.loggerDict.items() if isinstance(each, logging.Logger)
    ]
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),
        "random": random.getstate(),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "path": list(sys.path),
        "arguments": list(sys.argv),
        "signals": {n: signal.getsignal(n) for n in signal.valid_signals()},
        "matplotlib": dict(matplotlib.rcParams),
        "loggers": {name: logging.getLogger(name).level for name in names},
        "handlers": list(logging.root.handlers),
        "warnings": list(warnings.filters),
        "dtype": torch.get_default_dtype(),
        "precision": torch.get_float32_matmul_precision(),
        "tf32": (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
    }


@pytest.mark.parametrize(
    "options", [{}, {"columns": ["c"]}, {"overrides": [*SHORT, "optimizer.lr=1e9"]}]
)
def test_fit_leaves_its_caller_alone(options, density):
    torch.manual_seed(5)
    torch.backends.cudnn.allow_tf32 = True
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.INFO)
    before = state()
    try:
        rnode.fit(X, **{"overrides": SHORT} | options)
    except (InputError, rnode.Diverged):
        assert options
    after = state()
    after["loggers"] = {name: after["loggers"][name] for name in before["loggers"]}
    assert after == before


def test_fit_works_in_threads_and_each_gets_a_density_of_its_own_rows():
    before = state()["signals"]
    with ThreadPoolExecutor(2) as pool:
        fits = pool.map(lambda k: rnode.fit(X * k, overrides=SHORT), (1.0, 1000.0))
        spread = [fitted.sample(200)["column_0"].std() for fitted in fits]
    assert spread[0] < 10 < 100 < spread[1]
    assert not list(os.scandir())
    assert state()["signals"] == before
    assert threading.active_count() >= 1


def test_a_file_of_the_users_is_never_written_to(tmp_path):
    path = tmp_path / "rows.csv"
    FRAME[["a", "b"]].write_csv(path)
    before = path.read_bytes()
    for folder in (tmp_path, path):
        with pytest.raises((InputError, OSError)):
            rnode.fit(path, folder=folder, overrides=SHORT)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    rnode.fit(path, folder=tmp_path / "run", overrides=SHORT)
    files = {file: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()}
    with pytest.raises(InputError, match="must be new or empty"):
        rnode.fit(X * 5, folder=tmp_path / "run", overrides=SHORT)
    assert files == {file: file.read_bytes() for file in files}
