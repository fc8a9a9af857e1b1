"""The Gaussian that every run is compared with."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from helpers import TWO_STEPS, column
from rnode.data.conditions import Conditions
from rnode.data.datamodule import DataModule
from rnode.data.splits import Splits
from rnode.training.gaussian import gaussian_bits
from rnode.transforms import Column, TableTransform

pytestmark = pytest.mark.usefixtures("blank_figures")


def of_splits(splits, *more):
    columns = [Column(f"x{i}") for i in range(splits[0].shape[1])]
    data = DataModule(lambda: Splits(*splits, TableTransform(columns), *more), 10, 10)
    data.setup()
    return data


def test_it_is_the_gaussian_of_the_training_rows_on_the_validation_rows():
    train, val = (torch.randn(n, 3) @ torch.randn(3, 3) + 1 for n in (5000, 300))
    mean, covariance = train.numpy().mean(0), np.cov(train.numpy().T, bias=True)
    expected = -multivariate_normal(mean, covariance).logpdf(val.numpy()).mean()
    bits = gaussian_bits(of_splits([train, val, val]), 300, seed=0)
    assert bits == pytest.approx(expected / (3 * math.log(2)), rel=0.01)


def test_its_mean_is_linear_in_what_is_given():
    """x = A c + noise of deviation 0.1 in two dimensions, c in two."""
    c = torch.randn(20_000, 2)
    x = c @ torch.tensor([[1.0, 2.0], [-3.0, 0.5]]) + 0.1 * torch.randn(20_000, 2)
    values = [{"a": a, "b": b} for a, b in (c[:10_000].T.numpy(), *2 * [c[10_000:].T.numpy()])]
    x = [x[:10_000], x[10_000:], x[10_000:]]
    data = of_splits(x, Conditions.fit(values[0]), values)
    entropy = math.log(0.1) + 0.5 * math.log(2 * math.pi * math.e)  # a dimension
    assert gaussian_bits(data, 9000, seed=0) == pytest.approx(entropy / math.log(2), abs=0.02)


@pytest.mark.parametrize(
    ("shape", "none"), [((4, 30), False), ((4200, 4097), True), ((9, 3), True)]
)
def test_too_many_columns_and_constant_ones_have_none(shape, none):
    rows = torch.zeros(shape) if shape == (9, 3) else torch.randn(shape)
    assert (gaussian_bits(of_splits([rows, rows, rows]), 3, seed=0) is None) == none


def test_a_run_prints_it_and_logs_it_at_each_validation(run, capsys):
    for limit, expected in ((1.0, 2.326), (1, 2.18)):
        folder = run(*TWO_STEPS, f"trainer.limit_val_batches={limit}", folder=str(limit))
        assert f"a Gaussian with full covariance has {expected}" in capsys.readouterr().out
        assert column(folder, "val/bits_per_dim_gaussian") == pytest.approx([expected], abs=0.01)
