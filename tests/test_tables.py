"""dataset=table: files as other programs write them, and what a column becomes."""

import json
import math

import numpy as np
import polars as pl
import pytest
import torch
from scipy import stats

import rnode
from data_files import parts_of
from helpers import call
from rnode.data.tables import table
from rnode.quantiles import Quantiles
from rnode.transforms import Column, TableTransform

ROWS = 500
QUIET = ["trainer.enable_progress_bar=false", "logger=csv", "trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def frame():
    rng = np.random.default_rng(0)
    return pl.DataFrame(
        {
            "height": rng.normal(170, 10, ROWS),
            "income": np.exp(rng.normal(10, 1, ROWS)),
            "share": rng.beta(2, 3, ROWS),
            "cars": rng.poisson(1.3, ROWS),
            "city": rng.choice(["Bonn", "Oslo"], ROWS),
        }
    )


def test_splits_are_disjoint_standardized_by_training_and_always_the_same(frame, tmp_path):
    frame.write_csv(path := tmp_path / "rows.csv")
    splits = table(path=str(path), validation=0.1, test=60)
    assert [len(part) for part in parts_of(splits)] == [390, 50, 60]
    assert splits.transform.names == frame.columns[:4]
    assert len({tuple(row) for row in torch.cat(parts_of(splits)).tolist()}) == ROWS
    again = table(path=str(path), validation=50, test=60, integer=[])
    assert all(map(torch.equal, parts_of(splits), parts_of(again)))
    y, _ = again.transform.forward(again.train, torch.rand(390, 4))
    torch.testing.assert_close(y.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cov(y.T), torch.eye(4), atol=1e-4, rtol=0)


def test_columns_of_every_kind_are_standardized_after_their_transform(frame, tmp_path):
    frame.write_csv(path := tmp_path / "rows.csv")
    options = {"integer": ["cars"], "log": ["income"], "logit": {"share": [0, 1], "cars": [0, 20]}}
    splits = table(path=str(path), context=["city"], **options).fit()
    columns = splits.transform.columns
    assert [column.name for column in columns if column.log] == ["income"]
    assert [column.name for column in columns if column.unit] == ["cars"]
    bounds = [column.bounds for column in columns]  # 20 and its noise are below 21
    assert bounds == [None, None, (0.0, 1.0), (0.0, 21.0)]
    plain = TableTransform(columns)
    y, _ = plain.forward(splits.train, torch.full_like(splits.train, 0.5))
    torch.testing.assert_close(y.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(4), atol=1e-5, rtol=0)
    cities = dict(zip(frame["height"], frame["city"], strict=True))
    for name, part in zip(("train", "val", "test"), parts_of(splits), strict=True):
        expected = [cities[height] == "Oslo" for height in part[:, 0].tolist()]
        assert splits.c[name].argmax(1).bool().tolist() == expected


def test_a_column_says_the_split(frame, tmp_path):
    words = np.array(["train", "Validation", "test"])[np.arange(ROWS) % 3]
    frame.with_columns(part=words).write_parquet(path := tmp_path / "rows.parquet")
    splits = table(path=str(path), columns=["height"], split_column="part")
    heights = torch.tensor(frame["height"].to_list(), dtype=torch.float64)
    assert torch.equal(splits.train[:, 0], heights[0::3])
    assert torch.equal(splits.test[:, 0], heights[2::3])
    val = splits.val[:, 0]  # in another order, so that its first rows are of the whole file
    assert torch.equal(val.sort().values, heights[1::3].sort().values)
    assert not torch.equal(val, heights[1::3])


def test_whitening_makes_the_columns_uncorrelated_and_has_the_jacobians_determinant():
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.normal(size=(900, 3)) @ rng.normal(size=(3, 3)) + 5)
    transform = TableTransform([Column(name) for name in "abc"]).fit(rows)
    y, log_det = transform.forward(rows, torch.rand(900, 3))
    torch.testing.assert_close(torch.cov(y.T), torch.eye(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(transform.inverse(y), rows, atol=1e-5, rtol=0)
    assert transform.fit(rows).columns == transform.columns  # whatever was fitted before
    scales = torch.tensor([column.std for column in transform.columns])
    expected = torch.linalg.slogdet(transform.whitening / scales).logabsdet.float().expand(900)
    torch.testing.assert_close(log_det, expected)
    # A direction without variance is scaled up a thousand times, not without bound.
    dependent = torch.cat([rows, rows.sum(1, keepdim=True)], 1)
    norms = TableTransform([Column(name) for name in "abcd"]).fit(dependent).whitening.norm(dim=0)
    torch.testing.assert_close(norms.max() / norms.min(), torch.tensor(1e3).double())


def test_quantiles_make_columns_normal_whatever_their_gaps():
    rng, n = np.random.default_rng(0), 20000
    x = torch.from_numpy(
        np.stack([rng.choice([0.0, 1.0, 10.0], n), np.exp(2 * rng.normal(size=n))], axis=1)
    )
    fitted = TableTransform([Column("a", unit=1.0), Column("b")]).fit(x[1:], quantiles=True)
    noise = torch.rand(n, 2)
    y_of_x, _ = fitted.forward(x, noise)
    torch.testing.assert_close(torch.cov(y_of_x.T), torch.eye(2), atol=0.02, rtol=0)
    assert all(stats.kstest(column, "norm").statistic < 0.02 for column in y_of_x.T)
    torch.testing.assert_close(fitted.inverse(y_of_x), x, rtol=1e-3, atol=1e-3)
    rows = torch.tensor([[0.3, 2.0], [10.9, 400.0], [5.0, 1e-9]]).double().requires_grad_()
    columns = [column._replace(unit=0.0) for column in fitted.columns]
    plain = TableTransform(columns, quantiles=fitted.quantiles)
    y, log_det = plain.forward(rows, torch.zeros(3, 2))
    (slopes,) = torch.autograd.grad(y.sum(), rows)
    torch.testing.assert_close(log_det.double(), slopes.log().sum(1), atol=1e-5, rtol=0)
    again = TableTransform.from_state(fitted.state())
    assert again.columns == fitted.columns
    assert torch.equal(again.forward(x, noise)[0], y_of_x)
    constant = torch.stack([torch.ones(50), torch.rand(50)], 1).double()
    layer = Quantiles.fit(constant)
    y, log_det = layer.forward(constant)
    torch.testing.assert_close(y[:, 0], constant[:, 0])
    torch.testing.assert_close(layer.inverse(y), constant)
    _, log_det_of_b = Quantiles.fit(constant[:, 1:]).forward(constant[:, 1:])
    torch.testing.assert_close(log_det, log_det_of_b)


def test_rounded_columns_are_dequantized_and_misleading_ones_are_named(tmp_path, capsys):
    rng = np.random.default_rng(0)
    columns = {
        "few": np.arange(ROWS) // 5 + 0.25,  # 1 % of the rows share a value
        "height": rng.normal(size=ROWS),
        "age": np.round(rng.uniform(18, 60, ROWS)),
        "price": np.round(rng.normal(5, 1, ROWS) / 0.05) * 0.05,
        "half": np.round(rng.normal(size=ROWS)) + 0.5,
        "one": np.ones(ROWS),
        "id": np.arange(ROWS),
        "spike": np.where(np.arange(ROWS) < 50, 7.5, 1e9 * rng.random(ROWS) ** 40),
    }
    pl.DataFrame(columns).write_csv(path := tmp_path / "rows.csv")
    splits = table(path=str(path))
    printed = capsys.readouterr().out
    units = {column.name: column.unit for column in splits.transform.columns}
    assert units.pop("price") == pytest.approx(0.05)
    rounded = {"age": 1.0, "half": 1.0}
    assert units == dict.fromkeys(units, 0.0) | rounded
    assert "'dataset.integer=[\"id\"]' dequantizes them" in printed
    assert "a repeated value, where the density rises without bound: one, spike; " in printed
    y = splits.fit().transform.forward(splits.test, torch.rand(splits.test.shape))[0]
    x = splits.transform.inverse(y)
    torch.testing.assert_close(x[:, :7], splits.test[:, :7], rtol=1e-4, atol=1e-4)
    splits = table(path=str(path), integer=["age"])
    assert [column.name for column in splits.transform.columns if column.unit] == ["age"]


@pytest.mark.slow  # trains for half a minute
def test_a_known_density_is_recovered_in_its_own_units(tmp_path, capsys):
    """Two correlated normals, one as its exponential, and a rounded normal."""
    rng, n = np.random.default_rng(1), 20000
    mean, cov = np.array([100.0, 1.0]), np.array([[25.0, 3.0], [3.0, 1.0]])
    z = rng.multivariate_normal(mean, cov, n)
    count = np.floor(rng.normal(3, 4, n)).astype(int)
    frame = pl.DataFrame({"a": z[:, 0], "b": np.exp(z[:, 1]), "count": count})
    frame.write_csv(path := tmp_path / "rows.csv")
    options = [f"dataset.path={path}", "dataset.log=[b]", "dataset.integer=[count]"]
    folder = f"hydra.run.dir={tmp_path / 'run'}"
    call("train", "dataset=table", *options, "trainer.max_epochs=12", *QUIET, folder)
    held_out = table(path=str(path), log=["b"], integer=["count"]).test.numpy()
    a, b, k = held_out.T
    true = stats.multivariate_normal(mean, cov).logpdf(np.stack([a, np.log(b)], 1)) - np.log(b)
    true += np.log(stats.norm.cdf(k + 1, 3, 4) - stats.norm.cdf(k, 3, 4))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    found, error = (result[f"test/bits_per_dim{s}"] * 3 * math.log(2) for s in ("", "_se"))
    assert abs(found + true.mean()) < 2 * error
    assert "test/nats" in capsys.readouterr().out
    # Row by row the model is close too, which the mean alone would not show.
    scores = rnode.load(tmp_path / "run" / "best.ckpt").log_prob(held_out)
    assert np.abs(scores - true).mean() < 0.1
