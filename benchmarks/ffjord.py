"""A race with the released code of FFJORD: seconds of training until its own best likelihood.

python benchmarks/ffjord.py --released DIR [--dataset digits] [--seconds 400] [--seeds 0 1]
python benchmarks/ffjord.py --released DIR --dataset fashion_mnist --root FOLDER [--seconds 600]

DIR is a clone of https://github.com/rtqichen/ffjord; measured at commit 994864a. Its multiscale
network trains for the given seconds with its own probes (Rademacher), solver (dopri5 at 1e-5) and
gradient (adjoint). RNODE then trains until its likelihood is as good as FFJORD's best, twice: with
the same layers, and with one piece in place of two, the default of this program. Both have batches
of 32, Adam after a warm-up of 20 steps, and 32 channels on digits or 16 on FashionMNIST at 14×14.
The learning rate is constant: 1e-2 for FFJORD; for RNODE see DATA. RNODE's gradients are clipped,
and its grid is refined, as they are by default.

The clock counts the CPU seconds of training steps alone. The weights are measured every 10 steps
of FFJORD and 5 of RNODE: the bits/dim of 180 validation images by dopri5 at 1e-5, with the same
noise and probes for both. FFJORD's weights are carried into a `Flow` for that. The largest
differences of log p, and of its gradient relative to the largest entry, between the two programs
are those of FFJORD's best weights, in float64 at a tolerance of 1e-10, for 32 validation images.

The weights of FFJORD stay in outputs/benchmarks/ffjord_DATASET_SECONDS_SEED.pt; a later call reads
them instead of training again. The record is benchmarks/results/ffjord_DATASET.json.
"""

import argparse
import copy
import importlib
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from common import CLIP, COARSE, DOPRI5, LAMBDA, OUTPUTS, Rows, refine_grid, write_record
from plain import shift
from rnode import Flow, Probes, Solver, multiscale, objective
from rnode.app.processes import prepare_process
from rnode.data.images import digits, named_images
from rnode.evaluation import solve_and_measure
from rnode.loss import bits_per_dim, log_normal
from rnode.transforms import Batch, ImageTransform

BATCH, IMAGES, WARM_UP, LAYERS = 32, 180, 20, 4
FFJORD_EVERY, RNODE_EVERY = 10, 5  # training steps between two points
FFJORD_RATE = 1e-2
TOLERANCE = 2e-3  # of the refinement of solver=auto
TIGHT = replace(DOPRI5, rtol=1e-10, atol=1e-10)
MISSED = "not reached"
SUMMARIZED = (
    *("FFJORD bits/dim", "FFJORD seconds", "RNODE seconds", "RNODE speed-up"),
    *("one piece: seconds", "one piece: speed-up"),
)
NO_CONDITIONS = torch.empty(IMAGES, 0)


class Setting(NamedTuple):
    """Name in the table, shape of an image, channels, and RNODE's learning rate."""

    name: str
    shape: tuple[int, int, int]
    channels: int
    rate: float


DATA = {
    "digits": Setting("digits 8×8", (1, 8, 8), 32, 1e-2),
    "fashion_mnist": Setting("FashionMNIST 14×14", (1, 14, 14), 16, 2e-2),
}


class Point(NamedTuple):
    """CPU seconds and steps of training so far, and the weights."""

    seconds: float
    steps: int
    weights: list[Tensor]


class Data:
    """Random batches of training images, and fixed ones for validation and test."""

    def __init__(self, options: argparse.Namespace, seed: int):
        if options.dataset == "digits":
            splits, self.transform = digits(), ImageTransform(17, 1e-5)
        else:
            splits = named_images("FashionMNIST", options.root, 14, validation=10000)
            self.transform = ImageTransform(256, 1e-5)
        self.images, index = splits.train, torch.arange(IMAGES)
        evaluation = (part[:IMAGES] for part in (splits.val, splits.test))
        self.validation, self.test = (
            self.transform.for_evaluation(part, index[: len(part)], NO_CONDITIONS[: len(part)], 0)
            for part in evaluation
        )
        self.generator = torch.Generator().manual_seed(seed)

    def sample(self) -> Batch:
        index = torch.randint(len(self.images), (BATCH,), generator=self.generator)
        return self.transform(self.images[index], index, NO_CONDITIONS[:BATCH])


