import pytest
import torch
import torch.nn.functional as F

from helpers import no_c
from plain import PlainNet
from rnode import Field, TimeConv2d, TimeLinear
from rnode.networks import _SoftplusSigmoid

T = torch.tensor(0.7, dtype=torch.float64)


def test_softplus_and_sigmoid_are_torchs_with_their_gradients():
    a = torch.linspace(-30, 30, 2001, dtype=torch.float64, requires_grad=True)
    softplus, sigmoid = _SoftplusSigmoid.apply(a)
    expected = F.softplus(a, threshold=1e9)
    torch.testing.assert_close(softplus, expected, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(sigmoid, a.sigmoid())
    few = a[::100].detach().requires_grad_()
    assert torch.autograd.gradcheck(_SoftplusSigmoid.apply, few)
    assert torch.autograd.gradgradcheck(_SoftplusSigmoid.apply, few)
    in_float32, _ = _SoftplusSigmoid.apply(a.float())
    assert (in_float32 - expected).abs().max() < 2e-6


def test_dense_layers_are_initialized_to_keep_the_scale_of_a_signal():
    """Torch's default weights would shrink it to 0.3, 0.09 and 0.03 of itself."""
    field, t = Field(TimeLinear, [64, 256, 256, 256, 64]), torch.tensor(0.0)
    h = torch.randn(500, 64)
    for layer in field.layers[:-1]:
        h = F.softplus(layer(layer.prepare(()), t, h, no_c(h)))
        spread = h.std(dim=0).mean()  # over the samples, in each unit
        assert 0.35 < spread < 1.5


def test_convolutions_are_initialized_with_units_around_zero_that_halve_a_signal():
    """Softplus has the slope ½ at 0. Its mean would act as a random bias."""
    field, t = Field(TimeConv2d, [16, 32, 32, 32, 16]), torch.tensor(0.0)
    h, expected = torch.randn(100, 16, 12, 12), 1.0
    for layer, weights in list(zip(field.layers, field.prepare(h), strict=True))[:-1]:
        out = layer(weights, t, h, no_c(h))
        a = out[..., 4:-4, 4:-4]  # the border sees zeros for softplus
        assert a.mean((0, 2, 3)).abs().mean() < 0.3 * expected  # over samples and pixels
        assert 0.8 * expected < a.std((0, 2, 3)).mean() < 1.2 * expected
        h, expected = F.softplus(out), expected / 2


@pytest.mark.parametrize("count", [1, 3])
def test_field_and_vjp_are_those_of_the_plain_network_by_autograds_full_jacobian(field_z_c, count):
    """Time and c are concatenated in the plain network."""
    field, z, c = field_z_c
    plain = PlainNet(field)
    eps = torch.randn(count, *z.shape, dtype=torch.float64)
    f, eps_jac = field.vjp(T, z, eps, c)
    torch.testing.assert_close(f, plain(T, z, c), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(f, field(T, z, c), rtol=1e-13, atol=1e-13)
    for b in range(len(z)):
        of_sample = torch.func.jacrev(lambda x, b=b: plain(T, x[None], c[b, None])[0])
        jacobian = of_sample(z[b]).view(z[b].numel(), -1)
        expected = eps[:, b].flatten(1) @ jacobian
        torch.testing.assert_close(eps_jac[:, b].flatten(1), expected, rtol=1e-12, atol=1e-12)


def test_f_and_the_vjp_have_the_dtype_of_the_state():
    field, z = Field(TimeConv2d, [1, 8, 1]), torch.randn(2, 1, 4, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        f, eps_jac = field.vjp(torch.tensor(0.5), z, torch.randn(1, *z.shape).double(), no_c(z))
    assert (f.dtype, eps_jac.dtype) == (torch.float64, torch.float64)
