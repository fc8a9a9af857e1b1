"""A flow as a distribution of torch, and samples with log-probabilities by one solve."""

import math
import re

import pytest
import torch
from torch.distributions import (
    AffineTransform,
    Distribution,
    MultivariateNormal,
    TransformedDistribution,
)

from helpers import ROOT, TIGHT, make_flow
from rnode import Method, Mixture, Probes, VariationalDequantization

EXACT = {"divergence": "exact", "test": TIGHT}


@pytest.mark.parametrize(
    ("shape", "options"),
    [((3,), {"k": 2}), ((3,), {"pieces": 2, "layers": 3}), ((1, 4, 4), {}), ((2, 8, 4), {"k": 1})],
)
def test_the_log_probability_of_samples_is_that_of_log_prob(shape, options):
    """Of fields that compute their divergence (dense, three layers), and of unit vectors."""
    flow = make_flow(shape, **EXACT, **options).eval()
    c = torch.randn(2, 3, flow.k, dtype=torch.float64)
    x, log_prob = flow.rsample_and_log_prob((2, 3), c)
    assert x.shape == (2, 3, *shape)
    identity = flow.base.log_prob(flow.as_z(x.flatten(0, 1)), c).view(2, 3)
    assert (log_prob - identity).abs().max() > 0.01
    torch.testing.assert_close(log_prob, flow.log_prob(x, c), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("integrals", ["system", "simpson", "radau"])
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_the_methods_of_training_solve_backwards_too(integrals, gradient):
    method = Method("rk4", integrals, steps=16)
    flow = make_flow((2,), train=method, gradient=gradient, layers=3, **EXACT)
    x, log_prob = flow.rsample_and_log_prob(5)
    torch.testing.assert_close(log_prob, flow.eval().log_prob(x), rtol=1e-5, atol=1e-5)


def test_probes_estimate_the_log_probability_without_bias():
    flow = make_flow((2,), test=Method("rk4", steps=8)).eval()
    z = torch.randn(1, 2).double().expand(4000, -1)
    flow.base.sample = lambda c: z
    x, log_prob = flow.rsample_and_log_prob(4000)
    flow.test_probes = Probes("exact")
    error = log_prob - flow.log_prob(x[0])
    assert abs(error.mean()) < 3 * error.std() / 4000**0.5
    assert error.std() > 0.01


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
def test_the_gradient_is_that_of_the_change_of_variables(gradient):
    """d/dθ of Σ x and of log p(x), by autograd through log q(z) − log|det dx/dz|."""
    options = {"train": Method("rk4", steps=40), "gradient": gradient, **EXACT}
    flow = make_flow((2,), hidden=4, layers=3, k=1, **options)
    c, z = torch.randn(3, 1).double(), torch.randn(3, 2).double()
    flow.base.sample = lambda c: z
    x, log_prob = flow.rsample_and_log_prob(3, c)
    (x.sum() + log_prob.square().sum()).backward()
    gradient = [parameter.grad.clone() for parameter in flow.parameters()]
    flow.zero_grad()
    x = flow.inverse(z, c)

    def inverse(z):
        return flow.inverse(z, c).sum(0)

    jacobian = torch.autograd.functional.jacobian(inverse, z, create_graph=True).transpose(0, 1)
    log_prob = flow.base.log_prob(z, c) - torch.linalg.slogdet(jacobian).logabsdet
    (x.sum() + log_prob.square().sum()).backward()
    for ours, parameter in zip(gradient, flow.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-5, atol=1e-6)


def test_a_base_with_conditions_and_a_variational_dequantization():
    covariance = torch.eye(3).double() + 0.5
    weights, means = torch.tensor([0.3, 0.7]).double(), torch.randn(2, 3).double()
    base = Mixture(weights, means, torch.stack([covariance, 2 * covariance]), k=1)
    flow = make_flow((2,), k=1, **EXACT).eval()
    flow.base = base
    c = torch.randn(50, 1).double()
    x, log_prob = flow.rsample_and_log_prob(50, c)
    torch.testing.assert_close(log_prob, flow.log_prob(x, c), rtol=1e-7, atol=1e-7)
    flow = make_flow((1, 4, 4), **EXACT).eval()
    dequantization = VariationalDequantization(1, 17, 0.05).double()
    torch.nn.init.normal_(dequantization.network[-1].bias)
    flow.layers.insert(0, dequantization)
    flow.base.sample = lambda c: torch.randn(5, 16).double() / 2  # inside of the grey levels
    x, log_prob = flow.rsample_and_log_prob(5)
    torch.testing.assert_close(log_prob, flow.log_prob(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [(), (4,), (2, 1)])
@pytest.mark.parametrize("shape", [(3,), (1, 4, 4)])
def test_shapes_are_those_of_a_normal_of_torch(shape, batch):
    flow = make_flow(shape, k=2).eval()
    ours = flow.distribution(torch.randn(*batch, 2).double())
    d = flow.d
    theirs = MultivariateNormal(torch.zeros(*batch, d).double(), torch.eye(d).double())
    wide = (5, 2, 4)
    for p, normal in ((ours, theirs), (ours.expand(wide), theirs.expand(wide))):
        assert p.batch_shape == normal.batch_shape
        assert p.event_shape == shape
        for sample_shape in ((), (6,), (3, 2)):
            x = p.sample(sample_shape)
            assert not x.requires_grad
            flat = normal.sample(sample_shape)
            assert x.shape == flat.unflatten(-1, shape).shape
            assert p.log_prob(x).shape == normal.log_prob(flat).shape
        x = p.rsample((6,))
        assert x.requires_grad
        assert x.shape == normal.rsample((6,)).unflatten(-1, shape).shape
        one = torch.zeros(shape, dtype=torch.float64)  # broadcasts with the batch shape
        assert p.log_prob(one).shape == normal.log_prob(one.flatten()).shape


def test_a_distribution_is_the_flow_given_its_conditions():
    flow = make_flow((2,), k=1, **EXACT).eval()
    c = torch.randn(3, 1).double()
    p = flow.distribution(c)
    x = p.sample((4,))
    torch.testing.assert_close(p.log_prob(x), flow.log_prob(x, c.expand(4, 3, 1)))
    torch.testing.assert_close(p.expand((4, 3)).log_prob(x), p.log_prob(x))
    scaled = TransformedDistribution(p, AffineTransform(1.0, 2.0))
    torch.testing.assert_close(
        scaled.log_prob(1 + 2 * x), p.log_prob(x) - 2 * torch.tensor(2).log()
    )
    plain = make_flow((2,), **EXACT).eval()
    assert plain.distribution().expand((3,)).sample().shape == (3, 2)
    assert p.support.event_dim == 1


def test_values_outside_of_the_support_are_refused(monkeypatch):
    monkeypatch.setattr(Distribution, "_validate_args", True)  # importing zuko sets it to False
    p = make_flow((2,)).distribution()
    with pytest.raises(ValueError, match="support"):
        p.log_prob(torch.tensor([1.0, float("nan")]))


def test_the_page_about_energies_finds_the_free_energy():
    """Against quadrature on a grid: without q's second well, F would be higher by 0.3."""
    text = (ROOT / "docs" / "energies.md").read_text(encoding="utf-8")
    names = {}
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(block, names)
    axis = torch.linspace(-4, 4, 801, dtype=torch.float64)
    log_z = (-names["energy"](torch.cartesian_prod(axis, axis))).logsumexp(0)
    free_energy = -float(log_z + 2 * (axis[1] - axis[0]).log())
    assert math.isclose(names["free_energy"], free_energy, abs_tol=0.02)
    assert 9000 < names["sample_size"] < 10_000
