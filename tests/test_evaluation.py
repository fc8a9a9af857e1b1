"""What evaluate.py reports, against closed forms."""

import math

import pytest
import torch
from torch import nn

from conftest import DOPRI5, RK4, Linear, close, make_flow
from rnode import Dequantize, Field, Flow, Logit, Method, Piece, Probes, Solver, TimeLinear, log_normal, mlp, multiscale
from rnode.data import Batch, DataModule, Splits
from rnode.evaluation import (
    displacements,
    evaluate,
    importance_bound,
    measure,
    probe_error,
    standard_error,
)

LEVELS, ALPHA = 4, 0.05


def module(rows, *, levels=None, batch_size=64):
    """A DataModule whose every split is `rows`."""

    def source():
        return Splits(rows, rows, rows)

    alpha = None if levels is None else ALPHA
    data = DataModule(source, rows.shape[1:], 32, batch_size, levels=levels, alpha=alpha)
    data.setup()
    return data


def identity(shape, divergence="exact"):
    """f = 0, as every flow starts; one step solves it."""
    return mlp(shape, Solver(RK4, Method("euler", step_size=1.0)), Probes(divergence), hidden=4).eval()


def linear_flow(A, divergence="exact", count=1):
    solver = Solver(RK4, Method("dopri5", rtol=1e-9, atol=1e-9), dtype="float64")
    return Flow(A.shape[:1], [], [Piece(Linear(A))], A.shape[:1], solver, Probes(divergence, count)).double().eval()


def discrete_bits(x):
    """−log₂ P(x) / d of the identity flow: the normal's mass between the logits of each grey level's two edges."""
    normal = torch.distributions.Normal(0.0, 1.0)

    def cumulative(level):
        s = ALPHA + (1 - 2 * ALPHA) * level.double() / LEVELS
        return normal.cdf(torch.logit(s))

    mass = cumulative(x + 1) - cumulative(x)
    return -mass.log2().flatten(1).mean(1)


def test_the_importance_weighted_bound_falls_to_the_exact_discrete_likelihood():
    x = torch.randint(LEVELS, (1000, 1, 2, 2), dtype=torch.uint8)
    summary, columns = evaluate(identity((1, 2, 2)), module(x, levels=LEVELS), "test", 256, 0)
    exact = discrete_bits(x)
    bounds = columns["bounds"]
    means = bounds.mean(1)
    error = standard_error(bounds[0] - exact)
    assert summary["bits_per_dim"] == pytest.approx(float(means[0]), abs=1e-6)
    assert summary["bound"] == pytest.approx(float(means[-1]), abs=1e-12)
    assert len(summary["bound_by_noises"]) == 256
    # The identity's density over a grey level is far from flat, so that one noise is worth clearly less than many.
    assert means[0] - exact.mean() > 5 * error
    assert abs(means[-1] - exact.mean()) < 0.002
    for few, many in ((1, 2), (2, 4), (4, 16), (16, 64), (64, 256)):
        assert means[many - 1] < means[few - 1] + 0.002
    assert (bounds[-1] - exact).abs().max() < 0.15  # each image's too


def test_the_uniform_figure_of_the_identity_is_the_closed_form_integral():
    """E_u[−log₂ p(x + u)] by the midpoint rule on a fine grid, against the average over many noises of one image."""
    x = torch.tensor([[[[0, 1], [2, 3]]]], dtype=torch.uint8)
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    dequantize, logit = Dequantize(LEVELS), Logit(ALPHA)
    per_pixel = []
    for level in range(LEVELS):
        v, log_det_u = dequantize(torch.full((2000, 1), level), u[:, None])
        y, log_det_y = logit(v)
        per_pixel.append(-(log_normal(y) + log_det_u + log_det_y).mean() / math.log(2))
    expected = float(sum(per_pixel)) / 4
    rows = x.expand(4000, -1, -1, -1)
    summary, _ = evaluate(identity((1, 2, 2)), module(rows, levels=LEVELS, batch_size=500), "val", 1, 3)
    assert abs(summary["bits_per_dim"] - expected) < 4 * summary["standard_error_images"]
    assert summary["standard_error_images"] < 0.01


def test_the_midpoint_is_the_density_at_the_centre_of_each_bin():
    x = torch.randint(LEVELS, (10, 1, 2, 2), dtype=torch.uint8)
    summary, columns = evaluate(identity((1, 2, 2)), module(x, levels=LEVELS), "test", 1, 0)
    s = ALPHA + (1 - 2 * ALPHA) * (x.double() + 0.5) / LEVELS
    slope = (1 - 2 * ALPHA) / LEVELS / (s * (1 - s))
    expected = -(torch.distributions.Normal(0.0, 1.0).log_prob(torch.logit(s)) + slope.log()).flatten(1).mean(1) / math.log(
        2
    )
    torch.testing.assert_close(columns["midpoint"], expected, rtol=1e-5, atol=1e-5)
    assert summary["midpoint"] == pytest.approx(float(expected.mean()), abs=1e-5)


