"""The LightningModule: how a flow trains by equation (17), and what is measured."""

import math
from collections.abc import Callable

import torch
from pytorch_lightning import LightningModule
from torch import Tensor
from torchmetrics import CatMetric

from rnode.errors import DivergenceError
from rnode.evaluation import measure, standard_error
from rnode.flow import Flow, Solution
from rnode.loss import bits_per_dim, log_normal, objective
from rnode.solver import solver_errors
from rnode.training.checkpoint import FORMAT
from rnode.training.divergence import DivergenceWatch, nan_loss
from rnode.transforms import Batch


class RNODE(LightningModule):
    """A flow that trains by equation (17).

    It logs under train/, val/ and test/: bits_per_dim; kinetic and jacobian, E and n per dimension;
    nfe_forward and nfe_backward, evaluations of f summed over the pieces.

    Args:
        flow: the flow.
        optimizer: makes the optimizer of the parameters it is given.
        lambda_k: λ_K, weight of the kinetic energy.
        lambda_j: λ_J, weight of the Jacobian's squared Frobenius norm.
        warmup_steps: steps over which the learning rate rises linearly.
        decay: whether the learning rate then falls to zero over the run, as half a cosine.
        seed: seed of noise and probes in evaluation.
        config: the run's configuration as plain containers; checkpoints carry it.
        learning_rate_factor: multiplies the learning rate of the optimizer.
    """

    def __init__(
        self,
        flow: Flow,
        optimizer: Callable[..., torch.optim.Optimizer],
        lambda_k: float,
        lambda_j: float,
        warmup_steps: int = 0,
        decay: bool = False,
        seed: int = 0,
        config: dict | None = None,
        learning_rate_factor: float = 1.0,
    ):
        super().__init__()
        self.flow, self.optimizer = flow, optimizer
        self.lambda_k, self.lambda_j = lambda_k, lambda_j
        self.warmup_steps, self.decay, self.seed = warmup_steps, decay, seed
        self.config, self.learning_rate_factor = config or {}, learning_rate_factor
        self.evaluated = CatMetric()  # a row per sample: index, bits/dim, kinetic, jacobian
        self.divergence = DivergenceWatch(flow)
        self.solution: Solution | None = None  # of the training step that runs
        self.loss = torch.tensor(math.nan)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        try:
            self.solution = self.flow.solve(batch.y)
        except DivergenceError as error:
            self.divergence.hold(self, f"{error} at training step {self.global_step}")
            self.solution, loss = None, nan_loss(self.parameters())
            self.loss = loss.detach()
            return loss
        state = self.solution.state
        loss = objective(state, self.lambda_k, self.lambda_j)
        self.loss = loss.detach()
        with torch.no_grad():
            log_prob = log_normal(state.z) + state.l
            bits = bits_per_dim(log_prob, batch.log_det, self.flow.d).mean()
        shown = {"train/bits_per_dim": bits, "train/nfe_forward": self.solution.nfe_forward}
        self.log_dict(shown, prog_bar=True)
        self.log("train/loss", loss)
        self.log("train/kinetic", state.E.mean() / self.flow.d)
        self.log("train/jacobian", state.n.mean() / self.flow.d)
        return loss

    def backward(self, loss: Tensor) -> None:
        try:
            with solver_errors():
                loss.backward()
        except DivergenceError as error:
            self.divergence.hold_backward(self, str(error), self.solution)
            self.loss = self.loss * math.nan

    def on_after_backward(self) -> None:
        self.log("train/nfe_backward", self.solution.nfe_backward if self.solution else 0)
        self.divergence.watch(self.global_step, self.solution, self.loss)
        self.solution = None
        # An accelerator would wait for every check, so it checks when its metrics are read.
        log_every = max(1, self.trainer.log_every_n_steps)
        if self.device.type == "cpu" or (self.global_step + 1) % log_every == 0:
            self.divergence.raise_if_diverged(self)

    def on_validation_start(self) -> None:
        self.divergence.raise_if_diverged(self)

    def evaluation_step(self, batch: Batch, stage: str) -> None:
        try:
            solution, measures = measure(self.flow, batch, self.seed)
            nfe = solution.nfe_forward
        except DivergenceError as error:
            self.divergence.hold(self, str(error))
            nfe, measures = 0, 3 * [torch.full_like(batch.log_det, math.nan)]
        index = batch.index.to(measures[0].dtype)
        self.evaluated.update(torch.stack([index, *measures], dim=1))
        size = len(batch.index)
        self.log(f"{stage}/nfe_forward", nfe, on_epoch=True, batch_size=size, sync_dist=True)

    def evaluation_end(self, stage: str) -> None:
        rows = self.evaluated.compute()
        self.evaluated.reset()
        # Distributed samplers repeat samples to fill the last batch: each sample counts once.
        _, first = torch.unique(rows[:, 0], return_inverse=True)
        unique = rows.new_zeros(int(first.max()) + 1, rows.shape[1])
        rows = unique.index_copy_(0, first, rows)[:, 1:]
        bits, kinetic, jacobian = rows.mean(0)
        if not bits.isfinite():
            message = f"{stage} bits/dim is {bits:.3g} after training step {self.global_step}"
            self.divergence.raise_together(self, message)
        error = standard_error(rows[:, 0])
        self.log(f"{stage}/bits_per_dim", bits, prog_bar=True, sync_dist=True)
        self.log(f"{stage}/bits_per_dim_se", error, sync_dist=True)
        self.log(f"{stage}/kinetic", kinetic, sync_dist=True)
        self.log(f"{stage}/jacobian", jacobian, sync_dist=True)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluation_step(batch, "val")

    def on_validation_epoch_end(self) -> None:
        self.evaluation_end("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluation_step(batch, "test")

    def on_test_epoch_end(self) -> None:
        self.evaluation_end("test")

    def configure_optimizers(self) -> dict:
        optimizer = self.optimizer(self.parameters())
        for group in optimizer.param_groups:
            group["lr"] *= self.learning_rate_factor
        self.options = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        if self.warmup_steps == 0 and not self.decay:
            return {"optimizer": optimizer}
        steps = self.trainer.estimated_stepping_batches if self.decay else math.inf

        def factor(step: int) -> float:
            rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
            if not self.decay:
                return rise
            return rise * (1 + math.cos(math.pi * min(step / max(steps, 1), 1))) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Set the optimizer's options to the command line's; a checkpoint has put back its own."""
        for group in self.trainer.optimizers[0].param_groups:
            group.update(self.options)
        for config in self.trainer.lr_scheduler_configs:
            schedule = config.scheduler
            group = schedule.optimizer.param_groups[0]
            group["initial_lr"] = self.options["lr"]
            schedule.base_lrs = [self.options["lr"]]
            group["lr"] = self.options["lr"] * schedule.lr_lambdas[0](schedule.last_epoch)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        self.divergence.raise_if_diverged(self)  # rather than overwrite the last good checkpoint
        checkpoint["format"] = FORMAT
        checkpoint["config"] = self.config
        checkpoint["learning_rate_factor"] = self.learning_rate_factor
