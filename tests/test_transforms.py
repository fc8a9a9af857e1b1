import math

import pytest
import torch

from rnode import Dequantize, InputError, Logit, bits_per_dim


@pytest.mark.parametrize("alpha", [1e-5, 0.05])
def test_logit_inverse_and_log_det_against_autograd(alpha):
    logit = Logit(alpha)
    u = torch.rand(3, 2, 2, dtype=torch.float64)
    y, log_det = logit(u)
    torch.testing.assert_close(logit.inverse(y), u, rtol=1e-9, atol=1e-9)
    for b in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda x: logit(x[None])[0].flatten(), u[b]).reshape(4, 4)
        torch.testing.assert_close(log_det[b], torch.linalg.slogdet(jacobian).logabsdet)


def test_dequantize_inverse_range_and_log_det():
    x = torch.arange(256, dtype=torch.uint8).view(2, 1, 16, 8)
    for noise in (torch.zeros(x.shape), torch.rand(x.shape), torch.full(x.shape, 1 - 2**-24)):
        u, log_det = Dequantize(256)(x, noise)
        assert u.min() >= 0
        assert u.max() < 1
    u, log_det = Dequantize(256)(x, torch.rand(x.shape) * 0.999)
    assert torch.equal(Dequantize(256).inverse(u), x)
    torch.testing.assert_close(log_det, torch.full((2,), -128 * math.log(256)))


@pytest.mark.parametrize("levels", [256, 17])
def test_uniform_data_score_log2_of_the_levels(levels):
    """A model that is uniform on [0, 1) before the logit: log p(y) = −log|det dy/du|, and bits/dim = log₂ levels."""
    x = torch.randint(levels, (5, 1, 4, 4))
    u, log_det_u = Dequantize(levels)(x, torch.rand(x.shape, dtype=torch.float64))
    _, log_det_y = Logit(0.05)(u)
    bits = bits_per_dim(-log_det_y, log_det_u + log_det_y, d=16)
    torch.testing.assert_close(bits, torch.full_like(bits, math.log2(levels)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("alpha", [0, 0.5, -0.1, 0.7, None, "x"])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(InputError, match=f"alpha={alpha}"):
        Logit(alpha)


@pytest.mark.parametrize("levels", [1, 2.5])
def test_levels_out_of_range_are_refused(levels):
    with pytest.raises(InputError, match=f"levels={levels}"):
        Dequantize(levels)
