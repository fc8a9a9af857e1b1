"""A trained density from Python, and the commands that score and sample."""

import numpy as np
import polars as pl
import pytest
import torch

import rnode
from helpers import call, refused
from rnode import InputError
from rnode.evaluation import measure

pytestmark = pytest.mark.usefixtures("blank_figures")

QUIET = [
    "trainer.enable_progress_bar=false",
    "logger.wandb.mode=disabled",
    "trainer.accelerator=cpu",
]
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
    options = {"columns": ["a", "b"], "context": ["level", "slope"], "folder": folder}
    overrides = ["trainer.max_epochs=20", "model.hidden=32", *QUIET]
    return rnode.fit(rows, **options, max_time="01:00:00", overrides=overrides), folder


def true_log_prob(rows):
    level, slope, a, b = (rows[name].to_numpy() for name in ("level", "slope", "a", "b"))
    mean, spread = (np.array([table[v] for v in level]) for table in (MEAN, SPREAD))
    z = torch.from_numpy(np.stack([(a - mean) / spread, (b - 50 - 20 * slope) / 5], 1))
    return (rnode.log_normal(z).numpy() - np.log(5 * spread)).astype(float)


def test_conditional_likelihood_and_samples_match_the_closed_form(fitted, rows):
    density, _ = fitted
    gap = true_log_prob(rows) - density.log_prob(rows)
    assert -0.02 < gap.mean() < 0.05  # the Kullback-Leibler divergence, in nats
    samples = density.sample(3000, {"level": "high", "slope": 0.5})
    assert samples.columns == ["a", "b"]
    assert abs(samples["a"].mean() - 3.0) < 0.15
    assert abs(samples["a"].std() - 1.5) < 0.15
    assert abs(samples["b"].mean() - 60.0) < 1.0
    assert abs(samples["b"].std() - 5.0) < 0.6


def test_rows_of_any_kind_score_alike(fitted, rows):
    density, folder = fitted
    few = rows[:50]
    expected = density.score(few)
    given = {name: few[name].to_list() for name in ("level", "slope")}
    array = few.select("a", "b").to_numpy()
    for same in (
        few.sample(fraction=1.0, shuffle=False)[["slope", "b", "a", "level"]],
        {name: few[name].to_list() for name in few.columns},
    ):
        np.testing.assert_array_equal(density.log_prob(same), expected["log_prob"])
    np.testing.assert_array_equal(density.log_prob(array, given), expected["log_prob"])
    bits = density.bits_per_dim(few)
    np.testing.assert_allclose(-expected["log_prob"] / (2 * np.log(2)), bits)
    again = rnode.load(folder)
    np.testing.assert_array_equal(again.log_prob(few), expected["log_prob"])
    assert again.sample(4, {"level": "low", "slope": 0}).equals(
        again.sample(4, {"level": "low", "slope": 0})
    )


def test_the_rank_is_the_share_of_validation_samples_that_are_more_likely(fitted, rows):
    density, _ = fitted
    scores = density.score(rows)
    assert 0.4 < scores["rank"].mean() < 0.6
    odd = rows[:1].with_columns(a=pl.lit(40.0))
    assert density.score(odd)["rank"].tolist() == [1.0]
    unvalidated = rnode.Density(density.data, density.flow, torch.zeros(0))
    assert np.isnan(unvalidated.score(rows[:2])["rank"]).all()


def test_nonsense_is_refused_in_the_terms_of_the_table(fitted, rows):
    density, _ = fitted
    for rows_, context, message in [
        (rows.select("a", "level", "slope"), None, "rows: lack b; the columns are"),
        (rows.with_columns(a=pl.lit("x")), None, "column a must hold numbers, not String"),
        (rows.with_columns(a=pl.lit(np.nan)), None, "row 0 of the rows .* is not finite"),
        (rows.select("a", "b"), None, "context.level, context.slope: must be given"),
        (rows, {"level": "mid", "slope": 0}, "context.level=mid: must be one of high, low"),
        (rows, {"size": 3}, "context.size: the conditions are"),
        (rows[:3], {"level": ["low"] * 2, "slope": 0}, "has 2 values for 3 samples"),
        (np.zeros((3, 5)), {"level": "low", "slope": 0}, "rows: lack a, b"),
        (np.zeros(3), None, r"rows of shape \(3,\): must be \(N, columns\)"),
    ]:
        with pytest.raises(InputError, match=message):
            density.log_prob(rows_, context)


def test_pixels_are_checked_and_score_as_the_evaluation_does(digits_run):
    density = rnode.load(digits_run / "best.ckpt")
    density.data.setup()
    test = density.data.splits.test[:20]
    batch = density.data.transform.for_evaluation(test, torch.arange(20), torch.empty(20, 0), 0)
    with torch.no_grad():
        first, second = (measure(density.flow, batch, s)[1].bits_per_dim for s in (0, 1))
    np.testing.assert_allclose(density.bits_per_dim(test), (first + second) / 2, rtol=1e-6)
    np.testing.assert_allclose(
        density.bits_per_dim(test[:, 0].numpy()), density.bits_per_dim(test), rtol=1e-6
    )
    images = density.sample(3)
    assert images.dtype == np.uint8
    assert images.shape == (3, 1, 8, 8)
    for x, message in [
        (test / 16, r"type float32: must be grey levels, whole numbers from 0 to 16"),
        (test * 4, "must be from 0 to 16"),
        (test[:, :, :4], r"shape \(20, 1, 4, 8\) and type uint8: must be \(N, 1, 8, 8\)"),
    ]:
        with pytest.raises(InputError, match=message):
            density.log_prob(x)


