"""Density models of this project and of other libraries, each as a training step and a likelihood.

- RNODE, dense: the mlp flow and the settings of dataset=toy (simpson, λ = 0.01, half a cosine, the
  exact divergence). For images it takes one probe, Radau's rule and half the rate, and refines its
  training grid as solver=auto does. Its likelihood is by dopri5
  at 1e-5 with the exact divergence. `RNODE, multiscale` is the flow of dataset=digits with its
  recipe; its likelihood takes one probe. On tables benchmarks/tables.py trains it by `rnode.fit`.
- zuko's CNF: its own loss and adaptive solver, Adam at 1e-3, as in its guide.
- zuko's NSF and MAF: three or five autoregressive transforms, hidden layers of 128, eight bins,
  Adam at 2e-3, which falls as half a cosine. More transforms learn less within the time: of
  diamonds, NSF has −4.65 test nats after 35 s with three and −4.27 with five, and ten wider ones,
  as in its paper (Durkan et al., 2019), make about two steps in a second on one core.
- normflows' Glow, for images: two scales of five blocks, or one of ten; Adam at 1e-3.
- torchcfm's OT-CFM: σ = 0.1, its own MLP, Adam at 1e-3, as in its tutorials. Its likelihood is that
  of its field, computed as for RNODE.

The continuous flows have three hidden layers; RNODE has two for images and tables.
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import zuko
from normflows import MultiscaleFlow
from normflows.distributions import DiagGaussian
from normflows.flows import GlowBlock, Merge, Squeeze
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torchcfm.conditional_flow_matching import ExactOptimalTransportConditionalFlowMatcher
from torchcfm.models import MLP
from torchdiffeq import odeint

from common import CLIP, COARSE, DOPRI5, FINE, SIMPSON, refine_grid
from rnode import (
    Flow,
    Method,
    Probes,
    Solver,
    State,
    TimeConv2d,
    log_normal,
    mlp,
    multiscale,
    objective,
)

Sample = Callable[[], Tensor]
Step = Callable[[float], None]  # its argument is the fraction of the time that has passed
Evaluate = Callable[[Tensor], Tensor]
Make = Callable[[int, Sample], tuple[Step, Evaluate]]  # from the dimensions and a sampler
# y (N, d) and log|det dy/dx| (N,) of the training, validation and test rows of a table
Parts = list[tuple[Tensor, Tensor]]
POINTS = 10  # evaluations
TABLE_POINTS, SHORT = 8, 3  # of tables: in all, and before the better transform is chosen
BATCH = 512  # rows


class Point(NamedTuple):
    """Seconds of training so far, and mean negative log-likelihoods."""

    seconds: float
    validation: float
    test: float


def train(
    step: Step,
    evaluate: Evaluate,
    validation: Tensor,
    test: Tensor,
    seconds: float,
) -> list[Point]:
    """Train for `seconds` and measure both sets POINTS times, more often at first.

    On a few hundred rows a density overfits within seconds.
    """
    curve, spent = [], 0.0
    while len(curve) < POINTS:
        start = time.perf_counter()
        step(spent / seconds)
        spent += time.perf_counter() - start
        if spent >= seconds * ((len(curve) + 1) / POINTS) ** 2:
            nats = (-evaluate(rows).mean().item() for rows in (validation, test))
            curve.append(Point(spent, *nats))
    return curve


def best(curve: list[Point]) -> Point:
    """The point that early stopping on the validation set keeps."""
    return min(curve, key=lambda p: p.validation if math.isfinite(p.validation) else math.inf)


class Training:
    """The training of a contender on a table.

    Args:
        make: makes the contender.
        parts: of the table.
    """

    def __init__(self, make: Make, parts: Parts):
        self.parts = parts
        rows, _ = parts[0]

        def sample() -> Tensor:
            return rows[torch.randint(len(rows), (min(BATCH, len(rows)),))]

        self.step, self.evaluate = make(rows.shape[1], sample)
        self.seconds = 0.0
        self.validation = math.inf  # at the best point so far, as is the next
        self.log_prob = torch.full_like(parts[2][1], -math.inf)  # of each test row

    def train_until(self, seconds: float, total: float) -> None:
        """Train until `seconds` of `total` CPU seconds have passed, and measure."""
        while self.seconds < seconds:
            start = time.process_time()
            self.step(self.seconds / total)
            self.seconds += time.process_time() - start
        nats = -self.measure(1).mean().item()
        if nats < self.validation:
            self.validation, self.log_prob = nats, self.measure(2)

    def measure(self, part: int) -> Tensor:
        y, log_det = self.parts[part]
        return self.evaluate(y) + log_det


def train_best(make: Make, choices: list[Parts], seconds: float) -> Tensor:
    """Train on a table, and return log p of the test rows at the best validation.

    Of several transforms of the table, each is tried for the first SHORT of the TABLE_POINTS
    validations, and the best one goes on. The time is that of all trainings.
    """
    runs = [Training(make, parts) for parts in choices]
    total = seconds / (1 + (len(runs) - 1) * (SHORT / TABLE_POINTS) ** 2)
    for point in range(1, TABLE_POINTS + 1):
        for run in runs:
            run.train_until(total * (point / TABLE_POINTS) ** 2, total)
        if point == SHORT:
            runs = [min(runs, key=lambda run: run.validation)]
    return runs[0].log_prob


def rnode_flow(d: int, sample: Sample, width: int) -> tuple[Step, Evaluate]:
    if d == 2:
        flow = mlp((d,), Solver(SIMPSON, DOPRI5), Probes("exact"), hidden=width)
        settings = {"rate": 1.6e-2}
    else:
        flow = mlp((d,), Solver(FINE, DOPRI5), Probes("gaussian"), hidden=width, layers=3)
        settings = {"rate": 8e-3, "rise": 50}
    return by_objective(flow, sample, penalty=0.01, tolerance=5e-3, **settings)


def rnode_multiscale(d: int, sample: Sample, width: int) -> tuple[Step, Evaluate]:
    """The paper's flow with a piece in each place, for square images of one channel."""
    shape = (1, math.isqrt(d), math.isqrt(d))
    flow = multiscale(shape, Solver(COARSE, DOPRI5), Probes(), hidden=width, pieces=1)
    settings = {"penalty": 0.01, "tolerance": 2e-3, "rate": 1e-2, "rise": 50}

    def images() -> Tensor:
        return sample()[:32].view(-1, *shape)

    step, evaluate = by_objective(flow, images, **settings)
    return step, lambda x: evaluate(x.view(-1, *shape))