def test_the_bound_by_the_textbook_formula():
    bits, d = 3 + torch.rand(5, 7, dtype=torch.float64), 11
    likelihood = 2.0 ** (-bits * d)
    expected = torch.stack([-(likelihood[: k + 1].mean(0).log2()) / d for k in range(5)])
    torch.testing.assert_close(importance_bound(bits, d), expected)


def test_standard_errors_over_samples_cover_at_their_rate():
    """Of the normal itself, whose entropy is known: 95 % of the intervals hold it."""
    entropy = 0.5 * math.log2(2 * math.pi * math.e)
    flow, held = identity((2,)), []
    for repetition in range(300):
        rows = torch.randn(60, 2, generator=torch.Generator().manual_seed(repetition))
        summary, _ = evaluate(flow, module(rows), "test", 1, 0)
        held.append(abs(summary["bits_per_dim"] - entropy) < 1.96 * summary["standard_error_images"])
    assert 0.90 < sum(held) / len(held) < 0.985


def test_standard_errors_over_probes_cover_at_their_rate():
    """Of a linear field, whose divergence is its trace: what the probes add is all the difference from the exact figure."""
    A = torch.tensor([[0.3, 0.8, 0.0], [-0.5, 0.1, 0.4], [0.2, 0.6, -0.7]], dtype=torch.float64)
    data = module(torch.randn(40, 3, dtype=torch.float64))
    exact, _ = evaluate(linear_flow(A), data, "test", 1, 0)
    assert exact["standard_error_probes"] == 0
    flow, held = linear_flow(A, "gaussian"), []
    for seed in range(200):
        summary, _ = evaluate(flow, data, "test", 1, seed)
        held.append(abs(summary["bits_per_dim"] - exact["bits_per_dim"]) < 1.96 * summary["standard_error_probes"])
    assert 0.89 < sum(held) / len(held) < 0.99


def test_the_probes_error_is_the_known_one():
    """Var(εᵀAε) = 2 ‖(A + Aᵀ)/2‖_F² for a normal ε: one solve, l in nats, over d log 2."""
    A = torch.tensor([[0.3, 0.8], [-0.5, 0.1]], dtype=torch.float64)
    summary, _ = evaluate(linear_flow(A, "gaussian"), module(torch.randn(4000, 2, dtype=torch.float64)), "test", 1, 0)
    deviation = (2 * ((A + A.T) / 2).square().sum()).sqrt() / (2 * math.log(2))
    assert summary["standard_error_probes"] == pytest.approx(float(deviation) / 4000**0.5, rel=0.1)
    first = torch.zeros(2)
    assert probe_error(first, torch.tensor([2.0, -2.0])) == pytest.approx(1.0)  # √(mean 4 / 2 / 2)


class Constant(nn.Module):
    """f = c."""

    def __init__(self, c):
        super().__init__()
        self.c = nn.Parameter(c)

    def forward(self, t, z):
        return self.c.expand_as(z)

    def vjp(self, t, z, eps):
        return self(t, z), torch.zeros_like(eps)


def test_straightness_is_zero_for_a_constant_field_and_known_for_a_linear_one():
    rows = torch.randn(20, 3, dtype=torch.float64)
    solver = Solver(RK4, Method("dopri5", rtol=1e-9, atol=1e-9), dtype="float64")
    c = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    constant = Flow((3,), [], [Piece(Constant(c))], (3,), solver, Probes("exact")).eval()
    summary, _ = evaluate(constant, module(rows), "test", 1, 0)
    assert summary["straightness"] == pytest.approx(0, abs=1e-12)
    assert summary["kinetic"] == pytest.approx(float(c.square().mean()))
    assert summary["transport_cost"] == pytest.approx(float(c.square().mean()))
    assert summary["inverse_error"] < 1e-12

    a = 0.9  # z(t) = e^(a t) z(0)
    summary, _ = evaluate(linear_flow(a * torch.eye(3, dtype=torch.float64)), module(rows), "test", 1, 0)
    expected = 1 - 2 * math.expm1(a) ** 2 / (a * math.expm1(2 * a))
    assert 0.05 < expected < 0.2
    assert summary["straightness"] == pytest.approx(expected, rel=1e-5)
    assert summary["transport_cost"] == pytest.approx(float(rows.square().mean()) * math.expm1(a) ** 2, rel=1e-6)