def test_the_command_scores_a_file_in_its_order(fitted, rows, tmp_path, capsys):
    density, folder = fitted
    shuffled = rows[100:160].sample(fraction=1.0, shuffle=True, seed=1)
    shuffled.write_csv(tmp_path / "new.csv")
    options = [f"path={tmp_path / 'new.csv'}", "id=[id]", f"hydra.run.dir={tmp_path / 'id'}"]
    call("score", str(folder / "best.ckpt"), *options)
    scores = pl.read_csv(tmp_path / "id" / "scores.csv")
    assert scores["id"].to_list() == shuffled["id"].to_list()
    np.testing.assert_allclose(scores["log_prob"], density.log_prob(shuffled), atol=1e-6)
    assert "mean log-probability" in capsys.readouterr().out
    options = [f"path={tmp_path / 'new.csv'}", f"hydra.run.dir={tmp_path / 'plain'}"]
    call("score", str(folder / "best.ckpt"), *options)
    plain = pl.read_csv(tmp_path / "plain" / "scores.csv")
    assert plain["row"].to_list() == list(range(60))
    assert plain["log_prob"].to_list() == scores["log_prob"].to_list()


def test_the_command_samples_a_table(fitted, rows, tmp_path):
    _, folder = fitted
    given = ["context.level=low", "context.slope=0.25", "n=7"]
    call("sample", str(folder / "best.ckpt"), *given, f"hydra.run.dir={tmp_path / 'a'}")
    frame = pl.read_csv(tmp_path / "a" / "samples.csv")
    assert frame.columns == ["a", "b", "level", "slope"]
    assert frame["level"].to_list() == ["low"] * 7
    assert frame["slope"].to_list() == [0.25] * 7


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("score", ["path=none.csv"], "path=none.csv: there is no such file"),
        ("score", ["path=new.csv"], "rows: lack b; the columns are ['a', 'b']"),
        ("score", ["path=new.csv", "id=[name]"], "id=['name']: new.csv has the columns ['a']"),
        ("sample", [], "context.level, context.slope: must be given"),
    ],
)
def test_a_users_mistake_is_one_line(
    fitted, tmp_path, monkeypatch, capsys, command, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new.csv").write_text("a\n1.5\n")
    line, code = refused(capsys, command, str(fitted[1] / "best.ckpt"), *arguments)
    assert message in line
    assert code == 2
    assert not list(tmp_path.rglob("scores.*"))


def test_classes_of_the_users_own_package_are_called_when_named_again(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mydata.py").write_text(
        "import torch\n"
        "from rnode.data.splits import Splits\n"
        "from rnode import Column, TableTransform, mlp\n"
        "def rows(n):\n"
        "    transform = TableTransform([Column(name) for name in 'abc'])\n"
        "    return Splits(*torch.randn(n + 20, 3).split([n, 10, 10]), transform)\n"
        "def flow(**options):\n"
        "    return mlp(**options)\n"
    )
    (tmp_path / "own" / "dataset").mkdir(parents=True)
    (tmp_path / "own" / "dataset" / "mine.yaml").write_text(
        "# @package _global_\n"
        "# my rows\n"
        "defaults:\n  - override /model: mlp\n  - _self_\n"
        "dataset:\n  _target_: rnode.data.datamodule.DataModule\n"
        "  source:\n    _target_: mydata.rows\n    _partial_: true\n"
        "  n: 40\n  batch_size: 20\n  eval_batch_size: 10\n  seed: 0\n"
        "model:\n  _target_: mydata.flow\n"
    )
    own = ["--config-dir", "own", "dataset=mine", "trainer.max_epochs=1", "hydra.run.dir=run"]
    call("train", *own, *QUIET)
    path = "run/best.ckpt"
    capsys.readouterr()
    line, _ = refused(capsys, "evaluate", path)
    assert (
        "would call mydata.rows, which conf/ does not name; if it is yours, add trust=[mydata]"
        in line
    )
    with pytest.raises(InputError, match="mydata"):
        rnode.load(path)
    np.save("new.npy", np.zeros((2, 3)))
    for name, extra in (("evaluate", []), ("sample", ["n=3"]), ("score", ["path=new.npy"])):
        call(name, path, "trust=[mydata]", *extra, f"hydra.run.dir={name}")
    assert len(pl.read_csv("score/scores.csv")) == 2
    assert pl.read_csv("sample/samples.csv").columns == ["a", "b", "c"]
    assert rnode.load(path, trust=["mydata"]).log_prob(np.zeros((2, 3))).shape == (2,)