class Released:
    """The multiscale network of the released code in `folder`, without its logit transform."""

    def __init__(self, folder: str, shape: Sequence[int], channels: int):
        sys.path.insert(0, folder)
        warnings.filterwarnings("ignore", "To copy construct from a tensor")
        self.odefunc = importlib.import_module("lib.layers.odefunc")
        odenvp = importlib.import_module("lib.odenvp")
        inner = (channels,) * (LAYERS - 1)
        self.model = odenvp.ODENVP((BATCH, *shape), intermediate_dims=inner, squash_input=False)
        for module in self.model.modules():
            if isinstance(module, self.odefunc.ODEfunc):
                module.rademacher = True

    def log_prob(self, y: Tensor) -> Tensor:
        """y (B, *shape) → log p(y) (B,)."""
        z, minus_l = self.model(y, y.new_zeros(len(y), 1))
        return log_normal(z) - minus_l[:, 0]

    def loss(self, batch: Batch) -> Tensor:
        """The mean bits/dim of a batch."""
        log_prob = self.log_prob(batch.y)
        return bits_per_dim(log_prob, batch.log_det, batch.y[0].numel()).mean()

    def tighten(self, weights: list[Tensor], probes: Probes) -> None:
        """Prepare a comparison in float64: these weights, these probes, a tolerance of 1e-10."""
        self.model.double()
        for parameter, weight in zip(self.model.parameters(), weights, strict=True):
            parameter.data = weight.double()
        for module in self.model.modules():
            if hasattr(module, "rtol"):
                module.rtol = module.atol = TIGHT.rtol
        self.odefunc.sample_rademacher_like = lambda z: probes.sample(z)[0]


def differences(
    released: Released, weights: list[Tensor], flow: Flow, y: Tensor
) -> tuple[float, float]:
    """Compare the two programs at the released code's weights, for y (B, *shape).

    Returns:
        The largest difference of log p in bits/dim, and that of the gradient of its mean, relative
        to the largest entry of the gradient.
    """
    flow = copy.deepcopy(flow).double().train()
    flow.solver, flow.probes = Solver(TIGHT, TIGHT, "adjoint"), Probes("rademacher")
    released.tighten(weights, flow.probes)
    parameters = list(released.model.parameters())
    torch.manual_seed(0)  # of the probes
    theirs = released.log_prob(y.double())
    their_gradient = torch.autograd.grad(theirs.mean(), parameters)
    carried = carry_over(parameters)
    load(flow, carried)
    torch.manual_seed(0)
    ours = flow.log_prob(y.double())
    gradient = torch.autograd.grad(ours.mean(), list(flow.parameters()))
    # Their kernels change our kernels and our biases: the chain rule through carry_over.
    gradient = torch.autograd.grad(carried, parameters, gradient)
    largest = max(part.abs().max() for part in their_gradient)
    error = max((a - b).abs().max() for a, b in zip(gradient, their_gradient, strict=True))
    nats = (ours - theirs).abs().max()
    return nats.item() / math.log(2) / flow.d, (error / largest).item()


def carry_over(weights: Sequence[Tensor]) -> list[Tensor]:
    """Kernels and biases of networks of LAYERS layers with softplus between them, in turn → those
    of Fields, whose layers see softplus − log 2 after the first."""
    carried = []
    for i, (kernel, bias) in enumerate(zip(weights[::2], weights[1::2], strict=True)):
        carried += [kernel, bias + shift(kernel) if i % LAYERS else bias]
    return carried


def load(flow: Flow, weights: Sequence[Tensor]) -> Flow:
    """Set the weights of a flow, in the order of its parameters."""
    for parameter, weight in zip(flow.parameters(), weights, strict=True):
        parameter.data = weight.detach().clone()
    return flow


@torch.no_grad()
def likelihood(flow: Flow, batch: Batch) -> float:
    """Mean bits/dim by dopri5 at 1e-5."""
    return solve_and_measure(flow.eval(), batch, seed=0)[1].bits_per_dim.mean().item()


def train(
    parameters: list[nn.Parameter],
    loss: Callable[[int], Tensor],
    rate: float,
    seconds: float,
    every: int,
    clip: float = math.inf,
) -> Iterator[Point]:
    """Train for `seconds` of CPU time and yield a point now and then, and at the end.

    Args:
        parameters: what Adam optimizes.
        loss: the loss of training step k.
        rate: the learning rate after the warm-up.
        seconds: the time, without what the caller does at the points.
        every: training steps between two points.
        clip: largest norm of the gradient.
    """
    optimizer = torch.optim.Adam(parameters, rate)
    spent, steps = 0.0, 0
    while spent < seconds:
        start = time.process_time()
        optimizer.param_groups[0]["lr"] = rate * min(1, (steps + 1) / (WARM_UP + 1))
        optimizer.zero_grad()
        loss(steps).backward()
        clip_grad_norm_(parameters, clip)
        optimizer.step()
        steps, spent = steps + 1, spent + time.process_time() - start
        if steps % every == 0 or spent >= seconds:
            yield Point(spent, steps, [parameter.detach().clone() for parameter in parameters])