def by_objective(
    flow: Flow,
    sample: Sample,
    penalty: float,
    rate: float,
    tolerance: float,
    rise: int = 0,
) -> tuple[Step, Evaluate]:
    """Train a flow of this project as its training runs do.

    Args:
        flow: the flow.
        sample: samples a batch.
        penalty: λ_K and λ_J.
        rate: the learning rate at first; it falls as half a cosine.
        tolerance: change of bits/dim at which the grid is refined.
        rise: steps over which the learning rate rises.
    """
    if not any(isinstance(layer, TimeConv2d) for layer in flow.modules()):
        flow.test_probes = Probes("exact")
    optimizer = torch.optim.Adam(flow.parameters(), rate)
    rows = sample()
    steps = 0

    def step(fraction: float) -> None:
        nonlocal steps
        flow.train()
        refine_grid(flow, rows, tolerance, steps)
        cosine = math.cos(math.pi * min(1.0, fraction))
        share_of_rate = min(1.0, (steps + 1) / (rise + 1)) * (1 + cosine) / 2
        optimizer.param_groups[0]["lr"], steps = rate * share_of_rate, steps + 1
        loss = objective(flow(sample()), penalty, penalty)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(flow.parameters(), CLIP)
        optimizer.step()

    @torch.no_grad()
    def evaluate(x: Tensor) -> Tensor:
        return flow.eval().log_prob(x)

    return step, evaluate


