"""The same job with what one might pick instead: held-out nats after equal training time.

pip install -e '.[bench]'
python benchmarks/peers.py [--seconds 60] [--datasets eight_gaussians checkerboard pinwheel digits] [--quick]

Contenders: this program's mlp flow (solver=simpson, λ = 0.01, Adam at 8e-3 with half a cosine, the settings of dataset=toy;
exact divergence in 2-D, one Gaussian probe on digits); zuko's CNF (its own loss, adaptive solver and Adam at 1e-3, as in
its guide); torchcfm's OT-CFM (σ = 0.1, its own MLP and Adam at 1e-3, as in its tutorials), whose likelihood is then had by
the dopri5 at 1e-5 that also evaluates ours, with the exact divergence. All have three hidden layers 64 wide and batches of
512 (256 images for digits). The clock counts training steps alone; evaluations are at equal fractions of it. Written to
outputs/benchmarks/peers.csv, peers_curves.csv, and peers.png (likelihood against seconds).
"""

import argparse
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torchdiffeq import odeint

from common import DOPRI5, SIMPSON, folder, write_csv, write_table
from rnode import Dequantize, Logit, Probes, Solver, State, mlp, objective
from rnode.allocator import keep_freed_memory
from rnode.data import DENSITIES
from rnode.objective import log_normal
from rnode.solver import error_norm

ENTROPY = {"eight_gaussians": 0.985, "checkerboard": math.log(8)}
POINTS = 10  # evaluations
Step = Callable[[float], None]  # takes the fraction of the time that is over
Evaluate = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of training")
    parser.add_argument("--datasets", nargs="+", default=["eight_gaussians", "checkerboard", "pinwheel", "digits"])
    parser.add_argument("--quick", action="store_true", help="8 seconds each")
    options = parser.parse_args()
    seconds = 8 if options.quick else options.seconds
    keep_freed_memory()

    rows, curves = [], []
    for dataset in options.datasets:
        row = {"dataset": dataset, "entropy": f"{ENTROPY[dataset]:.3f}" if dataset in ENTROPY else ""}
        for name, contender in CONTENDERS.items():
            torch.manual_seed(0)
            draw, held_out = data(dataset)
            curve = train(*contender(held_out.shape[1], draw), held_out, seconds)
            curves += [{"dataset": dataset, "contender": name, "seconds": s, "nats": n} for s, n in curve]
            row[name] = f"{curve[-1][1]:.3f} ({min(nats for _, nats in curve):.3f})"
            print(f"{dataset}, {name}: {row[name]} nats", flush=True)
        rows.append(row)
    write_curves(curves)
    write_table("peers", f"held-out nats after {seconds:.0f} s of training (lowest of the curve)", rows)


def data(name: str) -> tuple[Callable[[], Tensor], Tensor]:
    """A function that draws a training batch, and the held-out set."""
    if name != "digits":
        rng = np.random.default_rng(0)
        held_out = torch.from_numpy(DENSITIES[name](2000, np.random.default_rng(1))).float()
        return lambda: torch.from_numpy(DENSITIES[name](512, rng)).float(), held_out
    images = torch.from_numpy(load_digits().images).to(torch.uint8).flatten(1)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    dequantize, logit = Dequantize(17), Logit(1e-5)

    def transformed(x: Tensor) -> Tensor:
        return logit(dequantize(x, torch.rand(x.shape))[0])[0]

    held_out = transformed(images[:360])
    return lambda: transformed(images[torch.randint(360, len(images), (256,))]), held_out


def train(step: Step, evaluate: Evaluate, held_out: Tensor, seconds: float) -> list[tuple[float, float]]:
    """Seconds of training so far and mean held-out nats, POINTS times."""
    curve, spent = [], 0.0
    while len(curve) < POINTS:
        start = time.perf_counter()
        step(spent / seconds)
        spent += time.perf_counter() - start
        if spent >= seconds * (len(curve) + 1) / POINTS:
            curve.append((spent, -evaluate(held_out).mean().item()))
    return curve


def ours(d: int, draw: Callable[[], Tensor]) -> tuple[Step, Evaluate]:
    flow = mlp((d,), Solver(SIMPSON, DOPRI5), Probes("exact" if d == 2 else "gaussian"))
    optimizer = torch.optim.Adam(flow.parameters(), 8e-3)

    def step(fraction: float) -> None:
        optimizer.param_groups[0]["lr"] = 8e-3 * (1 + math.cos(math.pi * min(1.0, fraction))) / 2
        loss = objective(flow.train()(draw()), 0.01, 0.01)
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


def zuko_cnf(d: int, draw: Callable[[], Tensor]) -> tuple[Step, Evaluate]:
    import zuko

    flow = zuko.flows.CNF(d, hidden_features=(64, 64, 64), exact=d == 2)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-3)

    def step(fraction: float) -> None:
        loss = -flow().log_prob(draw()).mean()
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


def ot_cfm(d: int, draw: Callable[[], Tensor]) -> tuple[Step, Evaluate]:
    from torchcfm.conditional_flow_matching import ExactOptimalTransportConditionalFlowMatcher
    from torchcfm.models import MLP

    matcher = ExactOptimalTransportConditionalFlowMatcher(sigma=0.1)
    net = MLP(dim=d, w=64, time_varying=True)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)

    def step(fraction: float) -> None:
        x = draw()
        t, z, velocity = matcher.sample_location_and_conditional_flow(torch.randn_like(x), x)
        loss = (net(torch.cat([z, t[:, None]], 1)) - velocity).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def field(t: Tensor, z: Tensor) -> Tensor:
        return net(torch.cat([z, t.expand(len(z), 1)], 1))

    def system(t: Tensor, state: State) -> tuple[Tensor, ...]:
        """f, its exact divergence, and nothing to measure besides."""
        with torch.enable_grad():
            z = state[0].detach().requires_grad_()
            f = field(t, z)
            div = sum(torch.autograd.grad(f[:, i].sum(), z, retain_graph=True)[0][:, i] for i in range(d))
        return f.detach(), div

    def evaluate(x: Tensor) -> Tensor:
        """Its flow leads from noise at time 0 to data at time 1: backwards, to the noise."""
        state = (x, x.new_zeros(len(x)))
        z, l = odeint(system, state, torch.tensor([1.0, 0.0]), **DOPRI5.arguments(error_norm))
        return log_normal(z[-1]) + l[-1]

    return step, evaluate


CONTENDERS = {"rnode": ours, "OT-CFM (torchcfm)": ot_cfm, "CNF (zuko)": zuko_cnf}


def write_curves(curves: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    write_csv("peers_curves", curves)
    datasets = list(dict.fromkeys(point["dataset"] for point in curves))
    figure, axes = plt.subplots(1, len(datasets), figsize=(4 * len(datasets), 3.5), layout="constrained", squeeze=False)
    for ax, dataset in zip(axes[0], datasets, strict=True):
        for name in CONTENDERS:
            points = [p for p in curves if (p["dataset"], p["contender"]) == (dataset, name)]
            ax.plot([p["seconds"] for p in points], [p["nats"] for p in points], "o-", markersize=3, label=name)
        if dataset in ENTROPY:
            ax.axhline(ENTROPY[dataset], color="gray", linestyle=":", label="entropy")
        ax.set(title=dataset, xlabel="seconds of training", ylabel="held-out nats")
    axes[0][0].legend()
    figure.savefig(folder() / "peers.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
