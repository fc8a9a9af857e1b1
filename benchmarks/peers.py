"""This program beside two other libraries: held-out nats after equal training time.

pip install -e '.[bench]'
python benchmarks/peers.py [--seconds 60] [--quick]
                           [--datasets eight_gaussians checkerboard pinwheel digits]

Contenders:
- rnode: the mlp flow with the settings of dataset=toy (simpson, λ = 0.01, Adam at 8e-3 with half a
  cosine); exact divergence in 2-D, one Gaussian probe on digits.
- zuko's CNF: its own loss and adaptive solver, Adam at 1e-3, as in its guide.
- torchcfm's OT-CFM: σ = 0.1, its own MLP, Adam at 1e-3, as in its tutorials. Its likelihood is
  computed by dopri5 at 1e-5, as that of rnode, with the exact divergence.

All have three hidden layers of width 64 and batches of 512 (256 images for digits). The clock
counts training steps alone; evaluations are at equal fractions of it. The results are also written
to outputs/benchmarks/peers.csv, peers_curves.csv and peers.png (likelihood against seconds).
"""

import argparse
import math
import time
from collections.abc import Callable

import numpy as np
import torch
import zuko
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor
from torchcfm.conditional_flow_matching import ExactOptimalTransportConditionalFlowMatcher
from torchcfm.models import MLP
from torchdiffeq import odeint

from common import DOPRI5, SIMPSON, folder, write_csv, write_table
from rnode import Probes, Solver, State, Transform, log_normal, mlp, objective
from rnode.app.launch import prepare_process
from rnode.data.densities import DENSITIES
from rnode.solver import error_norm

DATASETS = ["eight_gaussians", "checkerboard", "pinwheel", "digits"]
ENTROPY = {"eight_gaussians": 0.985, "checkerboard": math.log(8)}
POINTS = 10  # evaluations
Sample = Callable[[], Tensor]
Step = Callable[[float], None]  # its argument is the fraction of the time that has passed
Evaluate = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="seconds of training")
    parser.add_argument("--datasets", nargs="+", default=DATASETS)
    parser.add_argument("--quick", action="store_true", help="8 seconds each")
    options = parser.parse_args()
    seconds = 8 if options.quick else options.seconds
    prepare_process()

    rows, curves = [], []
    for dataset in options.datasets:
        entropy = f"{ENTROPY[dataset]:.3f}" if dataset in ENTROPY else ""
        row = {"dataset": dataset, "entropy": entropy}
        for name, contender in CONTENDERS.items():
            torch.manual_seed(0)
            sample, held_out = data(dataset)
            curve = train(*contender(held_out.shape[1], sample), held_out, seconds)
            point = {"dataset": dataset, "contender": name}
            curves += [point | {"seconds": s, "nats": nats} for s, nats in curve]
            row[name] = f"{curve[-1][1]:.3f} ({min(nats for _, nats in curve):.3f})"
            print(f"{dataset}, {name}: {row[name]} nats", flush=True)
        rows.append(row)
    write_csv("peers_curves", curves)
    plot(curves)
    title = f"held-out nats after {seconds:.0f} s of training (lowest of the curve)"
    write_table("peers", title, rows)


def data(name: str) -> tuple[Sample, Tensor]:
    """A function that samples a training batch, and the held-out set."""
    if name != "digits":
        rng, density = np.random.default_rng(0), DENSITIES[name]
        held_out = torch.from_numpy(density(2000, np.random.default_rng(1))).float()
        return lambda: torch.from_numpy(density(512, rng)).float(), held_out
    images = torch.from_numpy(load_digits().images).to(torch.uint8).flatten(1)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    transform = Transform(levels=17, alpha=1e-5)

    def transformed(index: Tensor) -> Tensor:
        return transform(images[index], index).y

    held_out = transformed(torch.arange(360))
    return lambda: transformed(torch.randint(360, len(images), (256,))), held_out


def train(
    step: Step, evaluate: Evaluate, held_out: Tensor, seconds: float
) -> list[tuple[float, float]]:
    """Seconds of training so far and mean held-out nats, POINTS times."""
    curve, spent = [], 0.0
    while len(curve) < POINTS:
        start = time.perf_counter()
        step(spent / seconds)
        spent += time.perf_counter() - start
        if spent >= seconds * (len(curve) + 1) / POINTS:
            curve.append((spent, -evaluate(held_out).mean().item()))
    return curve


def rnode_flow(d: int, sample: Sample) -> tuple[Step, Evaluate]:
    flow = mlp((d,), Solver(SIMPSON, DOPRI5), Probes("exact" if d == 2 else "gaussian"))
    optimizer = torch.optim.Adam(flow.parameters(), 8e-3)

    def step(fraction: float) -> None:
        cosine = math.cos(math.pi * min(1.0, fraction))
        optimizer.param_groups[0]["lr"] = 8e-3 * (1 + cosine) / 2
        loss = objective(flow.train()(sample()), 0.01, 0.01)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def evaluate(x: Tensor) -> Tensor:
        probes, flow.probes = flow.probes, Probes("exact")
        log_prob = flow.eval().log_prob(x)
        flow.probes = probes
        return log_prob

    return step, evaluate


def zuko_cnf(d: int, sample: Sample) -> tuple[Step, Evaluate]:
    flow = zuko.flows.CNF(d, hidden_features=(64, 64, 64), exact=d == 2)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-3)

    def step(fraction: float) -> None:
        loss = -flow().log_prob(sample()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def evaluate(x: Tensor) -> Tensor:
        exact, flow.transform.exact = flow.transform.exact, True
        log_prob = flow().log_prob(x)
        flow.transform.exact = exact
        return log_prob

    return step, evaluate


def ot_cfm(d: int, sample: Sample) -> tuple[Step, Evaluate]:
    matcher = ExactOptimalTransportConditionalFlowMatcher(sigma=0.1)
    net = MLP(dim=d, w=64, time_varying=True)
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
        z, l = odeint(system, state, t, **DOPRI5.odeint_options(error_norm, torch.float32))
        return log_normal(z[-1]) + l[-1]

    return step, evaluate


CONTENDERS = {"rnode": rnode_flow, "OT-CFM (torchcfm)": ot_cfm, "CNF (zuko)": zuko_cnf}


def plot(curves: list[dict]) -> None:
    datasets = list(dict.fromkeys(point["dataset"] for point in curves))
    figure = Figure(figsize=(4 * len(datasets), 3.5), layout="constrained")
    axes = figure.subplots(1, len(datasets), squeeze=False)[0]
    for ax, dataset in zip(axes, datasets, strict=True):
        for name in CONTENDERS:
            points = [p for p in curves if (p["dataset"], p["contender"]) == (dataset, name)]
            seconds, nats = [p["seconds"] for p in points], [p["nats"] for p in points]
            ax.plot(seconds, nats, "o-", markersize=3, label=name)
        if dataset in ENTROPY:
            ax.axhline(ENTROPY[dataset], color="gray", linestyle=":", label="entropy")
        ax.set(title=dataset, xlabel="seconds of training", ylabel="held-out nats")
    axes[0].legend()
    figure.savefig(folder() / "peers.png", dpi=120)


if __name__ == "__main__":
    main()
