"""sbi trains a flow as its density estimator, of parameters (NPE) and of simulations (NLE)."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal

sbi = pytest.importorskip("sbi.inference")
pytestmark = pytest.mark.slow(reason="needs the extra sbi; trains two estimators")
PRIOR = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)


def trained(method, build):
    """Of x = θ + noise, both standard normal: θ given x has mean x/2 and variance 1/2."""
    theta = PRIOR.sample((3000,))
    x = theta + torch.randn(3000, 2)
    inference = method(PRIOR, density_estimator=build, show_progress_bars=False)
    options = {"learning_rate": 1e-2, "training_batch_size": 500, "max_num_epochs": 30}
    return inference, inference.append_simulations(theta, x).train(**options)


def test_npe_finds_a_posterior_in_closed_form():
    from rnode.sbi import build

    inference, estimator = trained(sbi.NPE, build)
    posterior = inference.build_posterior()
    x = torch.tensor([1.0, -0.5])
    exact = Independent(Normal(x / 2, torch.full((2,), math.sqrt(0.5))), 1)
    theta = exact.sample((2000,))
    difference = exact.log_prob(theta) - posterior.log_prob(theta, x=x)
    assert abs(difference.mean()) < 0.05  # the Kullback–Leibler divergence
    sampled = posterior.sample((4000,), x=x, show_progress_bars=False)
    torch.testing.assert_close(sampled.mean(0), x / 2, rtol=0, atol=0.1)
    torch.testing.assert_close(sampled.T.cov(), torch.eye(2) / 2, rtol=0, atol=0.1)
    several = torch.randn(3, 2)
    assert estimator.sample((5, 4), several).shape == (5, 4, 3, 2)
    assert estimator.log_prob(theta[:21].view(7, 3, 2), several).shape == (7, 3)
    assert estimator.log_prob(theta[:3], several).shape == (1, 3)
    assert estimator.loss(theta[:3], several).shape == (3,)


def test_nle_finds_a_likelihood_in_closed_form():
    from rnode.sbi import build

    _, estimator = trained(sbi.NLE, lambda theta, x: build(x, theta))
    theta = torch.tensor([[0.5, -1.0]])
    exact = Independent(Normal(theta, torch.ones(1, 2)), 1)
    x = exact.sample((2000,))
    with torch.no_grad():
        difference = exact.log_prob(x) - estimator.log_prob(x, theta)
    assert abs(difference.mean()) < 0.05
