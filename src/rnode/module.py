"""The LightningModule: what is done with a batch, and what is measured."""

import math
from collections.abc import Callable, Iterable

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torchmetrics import CatMetric

from rnode.data import Batch
from rnode.draws import sample_generators
from rnode.errors import DivergenceError, configured, is_int, is_number, require
from rnode.evaluation import PROBES, measure, standard_error
from rnode.flow import Flow
from rnode.objective import bits_per_dim, log_normal, objective
from rnode.solver import solver_errors

NOTHING = torch.iinfo(torch.int64).max
TRIAL = (2, 3)  # shape of the weight on which an optimizer is tried


class RNODE(LightningModule):
    """A flow trained by equation (17).

    Logged under train/, val/ and test/: bits_per_dim; kinetic and jacobian, E and n per dimension; nfe_forward and
    nfe_backward, evaluations of f summed over the pieces. `config`, a plain dict, travels in the checkpoints.
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
    ):
        super().__init__()
        require(is_number(lambda_k, at_least=0), "reg.lambda_k", lambda_k, "a number, 0 or more")
        require(is_number(lambda_j, at_least=0), "reg.lambda_j", lambda_j, "a number, 0 or more")
        require(is_int(warmup_steps, at_least=0), "warmup_steps", warmup_steps, "a whole number, 0 or more")
        require(isinstance(decay, bool), "decay", decay, "true or false")
        self.flow, self.optimizer, self.decay = flow, optimizer, decay
        self.lambda_k, self.lambda_j, self.warmup_steps, self.seed = lambda_k, lambda_j, warmup_steps, seed
        self.config = config or {}
        self.evaluated = CatMetric()  # a row an image: index, bits/dim, kinetic, jacobian
        pieces = range(1, 1 + len(flow.pieces))
        self.watched = [f"{name} of piece {i}" for i in pieces for name in "zlEn"]
        self.watched += ["the loss", *(f"the gradient of piece {i}" for i in pieces)]
        # The first thing on this process that was not finite: training step × number of things watched + which of them. Not
        # a buffer: DDP would put the first process's in its place.
        self.diverged = torch.tensor(NOTHING)
        self.failure: str | None = None  # what a solver on this process has said, if others would wait for this process

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        try:
            state = self.flow(batch.y)
        except DivergenceError as error:
            self.fail(f"{error} at training step {self.global_step}")
            return self.no_loss(self.parameters())
        loss = objective(state, self.lambda_k, self.lambda_j)
        self.loss_finite = loss.detach().isfinite()
        with torch.no_grad():
            bits = bits_per_dim(log_normal(state.z) + state.l, batch.log_det, self.flow.d).mean()
        self.log_dict({"train/bits_per_dim": bits, "train/nfe_forward": self.flow.nfe[0]}, prog_bar=True)
        self.log_dict(
            {
                "train/loss": loss,
                "train/kinetic": state.E.mean() / self.flow.d,
                "train/jacobian": state.n.mean() / self.flow.d,
            }
        )
        return loss

    def backward(self, loss: Tensor) -> None:
        try:
            with solver_errors():
                loss.backward()
        except DivergenceError as error:
            # Pieces are gone through from the last to the first: the first that has begun is the one that failed.
            piece = next(i for i, piece in enumerate(self.flow.pieces, 1) if piece.nfe_backward > 0)
            # A parameter that has its gradient has sent it; all have with the first of several accumulated batches.
            unsent = [parameter for parameter in self.parameters() if parameter.grad is None]
            self.fail(f"{error} in the gradient of piece {piece} at training step {self.global_step}", hold=bool(unsent))
            self.no_loss(unsent).backward()

    def fail(self, message: str, hold: bool = True) -> None:
        """Raise what a solver has said. Of several processes, hold it instead until all look whether one has failed.

        The others wait for this one's gradient: a NaN, from `no_loss`, is what they get.
        """
        if self.trainer.world_size == 1 or not hold:
            raise DivergenceError(message) from None
        self.failure = self.failure or message

    def no_loss(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """NaN, with NaN for the gradients of the parameters."""
        self.loss_finite = torch.tensor(False, device=self.device)
        return math.nan * sum(parameter.sum() for parameter in parameters)

    def on_after_backward(self) -> None:
        self.log("train/nfe_backward", self.flow.nfe[1])
        self.watch()
        # An accelerator would have to wait for a look at every step; it is looked at when its metrics are.
        if self.device.type == "cpu" or (self.global_step + 1) % max(1, self.trainer.log_every_n_steps) == 0:
            self.stop_if_diverged()

    def watch(self) -> None:
        """Note, on the device, what of this step is not finite."""
        gradients = [[p.grad for p in piece.parameters() if p.grad is not None] for piece in self.flow.pieces]
        finite = [*(piece.finite for piece in self.flow.pieces), self.loss_finite[None]]
        finite = torch.cat([*finite, torch.stack([get_total_norm(g).isfinite() for g in gradients])])
        now = self.global_step * len(self.watched) + finite.int().argmin()
        self.diverged = torch.minimum(self.diverged.to(now.device), now.masked_fill(finite.all(), NOTHING))

    def on_validation_start(self) -> None:
        self.stop_if_diverged()

    def stop_if_diverged(self) -> None:
        """DivergenceError on all processes, with the first that any of them has noted."""
        first = int(self.trainer.strategy.reduce(self.diverged.to(self.device, copy=True), reduce_op="min"))
        if first < NOTHING:
            step, what = divmod(first, len(self.watched))
            message = f"{self.watched[what]} became NaN or infinite at training step {step}"
            raise self.shared_error(self.failure if int(self.diverged) == first else None, message)

    def shared_error(self, said: str | None, message: str) -> DivergenceError:
        """What a solver has `said`, on the first process where it did; `message` if on none."""
        everywhere = [said]
        if self.trainer.world_size > 1:
            everywhere = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(everywhere, said)
        return DivergenceError(next(filter(None, everywhere), message), shared=True)

    def evaluation_step(self, batch: Batch, stage: str) -> None:
        try:
            _, measures = measure(self.flow, batch, sample_generators(batch.index, self.seed, PROBES))
        except DivergenceError as error:
            self.fail(str(error))
            measures = 3 * [torch.full_like(batch.log_det, math.nan)]
        self.evaluated.update(torch.stack([batch.index.to(measures[0].dtype), *measures], dim=1))
        self.log(f"{stage}/nfe_forward", self.flow.nfe[0], on_epoch=True, batch_size=len(batch.index), sync_dist=True)

    def evaluation_end(self, stage: str) -> None:
        rows = self.evaluated.compute()
        self.evaluated.reset()
        # Distributed samplers pad the last batch with images they have already given: count each once.
        _, first = torch.unique(rows[:, 0], return_inverse=True)
        rows = rows.new_zeros(int(first.max()) + 1, rows.shape[1]).index_copy_(0, first, rows)[:, 1:]
        bits, kinetic, jacobian = rows.mean(0)
        if not bits.isfinite():
            message = f"{stage} bits/dim is {bits:.3g} after training step {self.global_step}"
            raise self.shared_error(self.failure, message)
        error = standard_error(rows[:, 0])
        self.log(f"{stage}/bits_per_dim", bits, prog_bar=True, sync_dist=True)
        measured = {"bits_per_dim_se": error, "kinetic": kinetic, "jacobian": jacobian}
        self.log_dict({f"{stage}/{name}": value for name, value in measured.items()}, sync_dist=True)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluation_step(batch, "val")

    def on_validation_epoch_end(self) -> None:
        self.evaluation_end("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluation_step(batch, "test")

    def on_test_epoch_end(self) -> None:
        self.evaluation_end("test")

    def on_train_start(self) -> None:
        """Refuse to go on from an optimizer's state that is not what it makes itself, before the first step meets it."""
        path, (optimizer,) = self.trainer.ckpt_path, self.trainer.optimizers
        if path is None:
            return
        for group in optimizer.param_groups:
            require(is_number(group["lr"], at_least=0), f"ckpt_path={path}: lr", group["lr"], "a number, 0 or more")
            with configured(f"ckpt_path={path}: the options of its optimizer"):
                ours = self.try_optimizer({name: value for name, value in group.items() if name != "params"})
        for weight, state in optimizer.state.items():
            for name, value in ours.items():
                given, right = state.get(name), f"what a run of ours writes, for weights {tuple(weight.shape)}"
                fits = type(given) is type(value)
                if fits and isinstance(value, Tensor):
                    shape = weight.shape if value.shape == TRIAL else given.shape
                    fits = given.shape == shape and bool(given.isfinite().all())
                require(fits, f"ckpt_path={path}: {name}", type(given).__name__, right)

    def try_optimizer(self, options: dict) -> dict:
        """The state that the optimizer has made for a weight of shape TRIAL after one step. `options` replace its own."""
        weight = torch.zeros(TRIAL, device=self.device, dtype=self.dtype).requires_grad_()
        weight.grad = torch.zeros_like(weight)
        optimizer = self.optimizer([weight])
        optimizer.param_groups[0].update(options)
        optimizer.step(lambda: weight.sum())
        return optimizer.state[weight]

    def configure_optimizers(self) -> torch.optim.Optimizer | dict:
        with configured("optimizer"):
            self.try_optimizer({})  # finds a value of the wrong type, which constructors take
            optimizer = self.optimizer(self.parameters())
        if self.warmup_steps == 0 and not self.decay:
            return optimizer
        steps = self.trainer.estimated_stepping_batches if self.decay else math.inf
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.learning_rate_factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def learning_rate_factor(self, step: int, steps: float) -> float:
        """A linear rise over the warm-up, times half a cosine from 1 to 0 over all the steps if `decay`."""
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        return rise * (1 + math.cos(math.pi * min(step / max(steps, 1), 1))) / 2 if self.decay else rise

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        self.stop_if_diverged()  # rather than write over the last good one
        checkpoint["config"] = self.config