def train_released(released: Released, data: Data, seconds: float, path: Path) -> list[Point]:
    """Train the released code, or read the points of an earlier training that finished."""
    points = [Point(*point) for point in torch.load(path)] if path.exists() else []
    if not points or points[-1].seconds < seconds:
        points, parameters = [], list(released.model.parameters())
        path.parent.mkdir(parents=True, exist_ok=True)

        def loss(step: int) -> Tensor:
            return released.loss(data.sample())

        for point in train(parameters, loss, FFJORD_RATE, seconds, FFJORD_EVERY):
            points.append(point)
            torch.save([tuple(each) for each in points], path)
    return points


def train_rnode(flow: Flow, data: Data, rate: float, seconds: float, goal: float) -> Point | None:
    """Train until the validation bits/dim are at most `goal`; None if `seconds` do not suffice."""

    def loss(step: int) -> Tensor:
        flow.train()
        refine_grid(flow, data.validation.y[:BATCH], TOLERANCE, step)
        return objective(flow(data.sample().y), LAMBDA, LAMBDA)

    for point in train(list(flow.parameters()), loss, rate, seconds, RNODE_EVERY, CLIP):
        if likelihood(flow, data.validation) <= goal:
            return point
    return None


def race(options: argparse.Namespace, seed: int) -> dict[str, str]:
    """The row of a seed."""
    name, shape, channels, rate = DATA[options.dataset]

    def make_flow(pieces: int) -> Flow:
        solver = Solver(COARSE, DOPRI5)
        return multiscale(shape, solver, Probes(), hidden=channels, pieces=pieces)

    torch.manual_seed(seed)
    released = Released(options.released, shape, channels)
    flow, data = make_flow(2), Data(options, seed)
    path = OUTPUTS / f"ffjord_{options.dataset}_{options.seconds:g}_{seed}.pt"
    points = train_released(released, data, options.seconds, path)
    bits = [likelihood(load(flow, carry_over(p.weights)), data.validation) for p in points]
    goal, best = min(zip(bits, points, strict=True), key=lambda pair: pair[0])
    load(flow, carry_over(best.weights))
    log_p, gradient = differences(released, best.weights, flow, data.validation.y[:BATCH])
    row = {
        "data": name,
        "seed": str(seed),
        "FFJORD bits/dim": f"{goal:.3f}",
        "FFJORD steps": str(best.steps),
        "FFJORD seconds": f"{best.seconds:.0f}",
        "FFJORD steps in all": str(points[-1].steps),
        "FFJORD test bits/dim": f"{likelihood(flow, data.test):.3f}",
        "difference of log p": f"{log_p:.0e}",
        "difference of gradients": f"{gradient:.0e}",
    }
    for label, pieces in (("RNODE ", 2), ("one piece: ", 1)):
        torch.manual_seed(seed)
        flow, data = make_flow(pieces), Data(options, seed)
        point = train_rnode(flow, data, rate, options.seconds, goal)
        row |= {
            f"{label}steps": str(point.steps) if point else MISSED,
            f"{label}seconds": f"{point.seconds:.1f}" if point else MISSED,
            f"{label}speed-up": f"{best.seconds / point.seconds:.1f}" if point else MISSED,
            f"{label}test bits/dim": f"{likelihood(flow, data.test):.3f}",
        }
    return row


def summary(rows: Rows) -> dict[str, str]:
    """The row of all seeds: mean (least – largest) of some columns."""
    row = dict.fromkeys(rows[0], "") | {"data": rows[0]["data"], "seed": "all"}
    for column in SUMMARIZED:
        cells = [each[column] for each in rows]
        if MISSED in cells:
            row[column] = f"{MISSED} at {cells.count(MISSED)} of {len(cells)} seeds"
            continue
        values, digits = [float(cell) for cell in cells], len(cells[0].partition(".")[2])
        numbers = (statistics.mean(values), min(values), max(values))
        mean, least, largest = (f"{number:.{digits}f}" for number in numbers)
        row[column] = f"{mean} ({least} – {largest})"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--released", required=True, help="folder of a clone of the released code")
    parser.add_argument("--dataset", choices=DATA, default="digits")
    parser.add_argument("--root", help="folder of FashionMNIST's files")
    parser.add_argument("--seconds", type=float, default=400, help="seconds that FFJORD trains")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--quick", action="store_true", help="8 seconds")
    options = parser.parse_args()
    options.seconds = 8 if options.quick else options.seconds
    prepare_process()

    rows = []
    for seed in options.seeds:
        rows.append(race(options, seed))
        print(rows[-1], flush=True)
    title = f"seconds of training to FFJORD's best, {options.dataset}"
    write_record(f"ffjord_{options.dataset}", title, [*rows, summary(rows)])


if __name__ == "__main__":
    main()