def test_displacements_are_those_of_every_piece():
    flow = make_flow((1, 8, 8)).eval()
    with displacements(flow) as squares, torch.no_grad():
        flow(torch.randn(3, 1, 8, 8).double())
    assert len(squares) == len(flow.pieces)
    assert all(square.shape == (3,) for square in squares)
    with torch.no_grad():
        flow(torch.randn(3, 1, 8, 8).double())
    assert len(squares) == len(flow.pieces)  # the hooks are gone


def test_z_is_compared_with_x_in_its_own_arrangement():
    """With f = 0 nothing moves, whatever is squeezed and factored out on the way."""
    flow = multiscale((3, 16, 16), Solver(RK4, DOPRI5), Probes(), hidden=4).eval()
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(flow.as_x(flow(x).z), x, rtol=0, atol=1e-5)


def test_a_trajectory_goes_from_z_to_x_through_the_closed_form():
    A = torch.tensor([[0.3, 0.8], [-0.5, 0.1]], dtype=torch.float64)
    z = torch.randn(5, 2, dtype=torch.float64)
    frames = linear_flow(A).trajectory(z, 4)
    assert frames.shape == (5, 5, 2)
    for k in range(5):
        torch.testing.assert_close(frames[k], z @ torch.matrix_exp(-A * k / 4).T, rtol=1e-7, atol=1e-7)


def test_a_trajectory_of_an_image_ends_in_its_inverse():
    flow = make_flow((1, 8, 8)).eval()
    z = torch.randn(3, 64).double()
    with torch.no_grad():
        frames = flow.trajectory(z, 2)
        assert frames.shape == (2 * len(flow.pieces) + 1, 3, 1, 8, 8)
        assert torch.equal(frames[0], flow.as_x(z))
        torch.testing.assert_close(frames[-1], flow.inverse(z), rtol=1e-3, atol=1e-4)
        # After the last scale's pieces alone, the halves factored out before are still where z has them.
        moved = (frames[1] - frames[0]).abs()
        assert moved.max() > 1e-4
        held = flow.as_x(torch.cat([torch.ones(1, 32), torch.zeros(1, 32)], 1).double())[0].bool()
        assert moved[:, held].max() == 0


def test_the_result_does_not_depend_on_the_batch_size_and_is_the_seeds_own():
    x = torch.randint(17, (30, 1, 8, 8), dtype=torch.uint8)
    flow = make_flow((1, 8, 8)).eval()
    results = [
        evaluate(flow, module(x, levels=17, batch_size=size), "test", 3, seed)
        for size, seed in ((30, 0), (7, 0), (30, 0), (30, 1))
    ]
    (whole, by_image), (parts, by_image_parts), (again, _), (other, _) = results
    for name in ("bits_per_dim", "kinetic", "jacobian", "transport_cost", "bounds", "midpoint"):
        assert close(by_image[name], by_image_parts[name], 1e-4), name
    assert whole["bits_per_dim"] == pytest.approx(parts["bits_per_dim"], abs=1e-4)
    assert whole == again
    assert abs(whole["bits_per_dim"] - other["bits_per_dim"]) > 1e-4


def test_nfe_is_counted_by_piece_and_batch():
    flow = make_flow((1, 8, 8), test=Method("rk4")).eval()
    data = module(torch.randint(17, (10, 1, 8, 8), dtype=torch.uint8), levels=17, batch_size=4)
    summary, _ = evaluate(flow, data, "test", 2, 0)
    assert summary["nfe_by_piece"] == [16.0] * len(flow.pieces)
    assert summary["nfe"] == summary["nfe_min"] == summary["nfe_max"] == 16 * len(flow.pieces)


def test_measure_gives_bits_and_the_integrals_per_dimension():
    A = torch.tensor([[0.3, 0.8], [-0.5, 0.1]], dtype=torch.float64)
    flow, y = linear_flow(A), torch.randn(6, 2, dtype=torch.float64)
    batch = Batch(y, torch.full((6,), 0.7, dtype=torch.float64), torch.arange(6))
    with torch.no_grad():
        state, measures = measure(flow, batch, [torch.Generator() for _ in range(6)])
    z = y @ torch.matrix_exp(A).T
    expected = -(log_normal(z) + A.trace() + 0.7) / (2 * math.log(2))
    torch.testing.assert_close(measures.bits, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(measures.jacobian, (A.square().sum() / 2).expand(6), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(measures.kinetic, state.E / 2)


def test_a_field_takes_part_without_its_products():
    """The inverse asks for f alone, and counts."""
    piece = Piece(Field(TimeLinear, [2, 4, 2]))
    piece.inverse(torch.randn(3, 2), RK4)
    assert piece.nfe_inverse == 16
