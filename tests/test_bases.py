"""Base distributions, and flows that start at them."""

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from helpers import close, make_flow, no_c
from rnode import Flow, Gaussian, Mixture, Normal

J, K, D = 3, 2, 3  # components, conditions, dimensions


@pytest.fixture
def joint():
    """Weights, means and covariances of a mixture of (c, z)."""
    A = torch.randn(J, K + D, K + D, dtype=torch.float64)
    covariances = A @ A.mT + 0.3 * torch.eye(K + D)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    return weights, torch.randn(J, K + D, dtype=torch.float64), covariances


def torchs(weights, means, covariances):
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances))


def test_a_mixture_given_c_is_the_joint_density_over_that_of_c(joint):
    weights, means, covariances = joint
    c, z = torch.randn(7, K).double(), torch.randn(7, D).double()
    of_c = torchs(weights, means[:, :K], covariances[:, :K, :K])
    expected = torchs(*joint).log_prob(torch.cat([c, z], 1)) - of_c.log_prob(c)
    torch.testing.assert_close(Mixture(*joint, k=K).log_prob(z, c), expected)
    unconditional = torch.cat([c, z], 1)
    expected = torchs(*joint).log_prob(unconditional)
    actual = Mixture(*joint).log_prob(unconditional, no_c(z))
    torch.testing.assert_close(actual, expected)


def test_samples_of_a_mixture_given_c_have_its_mean_and_covariance(joint):
    weights, means, covariances = joint
    c = torch.randn(1, K).double()
    of_c = MultivariateNormal(means[:, :K], covariances[:, :K, :K])
    given = (weights.log() + of_c.log_prob(c)).softmax(0)
    gain = covariances[:, K:, :K] @ covariances[:, :K, :K].inverse()
    centres = means[:, K:] + ((c - means[:, :K])[:, None] @ gain.mT)[:, 0]
    spreads = covariances[:, K:, K:] - gain @ covariances[:, :K, K:]
    mean = given @ centres
    off = centres - mean
    covariance = torch.einsum("j,jab->ab", given, spreads + off[:, :, None] * off[:, None])
    samples = Mixture(*joint, k=K).sample(c.expand(100_000, -1))
    assert close(samples.mean(0), mean, 0.05)
    assert close(samples.T.cov(), covariance, 0.03 * float(covariance.diagonal().max()))
    cold = Mixture(*joint, k=K).sample(c.expand(1000, -1), temperature=1e-6)
    assert torch.cdist(cold, centres).amin(1).max() < 1e-3


@pytest.mark.parametrize("shape", [(3,), (1, 8, 8)])
def test_a_new_flow_has_the_density_of_its_base(shape):
    flow = make_flow(shape)
    d = flow.d
    A = torch.randn(d, d, dtype=torch.float64)
    mean, covariance = torch.randn(d).double(), A @ A.T + torch.eye(d)
    for parameter in flow.parameters():
        torch.nn.init.zeros_(parameter)
    flow = Flow(shape, list(flow.layers), flow.solver, flow.probes, 0, Gaussian(mean, covariance))
    x = torch.randn(5, *shape, dtype=torch.float64)
    for training in (True, False):
        expected = MultivariateNormal(mean, covariance).log_prob(flow.train(training)(x).z)
        torch.testing.assert_close(flow.log_prob(x), expected, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        z = flow(flow.sample(400)).z
    far = (z.mean(0) - mean).abs() / (covariance.diagonal() / 400).sqrt()
    assert far.max() < 5  # standard errors


def test_a_base_belongs_to_the_state_of_its_flow(joint):
    flow = make_flow((D,), k=K)
    flow.base = Mixture(*joint, k=K)
    names = set(flow.state_dict())
    assert {"base.log_weights", "base.means", "base.factors"} <= names
    assert not {name for name, _ in flow.named_parameters()} & {"base.means", "base.factors"}
    assert isinstance(make_flow((D,)).base, Normal)
