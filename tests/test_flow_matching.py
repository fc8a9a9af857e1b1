"""Flow matching, alone and before equation (17)."""

import math

import pytest
import torch
from torch import nn

from helpers import RK4, SMALL, call, column, metrics, no_c, refused
from rnode import Flow, Method, Piece, Probes, Solver, log_normal, mlp
from rnode.matching import flow_matching

pytestmark = pytest.mark.usefixtures("blank_figures")

TABLE = ["dataset=toy", "pretrain=flow_matching", *SMALL, "dataset.train=480", "model.hidden=8"]
SOLVER = Solver(RK4, Method("dopri5", rtol=1e-9, atol=1e-9), dtype="float64")


def flow_of(*factors):
    """f(t, z) = factor(t) z in each piece."""
    fields = [lambda t, z, c, factor=factor: factor(t) * z for factor in factors]
    return Flow((3,), [Piece(field) for field in fields], SOLVER, Probes("exact"))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_velocity_of_the_lines_is_learned_exactly_where_it_is_known(count):
    """From x = 0 the line of ε is z = s ε; piece k has s = (k + t) / count, so f = z / (k + t)."""
    x = torch.zeros(5000, 3, dtype=torch.float64)
    exact = flow_of(*(lambda t, k=k: 1 / (k + t) for k in range(count)))
    assert flow_matching(exact, x, no_c(x)).item() < 1e-24
    still = flow_of(*count * [lambda t: 0 * t])  # Σ E ε²/count²
    assert flow_matching(still, x, no_c(x)).item() == pytest.approx(1 / count, rel=0.05)


def test_the_best_field_between_gaussians_has_the_density_of_the_data():
    """For x ~ N(0, σ²), E[ε − x | z] = z (s − (1 − s) σ²) / ((1 − s)² σ² + s²)."""
    sigma = 0.3

    def best(t):
        return (t - (1 - t) * sigma**2) / ((1 - t) ** 2 * sigma**2 + t**2)

    flow, x = flow_of(best), sigma * torch.randn(20000, 3, dtype=torch.float64)
    expected = log_normal(x[:8] / sigma) - 3 * math.log(sigma)
    torch.testing.assert_close(flow.eval().log_prob(x[:8]), expected, rtol=1e-7, atol=1e-7)
    losses = []
    for shift in (-0.1, 0.0, 0.1):
        torch.manual_seed(1)
        shifted = flow_of(lambda t, shift=shift: best(t) + shift)
        losses.append(flow_matching(shifted, x, no_c(x)).item())
    assert min(losses) == losses[1]


def test_every_weight_of_a_conditional_flow_gets_the_gradient_of_a_loop_over_samples():
    flow = mlp((2,), SOLVER, Probes(), hidden=8, k=3).double()
    for p in flow.parameters():
        nn.init.normal_(p, std=0.3)
    x, c = torch.randn(2, 7, 2, dtype=torch.float64)[0], torch.randn(7, 3, dtype=torch.float64)
    torch.manual_seed(2)
    found = torch.autograd.grad(flow_matching(flow, x, c), list(flow.parameters()))
    torch.manual_seed(2)
    noise, t = torch.randn_like(x), torch.rand_like(x[:, 0])
    field = flow.pieces[0].field
    z = (1 - t[:, None]) * x + t[:, None] * noise
    velocities = torch.cat([field(t[i], z[i, None], c[i, None]) for i in range(7)])
    loop = (velocities - (noise - x)).square().mean()
    expected = torch.autograd.grad(loop, list(flow.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_both_parts_stand_on_one_curve(tmp_path, capsys):
    more = ["trainer.enable_progress_bar=true", "trainer.limit_train_batches=10"]
    more += ["callbacks.interval=null"]
    call("train", *TABLE, "callbacks.pretraining.share=0.5", *more, f"hydra.run.dir={tmp_path}")
    rows = metrics(tmp_path)
    losses = [int(row["step"]) for row in rows if row.get("train/loss")]
    likely = [int(row["step"]) for row in rows if row.get("train/bits_per_dim")]
    assert losses == list(range(30))
    assert likely == list(range(15, 30))
    assert len(column(tmp_path, "val/bits_per_dim")) == 3
    rates = column(tmp_path, "train/lr")
    assert rates[15] == pytest.approx(rates[0] / 2)  # it rises anew, under the same cosine
    assert rates[15] < rates[20] < rates[5]
    said = capsys.readouterr().out
    assert "step 15: flow matching ends, equation (17) begins" in said
    assert "a step of flow matching takes 1 NFE" in said
    assert "a step of equation (17) takes" in said


def test_a_flow_of_images_is_refused(capsys):
    message, code = refused(capsys, "train", "pretrain=flow_matching", *SMALL)
    assert code == 2
    assert "FactorOut and Squeeze, so no straight line" in message
