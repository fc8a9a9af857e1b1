"""The LightningModule: how a flow trains by equation (17), and what is measured."""

import math
from collections.abc import Callable

import torch
from pytorch_lightning import LightningModule
from torch import Tensor
from torchmetrics import CatMetric

from rnode.distributed import gather_lists
from rnode.errors import Diverged
from rnode.evaluation import solve_and_measure, standard_error
from rnode.flow import Flow, Solution
from rnode.loss import bits_per_dim, log_normal, objective
from rnode.matching import flow_matching
from rnode.seeding import PROBES, step_generator
from rnode.solver import integrate, solver_errors
from rnode.training.checkpoint import FORMAT
from rnode.training.divergence import DivergenceWatch, nan_loss
from rnode.training.limits import time_passed
from rnode.transforms import Batch


class RNODE(LightningModule):
    """A flow that trains by equation (17).

    It logs under train/, val/ and test/: bits_per_dim; kinetic and jacobian, E and n per dimension;
    nfe_forward and nfe_backward, evaluations of f summed over the pieces. In training it also logs
    the loss, the norm of its gradient, and the learning rate. While `matching` is set, the loss is
    that of flow matching, which has no bits/dim.
    """

    def __init__(
        self,
        flow: Flow,
        optimizer: Callable[..., torch.optim.Optimizer],
        lambda_k: float,  # λ_K, weight of the kinetic energy
        lambda_j: float,  # λ_J, weight of the Jacobian's squared Frobenius norm
        warmup_steps: int = 0,  # steps over which the learning rate rises linearly
        decay: bool = False,  # whether it then falls to 0 by the end of the run, as half a cosine
        seed: int = 0,  # of noise and probes in evaluation
        config: dict | None = None,  # of the run, as plain containers; checkpoints carry it
        learning_rate_factor: float = 1.0,  # multiplies the learning rate of `optimizer`
    ):
        super().__init__()
        self.flow, self.optimizer = flow, optimizer
        self.lambda_k, self.lambda_j = lambda_k, lambda_j
        self.warmup_steps, self.decay, self.seed = warmup_steps, decay, seed
        self.config, self.learning_rate_factor = config or {}, learning_rate_factor
        # A row per sample: index, log_det, bits/dim, E/d, n/d. NaN is kept, for a divergence.
        self.evaluated = CatMetric(nan_strategy="disable")
        self.validation_bits = torch.zeros(0)  # bits/dim of the validation samples, ascending
        self.divergence = DivergenceWatch(flow)
        self.solution: Solution | None = None  # of the training step that runs
        self.integrate = integrate
        self.nfe = 0  # evaluations of f in the last training step
        self.logs = True  # whether metrics of this training step are read
        self.matching, self.start = False, 0  # the step at which equation (17) begins

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        # A call of `log` takes a millisecond, and these are most of a cheap step.
        last = self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        log_every = max(1, self.trainer.log_every_n_steps)
        self.logs = last or (self.global_step + 1) % log_every == 0
        place = (self.seed, self.current_epoch, self.batches(), self.global_rank)
        generator = step_generator(self.device, *place, PROBES)
        if self.matching:
            loss = flow_matching(self.flow, batch.y, batch.c, generator)
            self.log_step({"loss": loss})
            return loss
        try:
            self.solution = self.flow.solve(batch.y, batch.c, generator, self.integrate)
        except Diverged as error:
            self.divergence.gave_up(f"{error} at training step {self.global_step}")
            return nan_loss(self.parameters())
        state, d = self.solution.state, self.flow.d
        loss = objective(state, self.lambda_k, self.lambda_j)
        bits = bits_per_dim(log_normal(state.z) + state.l, batch.log_det, d).mean()
        kinetic, jacobian = state.E.mean() / d, state.n.mean() / d
        self.log_step({"loss": loss, "kinetic": kinetic, "jacobian": jacobian})
        self.log_step({"bits_per_dim": bits, "nfe_forward": self.solution.nfe_forward})
        return loss

    def batches(self) -> int:
        """The number of this batch in its epoch."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def log_step(self, metrics: dict[str, Tensor | float]) -> None:
        """Log what a training step has measured, if it is a log step or the last of an epoch."""
        for name, value in metrics.items() if self.logs else ():
            if not isinstance(value, Tensor):  # Lightning would copy a number to the device
                value = torch.full((), float(value), device=self.device)
            self.log(f"train/{name}", value)

    def backward(self, loss: Tensor) -> None:
        self.loss = loss.detach()
        try:
            with solver_errors():
                loss.backward()
        except Diverged as error:
            # The backward pass visits the pieces from last to first; the one visited last failed.
            piece = 1 + [piece.nfe_backward > 0 for piece in self.solution.pieces].index(True)
            where = f"in the gradient of piece {piece} at training step {self.global_step}"
            # A parameter with a gradient was sent already: after the first accumulated batch, all.
            unsent = [parameter for parameter in self.parameters() if parameter.grad is None]
            self.divergence.gave_up(f"{error} {where}")
            if unsent:
                nan_loss(unsent).backward()
            self.loss = self.loss * math.nan

    def on_after_backward(self) -> None:
        solution = self.solution
        forward, backward = len(self.flow.pieces) * self.matching, 0
        if solution:
            forward, backward = solution.nfe_forward, solution.nfe_backward
        self.nfe = forward + backward
        norm = self.divergence.watch(self.global_step, solution, self.loss)
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log_step({"nfe_backward": backward, "gradient_norm": norm, "lr": lr})
        self.solution = None
        # An accelerator would wait for every check, so it checks when its metrics are read.
        if self.device.type == "cpu" or self.logs:
            self.divergence.raise_if_diverged()

    def on_validation_start(self) -> None:
        self.divergence.raise_if_diverged()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        try:
            solution, measures = solve_and_measure(self.flow, batch, self.seed)
            nfe = solution.nfe_forward
        except Diverged as error:
            self.divergence.gave_up(str(error))
            nfe, measures = 0, 3 * [torch.full_like(batch.log_det, math.nan)]
        self.evaluated.update(torch.stack([batch.index, batch.log_det, *measures], dim=1))
        stage, size = "test" if self.trainer.testing else "val", len(batch.index)
        self.log(f"{stage}/nfe_forward", nfe, batch_size=size, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        rows = self.evaluated.compute()
        self.evaluated.reset()
        # Distributed samplers repeat samples to fill the last batch: each sample counts once.
        rows = rows[rows[:, 0].argsort(stable=True)]
        rows = rows[rows[:, 0].diff(prepend=rows.new_tensor([-1])) > 0][:, 1:]
        log_det, bits, kinetic, jacobian = rows.mean(0)
        stage = "test" if self.trainer.testing else "val"
        if not bits.isfinite():
            held = filter(None, gather_lists([self.divergence.message]))
            message = f"{stage} bits/dim is {bits:.3g} after training step {self.global_step}"
            raise Diverged(next(held, message))
        self.log(f"{stage}/bits_per_dim", bits, sync_dist=True)
        self.log(f"{stage}/bits_per_dim_se", standard_error(rows[:, 1]), sync_dist=True)
        self.log(f"{stage}/log_det", log_det, sync_dist=True)
        self.log(f"{stage}/kinetic", kinetic, sync_dist=True)
        self.log(f"{stage}/jacobian", jacobian, sync_dist=True)
        if stage == "val":
            self.validation_bits = rows[:, 1].sort().values.cpu()

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    def configure_optimizers(self) -> dict:
        optimizer = self.optimizer(self.parameters())
        group = optimizer.param_groups[0]
        group["lr"] *= self.learning_rate_factor
        self.options = {k: v for k, v in group.items() if k != "params"}
        if self.warmup_steps == 0 and not self.decay:
            return {"optimizer": optimizer}
        steps = self.decay_steps() if self.decay else math.inf

        def factor(step: int) -> float:
            rise = min(1.0, (step - self.start + 1) / (self.warmup_steps + 1))
            late = self.decay and step > 0  # the time before the first step does not count
            share = max(step / max(steps, 1), time_passed(self.trainer) if late else 0.0)
            return rise * (1 + math.cos(math.pi * min(share, 1.0))) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def decay_steps(self) -> float:
        """Return the steps of max_epochs, whether or not max_steps ends the run earlier."""
        trainer = self.trainer
        steps = trainer.estimated_stepping_batches  # counts the batches of an epoch too
        if trainer.max_epochs in (None, -1):
            return steps
        window = trainer.accumulate_grad_batches
        return trainer.max_epochs * math.ceil(trainer.num_training_batches / window)

    def apply_options(self) -> None:
        """Set the optimizer's options to the command line's, and its learning rate to this step's.

        A checkpoint has put back its own.
        """
        group = self.trainer.optimizers[0].param_groups[0]
        group.update(self.options)
        for schedule in (config.scheduler for config in self.trainer.lr_scheduler_configs):
            group["initial_lr"] = group["lr"]
            schedule.base_lrs, schedule.last_epoch = [group["lr"]], self.trainer.global_step
            group["lr"] *= schedule.lr_lambdas[0](schedule.last_epoch)

    on_train_start = apply_options

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        self.divergence.raise_if_diverged()  # rather than overwrite the last good checkpoint
        checkpoint |= {"format": FORMAT, "config": self.config}
        checkpoint["learning_rate_factor"] = self.learning_rate_factor
        checkpoint["validation_bits"] = self.validation_bits

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.validation_bits = checkpoint.get("validation_bits", self.validation_bits)
