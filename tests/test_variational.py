"""Variational dequantization as a layer of a flow."""

import pytest
import torch
from torch import nn

from helpers import DOPRI5, RK4, TWO_STEPS, call, column, no_c
from rnode import ImageTransform, Probes, Solver, VariationalDequantization, multiscale

pytestmark = pytest.mark.usefixtures("blank_figures")

LEVELS, ALPHA = 5, 0.05


@pytest.fixture
def layer():
    layer = VariationalDequantization(2, LEVELS, ALPHA, hidden=4).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    return layer


def images(count):
    """Grey levels, and y of their uniform noise."""
    x = torch.randint(LEVELS, (count, 2, 4, 4), dtype=torch.uint8)
    noise = torch.rand(x.shape, dtype=torch.float64)
    return x, ImageTransform(LEVELS, ALPHA)(x, torch.arange(count), no_c(x), noise).y


def test_its_log_determinant_is_that_of_its_full_jacobian_and_its_inverse_undoes_it(layer):
    """The grey levels, on which a and b depend, do not change with the noise."""
    x, y = images(9)
    untrained, zero = VariationalDequantization(2, LEVELS, ALPHA).double()(y)
    torch.testing.assert_close(untrained, y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(zero, torch.zeros(9).double(), rtol=0, atol=1e-9)
    z, log_det = layer(y)
    jacobian = torch.autograd.functional.jacobian(lambda y: layer(y)[0].sum(0), y)
    found = torch.linalg.slogdet(jacobian.view(32, 9, 32).transpose(0, 1)).logabsdet
    torch.testing.assert_close(found, log_det, rtol=1e-9, atol=1e-9)
    assert (z - y).abs().max() > 0.1
    torch.testing.assert_close(layer.inverse(z, []), y, rtol=1e-6, atol=1e-6)
    transform = ImageTransform(LEVELS, ALPHA)
    assert torch.equal(transform.dequantize.inverse(transform.logit.inverse(z)), x)


def test_a_flow_counts_its_log_determinant_and_inverts_it(layer):
    flow = multiscale((2, 4, 4), Solver(RK4, DOPRI5, dtype="float64"), Probes("exact"), hidden=4)
    _, y = images(3)
    plain = flow.eval().log_prob(layer(y)[0]) + layer(y)[1]
    flow.layers.insert(0, layer)
    torch.testing.assert_close(flow.log_prob(y), plain)
    torch.testing.assert_close(flow.inverse(flow(y).z), y, rtol=1e-4, atol=1e-4)
    assert flow.trajectory(flow(y).z).shape == (3, 3, 2, 4, 4)


def test_a_run_with_learned_noise_is_evaluated_from_its_checkpoint(tmp_path):
    run = tmp_path / "run"
    few = ["trainer.limit_train_batches=2", "dataset.validation=8", "dataset.test=8"]
    call("train", *TWO_STEPS, *few, "dequantization=variational", f"hydra.run.dir={run}")
    call("evaluate", f"{run}/best.ckpt", "samples=2", f"hydra.run.dir={tmp_path / 'evaluation'}")
    weights = torch.load(run / "best.ckpt", weights_only=True)["state_dict"]
    assert "flow.layers.0.network.4.weight" in weights
    assert weights["flow.layers.0.network.4.bias"].abs().max() > 0
    assert len(column(run, "test/bits_per_dim")) == 1
