import copy

import pytest
import torch
import torch.nn.functional as F

from plain import PlainNet
from rnode import Field, TimeConv2d, TimeLinear
from rnode.networks import _SoftplusSigmoid


def test_softplus_and_sigmoid_are_torchs_with_their_gradients():
    a = torch.linspace(-30, 30, 2001, dtype=torch.float64, requires_grad=True)
    softplus, sigmoid = _SoftplusSigmoid.apply(a)
    expected = F.softplus(a, threshold=1e9)
    torch.testing.assert_close(softplus, expected, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(sigmoid, a.sigmoid())
    few = a[::100].detach().requires_grad_()
    assert torch.autograd.gradcheck(_SoftplusSigmoid.apply, few)
    assert torch.autograd.gradgradcheck(_SoftplusSigmoid.apply, few)


def test_the_inner_layers_keep_the_scale_of_a_signal():
    """Torch's default weights would shrink it to 0.3, 0.09 and 0.03 of itself."""
    field, t = Field(TimeLinear, [64, 256, 256, 256, 64]), torch.tensor(0.0)
    h = torch.randn(500, 64)
    for layer in field.layers[:-1]:
        h = F.softplus(layer(layer.prepare(()), t, h))
        spread = h.std(dim=0).mean()  # over the samples, in each unit
        assert 0.35 < spread < 1.5


def test_convolutions_start_with_units_around_zero_that_halve_a_signal():
    """Softplus has the slope ½ at 0. Its mean would act as a random bias."""
    field, t = Field(TimeConv2d, [16, 32, 32, 32, 16]), torch.tensor(0.0)
    h, expected = torch.randn(100, 16, 12, 12), 1.0
    for layer, weights in list(zip(field.layers, field.prepare(h), strict=True))[:-1]:
        a = layer(weights, t, h)[..., 4:-4, 4:-4]  # the border sees zeros for softplus
        assert a.mean((0, 2, 3)).abs().mean() < 0.3 * expected  # over samples and pixels
        assert 0.8 * expected < a.std((0, 2, 3)).mean() < 1.2 * expected
        h, expected = F.softplus(layer(weights, t, h)), expected / 2


def test_softplus_in_float32_is_within_rounding():
    a = torch.linspace(-30, 30, 20001)
    softplus, _ = _SoftplusSigmoid.apply(a)
    assert (softplus.double() - F.softplus(a.double())).abs().max() < 2e-6


def test_field_is_the_plain_network_with_time_concatenated(field_and_z):
    field, z = field_and_z
    t = torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(field(t, z), PlainNet(field)(t, z), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [1, 3])
def test_vjp_is_the_product_with_autograds_full_jacobian(field_and_z, count):
    field, z = field_and_z
    t = torch.tensor(0.7, dtype=torch.float64)
    eps = torch.randn(count, *z.shape, dtype=torch.float64)
    f, product = field.vjp(t, z, eps)
    torch.testing.assert_close(f, field(t, z), rtol=1e-13, atol=1e-13)

    def flat(x):
        return field(t, x[None])[0].flatten()

    for b in range(len(z)):
        jacobian = torch.autograd.functional.jacobian(flat, z[b]).flatten(1)
        expected = eps[:, b].flatten(1) @ jacobian
        torch.testing.assert_close(product[:, b].flatten(1), expected, rtol=1e-12, atol=1e-12)


def test_gradient_through_the_vjp_is_autograds_double_backward(field_and_z):
    field, z = field_and_z
    t = torch.tensor(0.4, dtype=torch.float64)
    eps = torch.randn(1, *z.shape, dtype=torch.float64)
    f, product = field.vjp(t, z, eps)
    (f.square().sum() + (product * eps).sum() + product.square().sum()).backward()

    plain = PlainNet(field)
    x = z.clone().requires_grad_()
    f = plain(t, x)
    product = torch.autograd.grad(f, x, eps[0], create_graph=True)[0]
    (f.square().sum() + (product * eps[0]).sum() + product.square().sum()).backward()
    for layer, weight, bias in zip(field.layers, plain.weights, plain.biases, strict=True):
        torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(layer.bias.grad, bias.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("layer", "shape"), [(TimeConv2d, (2, 5, 5)), (TimeLinear, (2,))])
def test_field_starts_as_exactly_zero(layer, shape):
    field = Field(layer, [2, 8, 8, 2])
    f, product = field.vjp(torch.tensor(0.5), torch.randn(4, *shape), torch.randn(1, 4, *shape))
    assert not f.any()
    assert not product.any()


def test_the_weights_are_those_of_convolutions_with_one_channel_more():
    field = Field(TimeConv2d, [3, 64, 64, 64, 3])
    shapes = [tuple(layer.weight.shape) for layer in field.layers]
    assert shapes == [(64, 4, 3, 3), (64, 65, 3, 3), (64, 65, 3, 3), (3, 65, 3, 3)]


@pytest.mark.parametrize("autocast", [False, True])
def test_f_and_the_product_have_the_dtypes_of_the_state(autocast):
    field = Field(TimeConv2d, [1, 8, 1])
    z = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        f, product = field.vjp(torch.tensor(0.5), z, torch.randn(1, *z.shape).double())
    assert (f.dtype, product.dtype) == (torch.float64, torch.float64)


@pytest.mark.slow(reason="torch.compile takes half a minute")
def test_compiled_field_gives_the_same_with_the_same_gradient(field_and_z):
    field, z = field_and_z
    compiled = copy.deepcopy(field)
    compiled.compile()
    t = torch.tensor(0.7, dtype=torch.float64)
    eps = torch.randn(1, *z.shape, dtype=torch.float64)
    for net in (field, compiled):
        f, product = net.vjp(t, z, eps)
        (f.square().sum() + product.square().sum() + net(t, z).sum()).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    for ours, expected in zip(compiled.parameters(), field.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-10, atol=1e-12)
