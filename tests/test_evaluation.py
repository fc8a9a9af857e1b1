"""The measures of a flow, against closed forms."""

import math

import pytest
import torch

from helpers import RK4, TIGHT, Linear, close, make_flow, no_c
from rnode import Diverged, Field, Flow, Method, Piece, Probes, Solver, TimeLinear, log_normal, mlp
from rnode.evaluation import (
    MEAN_TOLERANCE,
    SAMPLE_TOLERANCE,
    agreeing_grid,
    evaluate,
    standard_error,
)
from rnode.transforms import Column, ImageTransform, TableTransform

LEVELS, ALPHA = 4, 0.05
GREY = ImageTransform(LEVELS, ALPHA)
A = torch.tensor([[0.3, 0.8], [-0.5, 0.1]], dtype=torch.float64)
NORMAL = torch.distributions.Normal(0.0, 1.0)


def in_batches(x, size=64):
    """(x, index, c) of a split in batches, as a DataModule loads them."""
    indices = torch.arange(len(x)).split(size)
    return [(x[index], index, no_c(index)) for index in indices]


def evaluate_vectors(flow, x, seed=0):
    """The summary for vectors, whose columns stay as they are."""
    unchanged = TableTransform([Column(f"x{i}") for i in range(x.shape[1])])
    return evaluate(flow, unchanged, in_batches(x), noises=1, seed=seed)[0]


def identity(shape):
    """f = 0, as every flow starts; one step solves it."""
    solver = Solver(RK4, Method("euler", steps=1))
    return mlp(shape, solver, Probes("exact"), hidden=4).eval()


def flow_of(*fields, divergence="exact", test=TIGHT):
    """A flow of vectors with one piece for each field."""
    d, solver = len(next(fields[0].parameters())), Solver(RK4, test, dtype="float64")
    return Flow((d,), [Piece(field) for field in fields], solver, Probes(divergence)).eval()


def test_the_importance_weighted_bound_falls_to_the_exact_discrete_likelihood():
    """−log₂ P(x) / d of the identity: the normal's mass between the edges of each grey level."""
    x = torch.randint(LEVELS, (400, 1, 2, 2), dtype=torch.uint8)
    summary, columns = evaluate(identity((1, 2, 2)), GREY, in_batches(x, 400), noises=256, seed=0)
    low, high = (torch.logit(ALPHA + (1 - 2 * ALPHA) * (x + i).double() / LEVELS) for i in (0, 1))
    exact = -(NORMAL.cdf(high) - NORMAL.cdf(low)).log2().flatten(1).mean(1)
    bounds = columns["bounds"]
    means = bounds.mean(1)
    assert summary["bits_per_dim"] == pytest.approx(float(means[0]), abs=1e-6)
    assert summary["bound"] == pytest.approx(float(means[-1]), abs=1e-12)
    assert summary["bound_by_noises"] == pytest.approx(means.tolist(), abs=1e-12)
    # The density varies within a grey level, so one noise gives a clearly looser bound.
    assert means[0] - exact.mean() > 5 * standard_error(bounds[0] - exact, torch.ones(400))
    assert abs(means[-1] - exact.mean()) < 0.002
    for few, many in ((1, 2), (2, 4), (4, 16), (16, 64), (64, 256)):
        assert means[many - 1] < means[few - 1] + 0.002
    assert (bounds[-1] - exact).abs().max() < 0.15  # for each image too
    # The midpoint is the density at the centre of each bin.
    s = ALPHA + (1 - 2 * ALPHA) * (x.double() + 0.5) / LEVELS
    slope = (1 - 2 * ALPHA) / LEVELS / (s * (1 - s))
    centre = -(NORMAL.log_prob(torch.logit(s)) + slope.log()).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(columns["midpoint"], centre, rtol=1e-5, atol=1e-5)
    assert summary["midpoint"] == pytest.approx(float(centre.mean()), abs=1e-5)


def test_the_uniform_bound_of_the_identity_is_the_closed_form_integral():
    """E_u[−log₂ p(x + u)] on a fine grid, against the mean over many noises of one image."""
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    levels = torch.arange(LEVELS).repeat_interleave(2000)[:, None]
    y, log_det = GREY.forward(levels, u.repeat(LEVELS)[:, None])
    expected = float(-(log_normal(y) + log_det).mean() / math.log(2))
    x = torch.tensor([[[[0, 1], [2, 3]]]], dtype=torch.uint8).expand(4000, -1, -1, -1)
    summary, _ = evaluate(identity((1, 2, 2)), GREY, in_batches(x, 500), noises=1, seed=3)
    assert abs(summary["bits_per_dim"] - expected) < 4 * summary["standard_error_images"]
    assert summary["standard_error_images"] < 0.01


