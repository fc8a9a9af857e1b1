"""A neural ODE that classifies (section 9): a convolution, one piece, and a linear layer.

It trains by cross-entropy + (λ_K E + λ_J n) / d, with d the number of features.
"""

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnode import Field, Piece, Probes, Solver, TimeConv2d
from rnode.flow import PieceSolution

NOISE = 0.2  # standard deviation, of pixels in [0, 1]
MEASURES = {
    "accuracy": "accuracy",
    "noisy": f"accuracy with noise {NOISE}",
    "nfe": "NFE (adaptive solver)",
    "jacobian": "squared Jacobian norm / d",
    "kinetic": "kinetic energy / d",
}
Labelled = tuple[Tensor, Tensor]  # images (N, C, H, W) in [0, 1] and their classes (N,)


class Classifier(nn.Module):
    """x (B, C, H, W) → logits (B, classes), and the solution of the piece.

    A strided convolution makes `hidden` channels; the field of the piece has `layers` layers.
    """

    def __init__(self, classes: int, solver: Solver, hidden: int, layers: int):
        super().__init__()
        self.solver = solver
        self.stem = nn.LazyConv2d(hidden, 3, stride=2, padding=1)
        self.piece = Piece(Field(TimeConv2d, [hidden] * (layers + 1)))
        self.head = nn.LazyLinear(classes)

    def forward(self, x: Tensor) -> tuple[Tensor, PieceSolution]:
        z = self.stem(x)
        method = self.solver.train if self.training else self.solver.test
        c, eps = z.new_empty(len(z), 0), Probes().sample(z)
        solution = self.piece(z, c, eps, method, self.solver.gradient)
        return self.head(solution.state.z.flatten(1)), solution


def penalized_loss(model: Classifier, x: Tensor, label: Tensor, penalty: float) -> Tensor:
    """Cross-entropy + (λ_K E + λ_J n) / d, averaged over x (B, C, H, W), with λ_K = λ_J."""
    logits, solution = model(x)
    z, _, E, n = solution.state
    return F.cross_entropy(logits, label) + penalty * (E + n).mean() / z[0].numel()


@torch.no_grad()
def measure(model: Classifier, data: Labelled, batch_size: int) -> dict[str, float]:
    """Return the means of MEASURES; NFE is a mean over batches, weighted by their sizes."""
    model.eval()
    rows = []
    for x, label in zip(*(part.split(batch_size) for part in data), strict=True):
        logits, solution = model(x)
        noisy, _ = model(x + NOISE * torch.randn_like(x))
        z, _, E, n = solution.state
        d, nfe = z[0].numel(), torch.full_like(E, solution.nfe_forward)
        correct = [(part.argmax(1) == label).float() for part in (logits, noisy)]
        rows.append(torch.stack([*correct, nfe, n / d, E / d]))
    return dict(zip(MEASURES, torch.cat(rows, 1).mean(1).tolist(), strict=True))


def train(
    model: Classifier, train: Labelled, val: Labelled, penalty: float, epochs: int, batch_size: int
) -> list[dict[str, float]]:
    """Train by Adam; return MEASURES of validation after each epoch, and the seconds until then."""
    model.train()
    model(train[0][:1])  # the first call makes the lazy weights
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    curve, seconds = [], 0.0
    for _ in range(epochs):
        model.train()
        start = time.perf_counter()
        for index in torch.randperm(len(train[0])).split(batch_size):
            optimizer.zero_grad()
            penalized_loss(model, train[0][index], train[1][index], penalty).backward()
            optimizer.step()
        seconds += time.perf_counter() - start
        curve.append(measure(model, val, 500) | {"seconds": seconds})
    return curve
