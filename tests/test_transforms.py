import math

import pytest
import torch

from helpers import no_c
from rnode import Column, Dequantize, ImageTransform, InputError, Logit, TableTransform


@pytest.mark.parametrize("alpha", [1e-5, 0.05])
def test_logit_inverse_and_log_det_against_autograd(alpha):
    logit = Logit(alpha)
    u = torch.rand(3, 2, 2, dtype=torch.float64)
    y, log_det = logit(u)
    torch.testing.assert_close(logit.inverse(y), u, rtol=1e-9, atol=1e-9)
    slope = torch.autograd.functional.jacobian(lambda x: logit(x)[0].sum(0), u)  # (2, 2, 3, 2, 2)
    jacobians = slope.flatten(3).flatten(0, 1).transpose(0, 1)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobians).logabsdet)


def test_dequantize_inverse_range_and_log_det():
    x = torch.arange(256, dtype=torch.uint8).view(2, 1, 16, 8)
    for noise in (torch.zeros(x.shape), torch.rand(x.shape), torch.full(x.shape, 1 - 2**-24)):
        u, _ = Dequantize(256)(x, noise)
        assert u.min() >= 0
        assert u.max() < 1
    u, log_det = Dequantize(256)(x, torch.rand(x.shape) * 0.999)
    assert torch.equal(Dequantize(256).inverse(u), x)
    beyond = ImageTransform(256, 1e-5).inverse(torch.tensor([[-20.0, 20.0]]))
    assert beyond.tolist() == [[0, 1]]
    torch.testing.assert_close(log_det, torch.full((2,), -128 * math.log(256)))


@pytest.mark.parametrize("levels", [256, 17])
def test_a_uniform_model_scores_log2_of_the_levels(levels):
    """A model that is uniform on [0, 1) before the logit has log p(y) = −log|det dy/du|."""
    x = torch.randint(levels, (5, 1, 4, 4))
    noise = torch.rand(x.shape, dtype=torch.float64)
    _, log_det_y = Logit(0.05)(Dequantize(levels)(x, noise)[0])
    log_det = ImageTransform(levels, 0.05)(x, torch.arange(5), no_c(x), noise).log_det
    bits = (log_det_y - log_det) / (16 * math.log(2))
    torch.testing.assert_close(bits, torch.full_like(bits, math.log2(levels)), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "transform",
    [
        ImageTransform(levels=17, alpha=1e-5),
        TableTransform([Column(f"n{i}", unit=1, mean=8, std=5) for i in range(3)]),
    ],
)
def test_noise_is_fresh_in_training_and_belongs_to_the_sample_in_evaluation(transform):
    shape = (4, 3) if isinstance(transform, TableTransform) else (4, 1, 8, 8)
    x, index = torch.randint(17, shape, dtype=torch.uint8), torch.arange(4)
    c = torch.randn(4, 2)
    assert not torch.equal(transform(x, index, c).y, transform(x, index, c).y)
    generators = (torch.Generator().manual_seed(3) for _ in range(2))
    first, again = (transform(x, index, c, generator=generator).y for generator in generators)
    assert torch.equal(first, again)
    batch = transform.for_evaluation(x, index, c, seed=0)
    assert torch.equal(batch.index, index)
    assert torch.equal(batch.c, c)
    assert torch.equal(batch.y[2:], transform.for_evaluation(x[2:], index[2:], c[2:], seed=0).y)
    for others, seed in ((index, 1), (index + 4, 0)):
        assert not torch.equal(batch.y, transform.for_evaluation(x, others, c, seed).y)


@pytest.mark.parametrize(
    "column",
    [
        Column("x", mean=3.0, std=2.0),
        Column("x", log=True, mean=-1.0, std=0.5),
        Column("x", bounds=(-1.0, 9.0), mean=0.3, std=1.7),
        Column("x", unit=1, mean=3.0, std=2.0),
        Column("x", unit=1, log=True, std=0.3),
        Column("x", unit=1, bounds=(0.0, 9.0)),
    ],
)
def test_a_column_is_inverted_and_its_log_det_is_autograds(column):
    x = torch.tensor([1.0, 3.0, 7.0], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    y, log_det = column(x, noise)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(log_det, slope.log())
    torch.testing.assert_close(column.inverse(y), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "inside", "outside", "message"),
    [
        ({"log": True}, 1e-9, 0.0, "a=0: must be positive"),
        ({"log": True, "unit": 1}, 0.0, -1.0, "a=-1: must be positive"),
        ({"bounds": (0.0, 2.0)}, 1.9, 2.0, "a=2: must be between 0 and 2"),
        ({"bounds": (0.0, 2.0)}, 0.1, 0.0, "a=0: must be between 0 and 2"),
        ({"bounds": (0.0, 11.0), "unit": 1}, 10.0, 11.0, "a=11: must be between 0 and 10"),
        ({"unit": 1}, -3.0, 0.5, "a=0.5: must be a whole number"),
    ],
)
def test_a_column_takes_its_own_values_alone(options, inside, outside, message):
    column = Column("a", **options)
    column.require_inside(torch.tensor([inside, inside], dtype=torch.float64))
    with pytest.raises(InputError, match=message):
        column.require_inside(torch.tensor([inside, outside], dtype=torch.float64))


def test_an_alpha_out_of_range_is_refused():
    with pytest.raises(InputError, match="alpha=0.5: must be between 0 and 0.5"):
        Logit(0.5)