def test_the_probes_error_is_the_known_one():
    """Var(εᵀAε) = 2 ‖(A + Aᵀ)/2‖_F² for a normal ε: one solve, l in nats, over d log 2."""
    x = torch.randn(4000, 2, dtype=torch.float64)
    summary = evaluate_vectors(flow_of(Linear(A), divergence="gaussian", test=RK4), x)
    deviation = (2 * ((A + A.T) / 2).square().sum()).sqrt() / (2 * math.log(2))
    expected = float(deviation) / 4000**0.5
    assert summary["standard_error_probes"] == pytest.approx(expected, rel=0.1)
    assert standard_error(torch.tensor([1.0, 3.0]), torch.ones(2)) == pytest.approx(1.0)  # √2 / √2


@pytest.mark.parametrize(
    ("method", "speed", "count", "chosen"),
    [
        ("auto", 1, 65, "rk4 with 2 step(s), which differs from dopri5 by "),
        ("auto", 2, 65, "rk4 with 4 step(s), which differs from dopri5 by "),
        ("auto", 40, 65, "dopri5"),
        ("auto", 1, 64, "dopri5"),
        ("bosh3", 1, 65, "bosh3"),
    ],
)
def test_a_likelihood_takes_the_coarsest_grid_that_agrees_with_dopri5(method, speed, count, chosen):
    flow = flow_of(Linear(speed * A), test=Method(method))
    x, solver, c = torch.randn(64, 2, dtype=torch.float64), flow.solver, math.log(4)
    z = x @ torch.linalg.matrix_exp(speed * A).T
    exact = -(log_normal(z) + speed * A.trace()) / c
    with torch.no_grad(), agreeing_grid(flow, lambda: -flow.log_prob(x) / c, count) as words:
        error = -flow.log_prob(x) / c - exact
    assert words.startswith(chosen)
    assert flow.solver == solver
    if words.startswith("rk4"):
        assert abs(error.mean()) < MEAN_TOLERANCE + 1e-5
        assert error.abs().max() < SAMPLE_TOLERANCE + 1e-4
        assert f"{error.mean():+.0e}"[:2] in words


def constant(c):
    """f = c."""
    field = Field(TimeLinear, [len(c), len(c)]).double()
    field.layers[0].bias.data = c
    return field


def test_straightness_is_zero_for_a_constant_field_and_known_for_a_linear_one():
    x = torch.randn(20, 3, dtype=torch.float64)
    c = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    length = float(c.square().mean())
    for fields, kinetic, cost in (((c,), length, length), ((c, -c), 2 * length, 0)):
        summary = evaluate_vectors(flow_of(*map(constant, fields)), x)  # each piece is straight
        assert summary["straightness"] == pytest.approx(0, abs=1e-12)
        assert summary["kinetic"] == pytest.approx(kinetic)
        assert summary["transport_cost"] == pytest.approx(cost, abs=1e-12)
        assert summary["inverse_error"] < 1e-12
    a = 0.9  # z(t) = e^(a t) z(0)
    summary = evaluate_vectors(flow_of(Linear(a * torch.eye(3, dtype=torch.float64))), x)
    expected = 1 - 2 * math.expm1(a) ** 2 / (a * math.expm1(2 * a))
    assert summary["straightness"] == pytest.approx(expected, rel=1e-5)
    cost = float(x.square().mean()) * math.expm1(a) ** 2
    assert summary["transport_cost"] == pytest.approx(cost, rel=1e-6)
    assert summary["jacobian"] == pytest.approx(a**2)
    bits = -(log_normal(math.exp(a) * x).mean() + 3 * a) / (3 * math.log(2))
    assert summary["bits_per_dim"] == pytest.approx(float(bits), rel=1e-6)


def test_the_result_belongs_to_the_seed_and_does_not_depend_on_the_batch_size():
    x = torch.randint(17, (30, 1, 8, 8), dtype=torch.uint8)
    flow = make_flow((1, 8, 8), test=Method("euler", steps=2)).eval()
    (whole, columns), (parts, columns_of_parts), (again, _), (other, _) = (
        evaluate(flow, ImageTransform(17, 1e-5), in_batches(x, size), noises=3, seed=seed)
        for size, seed in ((30, 0), (7, 0), (30, 0), (30, 1))
    )
    for name in ("bits_per_dim", "kinetic", "jacobian", "transport_cost", "bounds", "midpoint"):
        assert close(columns[name], columns_of_parts[name], 1e-6), name
    assert whole["bits_per_dim"] == pytest.approx(parts["bits_per_dim"], abs=1e-6)
    assert whole == again
    assert whole["nfe_by_piece"] == [2.0] * len(flow.pieces)
    assert whole["nfe"] == whole["nfe_min"] == whole["nfe_max"] == 2 * len(flow.pieces)
    assert abs(whole["bits_per_dim"] - other["bits_per_dim"]) > 1e-4


def test_samples_that_are_not_finite_are_counted_in_the_error():
    x = torch.randn(8, 2)
    x[[1, 5, 6]] = float("inf")
    with pytest.raises(Diverged, match="bits/dim of 3 of 8 samples are not finite"):
        evaluate_vectors(identity((2,)), x)
