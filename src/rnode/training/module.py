"""The LightningModule: how a flow trains by equation (17), and what is measured."""

import math
from collections.abc import Callable

import torch
from pytorch_lightning import LightningModule
from torch import Tensor
from torch.nn.utils import get_total_norm
from torchmetrics import CatMetric

from rnode.errors import Diverged
from rnode.evaluation import (
    measure,
    solve_and_measure,
    standard_error,
    systematic,
    weighted_mean,
)
from rnode.flow import Flow, Solution
from rnode.loss import objective
from rnode.networks import Field
from rnode.seeding import PROBES, step_generator
from rnode.solver import integrate, solver_errors
from rnode.training.checkpoint import FORMAT
from rnode.training.graphs import RecordedSolves
from rnode.training.schedule import decay_passed
from rnode.transforms import Batch

NO_STEP = torch.iinfo(torch.int64).max


class RNODE(LightningModule):
    """A flow that trains by equation (17).

    It logs bits_per_dim; kinetic and jacobian, E and n per dimension; nfe_forward and nfe_backward,
    evaluations of f summed over the pieces.
    """

    def __init__(
        self,
        flow: Flow,
        optimizer: Callable[..., torch.optim.Optimizer],
        lambda_k: float,  # λ_K, weight of the kinetic energy
        lambda_j: float,  # λ_J, weight of the Jacobian's squared Frobenius norm
        warmup_steps: int = 0,  # steps over which the learning rate rises linearly
        decay: bool = False,  # whether it then falls to 0 by the end of the run, as half a cosine
        seed: int = 0,  # of noise and probes
        config: dict | None = None,  # of the run, as plain containers; checkpoints carry it
    ):
        super().__init__()
        self.flow = flow
        self.optimizer = optimizer
        self.lambda_k = lambda_k
        self.lambda_j = lambda_j
        self.warmup_steps = warmup_steps
        self.decay = decay
        self.seed = seed
        self.config = config or {}
        # A row per sample: index, log_det, bits/dim, E/d, n/d. NaN is kept: the run has diverged.
        self.evaluated = CatMetric(nan_strategy="disable")
        self.validation_bits = torch.zeros(0)  # bits/dim of the validation samples, ascending;
        # of weighted ones, as many quantiles
        self.first_bad_step = torch.tensor(NO_STEP)  # on the device, so that no step waits for it
        self.reason = ""  # why a solver gave up in this process
        self.step = 0  # the training step that runs
        self.solution: Solution | None = None  # of this step
        self.nfe = 0  # evaluations of f in the last training step
        self.integrate = integrate  # or CUDA graphs of it

    @property
    def logs(self) -> bool:
        """Whether metrics of this training step are read: a call of `log` takes a millisecond."""
        last = self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        return last or (self.step + 1) % max(1, self.trainer.log_every_n_steps) == 0

    def on_fit_start(self) -> None:
        trainer = self.trainer
        solver = self.flow.solver
        alone = self.device.type == "cuda" and trainer.world_size == 1
        window = trainer.accumulate_grad_batches  # a replay overwrites the gradients
        ours = all(isinstance(piece.field, Field) for piece in self.flow.pieces)
        recordable = not solver.train.adaptive and solver.gradient == "backprop" and ours
        if alone and window == 1 and recordable:
            data = trainer.datamodule
            self.integrate = RecordedSolves(min(data.batch_size, len(data.splits.train)))
            trainer.print("the first step records the solves of training steps as CUDA graphs")

    def on_train_start(self) -> None:
        weights = self.trainer.datamodule.splits.weights_of("train")
        self.weights = weights.float().to(self.device)

    def on_fit_end(self) -> None:
        self.integrate = integrate  # the test needs the memory of the graphs

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.step = self.global_step
        place = (self.seed, self.current_epoch, batch_idx, self.global_rank)
        generator = step_generator(self.device, *place, PROBES)
        try:
            self.solution = self.flow.solve(batch.y, batch.c, generator, self.integrate)
        except Diverged as error:
            self.reason = f"{error}; "
            # NaN for the gradient of every parameter: all processes of DDP then stop together.
            return math.nan * sum(parameter.sum() for parameter in self.parameters())
        solution = self.solution
        weights = self.weights[batch.index]
        loss = objective(solution.state, self.lambda_k, self.lambda_j, solution.log_q, weights)
        measures = measure(self.flow, batch, solution)._asdict()
        means = {name: weighted_mean(values, weights) for name, values in measures.items()}
        self.log_step({"loss": loss, "nfe_forward": solution.nfe_forward} | means)
        return loss

    def log_step(self, metrics: dict[str, Tensor | float]) -> None:
        """Log what a training step has measured, if it is a log step or the last of an epoch."""
        if self.logs:
            self.log_dict({f"train/{name}": value for name, value in metrics.items()})

    def backward(self, loss: Tensor) -> None:
        try:
            with solver_errors():
                loss.backward()
        except Diverged as error:
            raise Diverged(f"{error} in the gradient at training step {self.step}") from None

    def on_after_backward(self) -> None:
        self.nfe = 0
        if self.solution is not None:
            self.log_step({"nfe_backward": self.solution.nfe_backward})
            self.nfe = self.solution.nfe_forward + self.solution.nfe_backward
        self.solution = None  # its graph is freed before the optimizer's step

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        norm = get_total_norm(p.grad for p in self.parameters() if p.grad is not None)
        self.log_step({"gradient_norm": norm, "lr": optimizer.param_groups[0]["lr"]})
        now = torch.full_like(norm, self.step, dtype=torch.int64)
        now = now.masked_fill(norm.isfinite(), NO_STEP)
        self.first_bad_step = torch.minimum(self.first_bad_step.to(norm.device), now)
        # An accelerator would wait for every check, so it checks when its metrics are read.
        if self.device.type == "cpu" or self.logs:
            self.raise_if_diverged()

    def raise_if_diverged(self) -> None:
        """Raise Diverged if a gradient was NaN or infinite, which all processes see together."""
        step = int(self.first_bad_step)
        if step < NO_STEP:
            what = "the gradient became NaN or infinite"
            raise Diverged(f"{self.reason}{what} at training step {step}")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        try:
            solution, measures = solve_and_measure(self.flow, batch, self.seed)
            nfe = solution.nfe_forward
        except Diverged as error:
            self.reason = f"{error}; "
            nfe = 0
            measures = 3 * [torch.full_like(batch.log_det, math.nan)]
        self.evaluated.update(torch.stack([batch.index, batch.log_det, *measures], dim=1))
        stage = "test" if self.trainer.testing else "val"
        self.log(f"{stage}/nfe_forward", nfe, batch_size=len(batch.index), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        rows = self.evaluated.compute()
        self.evaluated.reset()
        # Distributed samplers repeat samples to fill the last batch: each sample counts once.
        rows = rows[rows[:, 0].argsort(stable=True)]
        rows = rows[rows[:, 0].diff(prepend=rows.new_tensor([-1])) > 0]
        index = rows[:, 0].long().cpu()
        columns = rows[:, 1:].T
        stage = "test" if self.trainer.testing else "val"
        weights = self.trainer.datamodule.splits.weights_of(stage)[index]
        log_det, bits, kinetic, jacobian = weighted_mean(columns, weights)
        if not bits.isfinite():
            what = f"{stage} bits/dim is {bits:.3g}"
            raise Diverged(f"{self.reason}{what} after training step {self.global_step}")
        means = {"bits_per_dim": bits, "bits_per_dim_se": standard_error(columns[1], weights)}
        means |= {"log_det": log_det, "kinetic": kinetic}
        if not jacobian.isnan():  # no probe measures it if the divergence is exact
            means["jacobian"] = jacobian
        self.log_dict({f"{stage}/{name}": value for name, value in means.items()}, sync_dist=True)
        if stage == "val":
            bits, order = columns[1].cpu().sort()
            self.validation_bits = bits[systematic(weights[order], len(bits))]

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = self.optimizer(self.parameters())
        self.options = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        return optimizer

    def on_train_batch_start(self, *_) -> None:
        """Set the learning rate of this step, and the options that a checkpoint has put back."""
        share = decay_passed(self.trainer) if self.decay else 0.0
        lr = self.options["lr"] * self.schedule(self.global_step, share)
        self.trainer.optimizers[0].param_groups[0].update(self.options | {"lr": lr})

    def schedule(self, step: int, share: float) -> float:
        """Return the factor of the learning rate at a step, when `share` of the run has passed.

        It rises linearly over the warmup, times a cosine that falls to 0 as the share goes to 1.
        """
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        return rise * (1 + math.cos(math.pi * min(share, 1.0))) / 2

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        self.raise_if_diverged()  # rather than overwrite the last good checkpoint
        checkpoint |= {"format": FORMAT, "config": self.config}
        checkpoint["validation_bits"] = self.validation_bits

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.validation_bits = checkpoint["validation_bits"]