def zuko_cnf(d: int, sample: Sample, width: int = 64) -> tuple[Step, Evaluate]:
    flow = zuko.flows.CNF(d, hidden_features=3 * (width,), exact=d == 2)
    step, _ = by_likelihood(flow, lambda x: flow().log_prob(x), sample)

    @torch.no_grad()
    def evaluate(x: Tensor) -> Tensor:
        exact, flow.transform.exact = flow.transform.exact, True
        log_prob = flow().log_prob(x)
        flow.transform.exact = exact
        return log_prob

    return step, evaluate


def nsf(d: int, sample: Sample) -> tuple[Step, Evaluate]:
    flow = zuko.flows.NSF(d, transforms=3, hidden_features=(128, 128))
    return by_likelihood(flow, lambda x: flow().log_prob(x), sample, 2e-3, decay=True)


def maf(d: int, sample: Sample) -> tuple[Step, Evaluate]:
    flow = zuko.flows.MAF(d, transforms=5, hidden_features=(128, 128))
    return by_likelihood(flow, lambda x: flow().log_prob(x), sample, 2e-3, decay=True)


def glow(d: int, sample: Sample, width: int) -> tuple[Step, Evaluate]:
    """Glow for square images of one channel, whose rows follow one another in the d pixels."""
    side = math.isqrt(d)
    channels = (8, 4)  # of the coarse scale and of the fine one
    priors = [DiagGaussian((8, side // 4, side // 4)), DiagGaussian((2, side // 2, side // 2))]
    if side % 4:  # one scale of as many blocks
        channels, priors = (4,), [DiagGaussian((4, side // 2, side // 2))]
    each = 10 // len(channels)
    blocks = [[*(GlowBlock(c, width) for _ in range(each)), Squeeze()] for c in channels]
    merges = [Merge() for _ in channels[1:]]
    flow = MultiscaleFlow(priors, blocks, merges, class_cond=False)

    def log_prob(x: Tensor) -> Tensor:
        return flow.log_prob(x.view(-1, 1, side, side), None)

    log_prob(sample())  # sets the scales of activation normalization by a batch
    return by_likelihood(flow, log_prob, sample)


def by_likelihood(
    flow: torch.nn.Module,
    log_prob: Evaluate,
    sample: Sample,
    rate: float = 1e-3,
    decay: bool = False,
) -> tuple[Step, Evaluate]:
    """Train a flow as the guides of zuko and normflows do, or with half a cosine as rate."""
    optimizer = torch.optim.Adam(flow.parameters(), rate)

    def step(fraction: float) -> None:
        if decay:
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * fraction)) / 2
        loss = -log_prob(sample()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step, torch.no_grad()(log_prob)


def ot_cfm(
    d: int, sample: Sample, width: int = 64, method: Method = DOPRI5
) -> tuple[Step, Evaluate]:
    matcher = ExactOptimalTransportConditionalFlowMatcher(sigma=0.1)
    net = MLP(dim=d, w=width, time_varying=True)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)

    def step(fraction: float) -> None:
        x = sample()
        t, z, velocity = matcher.sample_location_and_conditional_flow(torch.randn_like(x), x)
        loss = (net(torch.cat([z, t[:, None]], 1)) - velocity).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def field(t: Tensor, z: Tensor) -> Tensor:
        return net(torch.cat([z, t.expand(len(z), 1)], 1))

    def system(t: Tensor, state: State) -> tuple[Tensor, ...]:
        """f and its exact divergence."""
        with torch.enable_grad():
            z = state[0].detach().requires_grad_()
            f = field(t, z)
            rows = [torch.autograd.grad(f[:, i].sum(), z, retain_graph=True)[0] for i in range(d)]
        return f.detach(), sum(row[:, i] for i, row in enumerate(rows))

    def evaluate(x: Tensor) -> Tensor:
        """Integrate back from data at time 1 to noise at time 0."""
        state, t = (x, x.new_zeros(len(x))), torch.tensor([1.0, 0.0])
        z, l = odeint(system, state, t, **method.odeint_options(torch.float32))
        return log_normal(z[-1]) + l[-1]

    return step, evaluate
