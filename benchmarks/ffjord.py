"""A race with FFJORD: seconds of training until its own best likelihood.

python benchmarks/ffjord.py [--dataset digits] [--seconds 450] [--seeds 0 1] [--quick]
python benchmarks/ffjord.py --dataset fashion_mnist --root DIR [--seconds 600]

FFJORD is written here from its paper (Grathwohl et al., 2019), independently of the package: dopri5
at 1e-5 for z and l, the adjoint method, one Rademacher probe, the product by autograd, time as a
channel, torch's default weights in every layer, no penalty. It trains for the given seconds. RNODE
then trains until its likelihood is as good as FFJORD's best, twice: with the same layers, and with
one piece in place of two, the default of this program. All have batches of 32, Adam after a warm-up
of 20 steps, at 1e-2 (FFJORD) or 5e-3 (RNODE), and 32 channels on digits or 16 on FashionMNIST at
14×14. RNODE's gradients are clipped, as they are by default.

The clock counts training steps alone. The likelihood of 360 validation images (180 on digits) is
computed by dopri5 at 1e-5, for all in the same way, with the same noise and probes. So is that of
360 test images, with the weights of the point that the row reports. The record is
benchmarks/results/ffjord_DATASET.json.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torchdiffeq import odeint_adjoint

from common import CLIP, COARSE, DOPRI5, LAMBDA, refine_grid, write_record
from plain import PlainNet, shift
from rnode import Flow, Probes, Solver, multiscale, objective
from rnode.app.processes import prepare_process
from rnode.data.images import digits, named_images
from rnode.evaluation import solve_and_measure
from rnode.loss import bits_per_dim, log_normal
from rnode.transforms import Batch, ImageTransform

BATCH, IMAGES, WARM_UP = 32, 360, 20
FFJORD_RATE, RNODE_RATE = 1e-2, 5e-3  # of the two, each does better with its own on digits
TOLERANCE = 2e-3  # of the refinement of solver=auto
POINTS = 150
NO_CONDITIONS = torch.empty(IMAGES, 0)
DATA = {"digits": "digits 8×8", "fashion_mnist": "FashionMNIST 14×14"}


class Point(NamedTuple):
    """Seconds and steps of training so far, bits/dim, and the flow."""

    seconds: float
    steps: int
    validation: float
    flow: Flow | None = None


class FFJORD(nn.Module):
    """The loss of FFJORD, for the layers of a flow with weights of its own."""

    def __init__(self, flow: Flow):
        super().__init__()
        for layer in (layer for piece in flow.pieces for layer in piece.field.layers):
            layer.reset_parameters()
        self.flow = flow
        self.nets = nn.ModuleList(PlainNet(piece.field, centred=False) for piece in flow.pieces)

    def forward(self, batch: Batch) -> Tensor:
        """The mean bits/dim of a batch."""
        nets, z, l, factored = iter(self.nets), batch.y, 0, []
        for layer in self.flow.layers:
            if layer not in self.flow.pieces:
                z = layer(z, factored)
                continue
            ode = FFJORDODE(next(nets), torch.where(torch.rand_like(z) < 0.5, -1.0, 1.0))
            state, times = (z, z.new_zeros(len(z))), torch.tensor([0.0, 1.0])
            path, l_path = odeint_adjoint(ode, state, times, rtol=1e-5, atol=1e-5, method="dopri5")
            z, l = path[-1], l + l_path[-1]
        z = torch.cat([part.flatten(1) for part in (*factored, z)], 1)
        return bits_per_dim(log_normal(z) + l, batch.log_det, z.shape[1]).mean()

    def weights(self) -> Flow:
        """The flow with the weights that have been trained."""
        for piece, net in zip(self.flow.pieces, self.nets, strict=True):
            trained = zip(net.weights, net.biases, strict=True)
            for i, (layer, (weight, bias)) in enumerate(
                zip(piece.field.layers, trained, strict=True)
            ):
                centre = shift(weight.data) if i > 0 else 0  # a Field's layers see softplus − log 2
                layer.weight.data, layer.bias.data = weight.data, bias.data + centre
        return self.flow


class FFJORDODE(nn.Module):
    """The right-hand side for z and l."""

    def __init__(self, net: nn.Module, eps: Tensor):
        super().__init__()
        self.net, self.eps = net, eps

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = state[0].requires_grad_(True)
            f = self.net(t, z, NO_CONDITIONS[: len(z)])
            (product,) = torch.autograd.grad(f, z, self.eps, create_graph=True)
        return f, (product * self.eps).flatten(1).sum(1)


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


@torch.no_grad()
def likelihood(flow: Flow, batch: Batch) -> float:
    """Mean bits/dim by dopri5 at 1e-5."""
    return solve_and_measure(flow.eval(), batch, seed=0)[1].bits_per_dim.mean().item()


def train(
    parameters: list[nn.Parameter],
    loss: Callable[[int], Tensor],
    weights: Callable[[], Flow],
    data: Data,
    rate: float,
    seconds: float,
    goal: float = -math.inf,
    clip: float = math.inf,
) -> Point:
    """Train for `seconds`, or until the validation bits/dim are at most `goal`.

    Args:
        parameters: what Adam optimizes.
        loss: the loss of training step k.
        weights: returns the flow as trained so far.
        data: the images.
        rate: the learning rate after the warm-up.
        seconds: the longest time; the likelihood is computed POINTS times in it.
        goal: bits/dim.
        clip: largest norm of the gradient.

    Returns:
        The point of the lowest validation bits/dim.
    """
    optimizer = torch.optim.Adam(parameters, rate)
    best, spent, steps, points = Point(0, 0, math.inf), 0.0, 0, 0
    while spent < seconds and best.validation > goal:
        start = time.perf_counter()
        optimizer.param_groups[0]["lr"] = rate * min(1, (steps + 1) / (WARM_UP + 1))
        optimizer.zero_grad()
        loss(steps).backward()
        clip_grad_norm_(parameters, clip)
        optimizer.step()
        steps, spent = steps + 1, spent + time.perf_counter() - start
        if spent >= seconds * (points + 1) / POINTS:
            points = int(spent / seconds * POINTS)
            flow = weights()
            validation = likelihood(flow, data.validation)
            if validation < best.validation:
                best = Point(spent, steps, validation, copy.deepcopy(flow))
    return best


def train_ffjord(options: argparse.Namespace, data: Data) -> Point:
    model = FFJORD(make_flow(options, pieces=2))
    parameters = list(model.parameters())
    seconds = options.seconds
    return train(
        parameters, lambda _: model(data.sample()), model.weights, data, FFJORD_RATE, seconds
    )


def train_rnode(options: argparse.Namespace, data: Data, pieces: int, goal: float) -> Point:
    flow = make_flow(options, pieces)

    def loss(step: int) -> Tensor:
        flow.train()
        refine_grid(flow, data.validation.y[:BATCH], TOLERANCE, step)
        return objective(flow(data.sample().y), LAMBDA, LAMBDA)

    parameters = list(flow.parameters())
    return train(parameters, loss, lambda: flow, data, RNODE_RATE, options.seconds, goal, CLIP)


def make_flow(options: argparse.Namespace, pieces: int) -> Flow:
    shape, hidden = ((1, 8, 8), 32) if options.dataset == "digits" else ((1, 14, 14), 16)
    return multiscale(shape, Solver(COARSE, DOPRI5), Probes(), hidden=hidden, pieces=pieces)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=("digits", "fashion_mnist"), default="digits")
    parser.add_argument("--root", help="folder of FashionMNIST's files")
    parser.add_argument("--seconds", type=float, default=450, help="seconds that FFJORD trains")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--quick", action="store_true", help="8 seconds")
    options = parser.parse_args()
    options.seconds = 8 if options.quick else options.seconds
    prepare_process()

    rows = []
    for seed in options.seeds:
        row = {"data": DATA[options.dataset], "seed": str(seed)}
        torch.manual_seed(seed)
        data = Data(options, seed)
        theirs = train_ffjord(options, data)
        row |= {
            "FFJORD bits/dim": f"{theirs.validation:.3f}",
            "FFJORD steps": str(theirs.steps),
            "FFJORD seconds": f"{theirs.seconds:.0f}",
            "FFJORD test bits/dim": f"{likelihood(theirs.flow, data.test):.3f}",
        }
        for name, pieces in (("RNODE ", 2), ("one piece: ", 1)):
            torch.manual_seed(seed)
            data = Data(options, seed)
            ours = train_rnode(options, data, pieces, goal=theirs.validation)
            reached = ours.validation <= theirs.validation
            speed_up = f"{theirs.seconds / ours.seconds:.1f}" if reached else "not reached"
            row |= {
                f"{name}steps": str(ours.steps),
                f"{name}seconds": f"{ours.seconds:.0f}",
                f"{name}speed-up": speed_up,
                f"{name}test bits/dim": f"{likelihood(ours.flow, data.test):.3f}",
            }
        rows.append(row)
        print(row, flush=True)
    title = f"seconds of training to FFJORD's best, {options.dataset}"
    write_record(f"ffjord_{options.dataset}", title, rows)


if __name__ == "__main__":
    main()
