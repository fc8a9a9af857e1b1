"""A neural ODE that classifies (section 9): a layer to features, one piece, and a linear layer.

It trains by cross-entropy + (λ_K E + λ_J n) / d, with d the number of features.
"""

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rnode.data.splits import Splits
from rnode.dynamics import Probes
from rnode.flow import Piece, PieceSolution
from rnode.networks import Field, TimeConv2d, TimeLinear
from rnode.solver import Solver

NOISE = 0.2  # standard deviation, of pixels in [0, 1] or of standardized columns
MEASURES = {
    "accuracy": "accuracy",
    "noisy": f"accuracy with noise {NOISE}",
    "nfe": "NFE (adaptive solver)",
    "jacobian": "squared Jacobian norm / d",
    "kinetic": "kinetic energy / d",
}


class Classifier(LightningModule):
    """Classifies images (B, C, H, W) or vectors (B, d): x → logits (B, classes).

    Its strided convolution, or a linear layer, gives `hidden` features, and its field has `layers`
    layers. It logs MEASURES of validation and test, which solve by the method `solver.test`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        solver: Solver,
        optimizer: Callable[..., torch.optim.Optimizer],
        lambda_k: float,
        lambda_j: float,
        hidden: int,
        layers: int,
        warmup_steps: int = 0,
    ):
        super().__init__()
        self.solver, self.optimizer, self.probes = solver, optimizer, Probes()
        self.lambda_k, self.lambda_j, self.warmup_steps = lambda_k, lambda_j, warmup_steps
        if len(shape) == 3:
            self.stem, layer = nn.Conv2d(shape[0], hidden, 3, stride=2, padding=1), TimeConv2d
        else:
            self.stem, layer = nn.Linear(*shape, hidden), TimeLinear
        self.piece = Piece(Field(layer, [hidden] * (layers + 1)))
        self.d = self.stem(torch.zeros(1, *shape)).numel()  # features
        self.head = nn.LazyLinear(classes)
        self.curve: list[dict[str, float]] = []  # a row per validation, and one for the test
        self.seconds = 0.0  # of training batches

    def forward(self, x: Tensor) -> tuple[Tensor, PieceSolution]:
        z = self.stem(x)
        method = self.solver.train if self.training else self.solver.test
        solution = self.piece(z, self.probes.sample(z), method, self.solver.gradient)
        return self.head(solution.state.z.flatten(1)), solution

    def on_train_batch_start(self, *_) -> None:
        self.mark = time.perf_counter()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, label = batch
        logits, solution = self(x)
        _, _, E, n = solution.state
        penalties = (self.lambda_k * E + self.lambda_j * n).mean() / self.d
        loss = F.cross_entropy(logits, label) + penalties
        self.log("train/loss", loss)
        return loss

    def on_train_batch_end(self, *_) -> None:
        self.seconds += time.perf_counter() - self.mark

    def on_validation_epoch_start(self) -> None:
        self.rows: list[Tensor] = []  # of MEASURES, a column per sample

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, label = batch
        logits, solution = self(x)
        noisy, _ = self(x + NOISE * torch.randn_like(x))
        right = ((part.argmax(1) == label).float() for part in (logits, noisy))
        _, _, E, n = solution.state
        nfe = torch.full_like(E, solution.nfe_forward)  # of the batch
        self.rows.append(torch.stack([*right, nfe, n / self.d, E / self.d]))

    def on_validation_epoch_end(self) -> None:
        means = dict(zip(MEASURES, torch.cat(self.rows, dim=1).mean(1).tolist(), strict=True))
        stage = "test" if self.trainer.testing else "val"
        self.log_dict({f"{stage}/{name}": value for name, value in means.items()})
        self.log(f"{stage}/seconds_total", self.seconds)
        self.curve.append(means | {"seconds": self.seconds})
        if stage == "val":
            accuracy, nfe = f"{means['accuracy']:.4f}", f"{means['nfe']:.0f}"
            self.print(f"epoch {self.current_epoch + 1}: accuracy {accuracy}, NFE {nfe}")

    test_step = validation_step
    on_test_epoch_start, on_test_epoch_end = on_validation_epoch_start, on_validation_epoch_end

    def configure_optimizers(self) -> dict:
        optimizer, steps = self.optimizer(self.parameters()), self.warmup_steps
        rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / (steps + 1), total_iters=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rise, "interval": "step"}}


def labelled(splits: Splits, features: Callable[[Tensor], Tensor]) -> list[TensorDataset]:
    """Return (features(x), class) of training, validation and test; the labels are unit vectors."""
    pairs = zip((splits.train, splits.val, splits.test), splits.c.values(), strict=True)
    return [TensorDataset(features(x), label.argmax(1)) for x, label in pairs]


def loaders(sets: list[TensorDataset], batch: int, eval_batch: int) -> list[DataLoader]:
    train, *others = sets
    return [DataLoader(train, batch, shuffle=True), *(DataLoader(s, eval_batch) for s in others)]
