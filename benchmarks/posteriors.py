"""rnode.sbi beside sbi's neural spline flow: posteriors after equal CPU time.

pip install -e '.[sbi]'
python benchmarks/posteriors.py [--seconds 60] [--seeds 0 1] [--quick]

NPE trains both on 10,000 simulations of two tasks of Lueckmann et al. (2021, arXiv:2101.04653), in
batches of 200: NSF by sbi's learning rate of 5e-4, RNODE by 4e-3. The weights with the best
validation are kept. C2ST is the accuracy of a random forest that tells samples of the posterior
from those of a reference, the mean of five observations: 0.5 is best, 1 is worst.
"""

import argparse
import copy
import math
import statistics
import time

import torch
from sbi.inference import DirectPosterior
from sbi.neural_nets import posterior_nn
from sbi.utils import BoxUniform
from sbi.utils.metrics import c2st
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.nn.utils import clip_grad_norm_

from common import write_record
from rnode.sbi import build

CONTENDERS = {"RNODE": (build, 4e-3), "NSF (sbi)": (posterior_nn("nsf"), 5e-4)}
SIMULATIONS, VALIDATION, BATCH, OBSERVATIONS, SAMPLES = 10_000, 1000, 200, 5, 2000
CHAINS, STEPS = SAMPLES, 4000  # of the Markov chains


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="CPU seconds of training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--quick", action="store_true", help="two seconds each")
    options = parser.parse_args()
    seconds = 2 if options.quick else options.seconds
    rows = []
    for task, (simulate, reference, prior) in TASKS.items():
        torch.manual_seed(1000)
        observed = simulate(prior.sample((OBSERVATIONS,)))
        truth = [reference(x) for x in observed]
        row = {"task": task, "parameters": str(len(prior.sample())), "data": str(len(observed[0]))}
        for name, (builder, rate) in CONTENDERS.items():
            found = []
            for seed in options.seeds:
                torch.manual_seed(seed)
                theta = prior.sample((SIMULATIONS,))
                estimator = train(builder, theta, simulate(theta), rate, seconds)
                posterior = DirectPosterior(estimator, prior)
                scores = []
                for x, exact in zip(observed, truth, strict=True):
                    samples = posterior.sample((SAMPLES,), x=x, show_progress_bars=False)
                    scores.append(float(c2st(exact, samples)))
                found.append(statistics.mean(scores))
                print(f"{task}, {name}, seed {seed}: C2ST {found[-1]:.3f}", flush=True)
            row[name] = ", ".join(f"{score:.3f}" for score in found)
        rows.append(row)
    write_record("sbi", f"C2ST after {seconds:.0f} CPU seconds, by seed", rows)


def train(builder, theta: Tensor, x: Tensor, rate: float, seconds: float) -> torch.nn.Module:
    """Train an estimator of theta given x; the clock counts training and validation."""
    estimator = builder(theta, x)
    optimizer = torch.optim.Adam(estimator.parameters(), rate)
    best, weights = math.inf, None
    end = time.process_time() + seconds
    while time.process_time() < end:
        estimator.train()
        for batch in torch.randperm(SIMULATIONS - VALIDATION).split(BATCH):
            optimizer.zero_grad()
            estimator.loss(theta[batch], x[batch]).mean().backward()
            clip_grad_norm_(estimator.parameters(), 5.0)
            optimizer.step()
        estimator.eval()
        with torch.no_grad():
            loss = float(estimator.loss(theta[-VALIDATION:], x[-VALIDATION:]).mean())
        if loss < best:
            best, weights = loss, copy.deepcopy(estimator.state_dict())
    estimator.load_state_dict(weights)
    return estimator


def moons(theta: Tensor) -> Tensor:
    """theta (N, 2) → x (N, 2): a crescent, whose place depends on |θ₁ + θ₂| and θ₂ − θ₁."""
    place = torch.stack([-(theta.sum(1).abs()), theta[:, 1] - theta[:, 0]], 1) / math.sqrt(2)
    return crescent(len(theta)) + place


def crescent(count: int) -> Tensor:
    angle, radius = math.pi * (torch.rand(count) - 0.5), 0.1 + 0.01 * torch.randn(count)
    return torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], 1)


def posterior_of_moons(x: Tensor) -> Tensor:
    """Exact: the place is x less the crescent, and the sign of θ₁ + θ₂ is free."""
    place = math.sqrt(2) * (x - crescent(100 * SAMPLES))
    total = -place[:, 0] * (2 * torch.randint(2, (len(place),)) - 1)
    theta = torch.stack([total - place[:, 1], total + place[:, 1]], 1) / 2
    return theta[(place[:, 0] <= 0) & (theta.abs() <= 1).all(1)][:SAMPLES]


def normal(theta: Tensor) -> MultivariateNormal:
    """The distribution of a point of SLCP, given theta (N, 5)."""
    s1, s2, correlation = theta[:, 2] ** 2, theta[:, 3] ** 2, theta[:, 4].tanh()
    second = torch.stack([correlation * s2, (1 - correlation**2).sqrt() * s2], 1)
    first = torch.stack([s1, torch.zeros_like(s1)], 1)
    tril = torch.stack([first, second], 1)
    return MultivariateNormal(theta[:, :2], scale_tril=tril, validate_args=False)


def slcp(theta: Tensor) -> Tensor:
    """theta (N, 5) → x (N, 8): four points of a normal distribution in the plane."""
    return normal(theta).sample((4,)).transpose(0, 1).flatten(1)


def posterior_of_slcp(x: Tensor) -> Tensor:
    """Metropolis–Hastings from weighted samples of the prior; the signs of θ₃ and θ₄ are free."""

    def log_posterior(theta: Tensor) -> Tensor:
        inside = (theta.abs() <= 3).all(1)
        log_p = normal(theta.double()).log_prob(x.double().view(4, 1, 2)).sum(0)
        return torch.where(inside, log_p, -math.inf)

    theta = TASKS["SLCP"][2].sample((1_000_000,))
    theta = theta[torch.multinomial(log_posterior(theta).softmax(0), CHAINS, replacement=True)]
    scales, log_p = theta.abs().std(0), log_posterior(theta)
    for _ in range(STEPS):
        scale = scales * 10 ** (-2 * torch.rand(CHAINS, 1))
        proposal = theta + scale * torch.randn_like(theta)
        proposed = log_posterior(proposal)
        accepted = torch.rand(CHAINS).log() < proposed - log_p
        theta = torch.where(accepted[:, None], proposal, theta)
        log_p = torch.where(accepted, proposed, log_p)
    theta[:, 2:4] *= 2 * torch.randint(2, (CHAINS, 2)) - 1
    return theta


TASKS = {
    "two moons": (moons, posterior_of_moons, BoxUniform(-torch.ones(2), torch.ones(2))),
    "SLCP": (slcp, posterior_of_slcp, BoxUniform(-3 * torch.ones(5), 3 * torch.ones(5))),
}

if __name__ == "__main__":
    main()
