"""What Lightning calls while a flow trains: progress, compilation, the time an epoch takes, pictures."""

import gc
import signal
import sys
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from rnode.data import NOISE, DataModule
from rnode.draws import sample_generators
from rnode.errors import Stopped, is_int, is_number, require
from rnode.evaluation import PROBES, measure
from rnode.flow import Flow
from rnode.metrics import MetricsFile
from rnode.module import RNODE
from rnode.pictures import draw_curves, draw_samples
from rnode.solver import Method, Solver


class Progress(TQDMProgressBar):
    """The bar with bits/dim and NFE under their short names; finished epochs stay on the screen."""

    def __init__(self):
        refresh_rate = 1 if sys.stdout.isatty() else 20  # steps; a log file wants fewer lines
        super().__init__(refresh_rate=refresh_rate, leave=True)

    def get_metrics(self, trainer: Trainer, module: RNODE) -> dict:
        names = {"train/bits_per_dim": "bits/dim", "val/bits_per_dim": "val", "train/nfe_forward": "NFE"}
        metrics = super().get_metrics(trainer, module)
        return {short: metrics[name] for name, short in names.items() if name in metrics}


class Compile(Callback):
    """torch.compile of every field, in the first training step. What would have to be compiled again runs as it is written:
    a smaller last batch, validation, the test."""

    def on_fit_start(self, trainer: Trainer, module: RNODE) -> None:
        torch.compiler.set_stance("default")
        compile_fields(module.flow)
        self.compiled = False
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *_) -> None:
        if not self.compiled:
            trainer.print(f"compiled: the first step took {time.perf_counter() - self.start:.0f} s")
            torch.compiler.set_stance("eager_on_recompile")
            self.compiled = True


def compile_fields(flow: Flow) -> None:
    """Let torch.compile do f and εᵀ∇f of every piece, at their next call."""
    torch._dynamo.config.recompile_limit = 8 * len(flow.pieces)  # scales differ in shape
    for piece in flow.pieces:
        piece.field.compile()


class RefineGrid(Callback):
    """Halves the training solver's step when a grid twice as fine gives a bits/dim that differs by more than `tolerance`.

    Looked at every 50 steps, on as many validation images as a training batch has. (Section 6 of the paper found its step
    so by hand.) A net can learn to exploit a coarse grid's error, which its training loss would never show.
    """

    EVERY_N_STEPS = 50

    def __init__(self, tolerance: float):
        require(is_number(tolerance, at_least=0), "refine", tolerance, "a number of bits/dim, 0 or more")
        self.tolerance = tolerance
        self.step_size: float | None = None  # as refined so far

    def on_fit_start(self, trainer: Trainer, module: RNODE) -> None:
        if self.step_size is not None:  # from a checkpoint
            module.flow.solver = with_step(module.flow.solver, self.step_size)

    def on_train_batch_start(self, trainer: Trainer, module: RNODE, *_) -> None:
        if trainer.global_step % self.EVERY_N_STEPS == 0:
            solver = module.flow.solver
            finer = with_step(solver, solver.train.step_size / 2)
            if abs(self.bits(trainer, module, finer) - self.bits(trainer, module, solver)) > self.tolerance:
                module.flow.solver, self.step_size = finer, finer.train.step_size

    @torch.no_grad()
    def bits(self, trainer: Trainer, module: RNODE, solver: Solver) -> float:
        """Mean bits/dim of the same images, noise and probes each time, in training mode."""
        data: DataModule = trainer.datamodule
        index = torch.arange(min(data.batch_size, len(data.splits.val)))
        noise = None if data.dequantize is None else data.noise(sample_generators(index, module.seed, NOISE))
        batch = data.transform(data.splits.val[index].to(module.device), index, noise)
        before, module.flow.solver = module.flow.solver, solver
        _, measures = measure(module.flow, batch, sample_generators(index, module.seed, PROBES))
        module.flow.solver = before
        return float(measures.bits.mean())

    def state_dict(self) -> dict:
        return {"step_size": self.step_size}

    def load_state_dict(self, state: dict) -> None:
        if state["step_size"] is not None:
            Method("rk4", step_size=state["step_size"])  # refuses what is no step
        self.step_size = state["step_size"]


def with_step(solver: Solver, step_size: float) -> Solver:
    return replace(solver, train=replace(solver.train, step_size=step_size))


class SaveWithinEpochs(Callback):
    """Writes a checkpoint to `path` every `every_n_steps` training steps, but for an epoch's last.

    That one is left to the checkpoint after the validation: from one written before it, Lightning would go on with the
    next epoch and never validate this one.
    """

    def __init__(self, path: str | Path, every_n_steps: int):
        require(is_int(every_n_steps, at_least=1), "save_every_n_steps", every_n_steps, "a whole number, 1 or more")
        self.path, self.every_n_steps = Path(path), every_n_steps

    def on_train_batch_end(self, trainer: Trainer, *_) -> None:
        if trainer.global_step % self.every_n_steps == 0 and not trainer.is_last_batch:
            trainer.save_checkpoint(self.path, weights_only=False)


class StopOnSignal(Callback):
    """SIGINT, SIGTERM or SIGUSR1 ends the run after the training step it meets, with a checkpoint written to `path`.

    In a validation it is heard once that is over: half of one cannot be gone on with. `path` is written at each epoch's end
    too, by another callback. The same signal a second time does what it does to any program.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.received = self.agreed = 0  # number of the signal that this process, or any of them, has had

    def on_train_start(self, trainer: Trainer, module: RNODE) -> None:
        self.listen()

    def on_test_start(self, trainer: Trainer, module: RNODE) -> None:
        self.listen()

    def listen(self) -> None:
        """After Lightning has put its own handlers in place; at the end it puts those from before them back."""
        for number in self.SIGNALS:
            signal.signal(number, self.note)

    def note(self, number: int, frame: object) -> None:
        self.received = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def on_train_epoch_start(self, trainer: Trainer, module: RNODE) -> None:
        self.agree(trainer)
        self.stop(trainer)

    def on_train_batch_end(self, trainer: Trainer, *_) -> None:
        self.agree(trainer)
        if self.agreed and not trainer.is_last_batch and trainer.checkpoint_callbacks:
            trainer.save_checkpoint(self.path, weights_only=False)

    def on_train_batch_start(self, trainer: Trainer, *_) -> None:  # by then the step's metrics are logged
        self.stop(trainer)

    def on_test_batch_end(self, trainer: Trainer, *_) -> None:
        self.agree(trainer)
        self.stop(trainer)

    def agree(self, trainer: Trainer) -> None:
        """If any process was asked to stop, all do, at the same step."""
        received = torch.tensor(self.received)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX, group=self.group)
        self.agreed = int(received)

    def stop(self, trainer: Trainer) -> None:
        if self.agreed:
            name = signal.Signals(self.agreed).name
            raise Stopped(f"by {name} after {trainer.global_step} training steps", self.agreed)

    @cached_property
    def group(self) -> object:
        """The processes, reached without the accelerator: nothing on it is waited for."""
        return torch.distributed.new_group(backend="gloo")


class ScaleLearningRate(Callback):
    """Multiplies the learning rate by `factor`, after a checkpoint's has been put back, and its schedule's with it."""

    def __init__(self, factor: float):
        self.factor = factor

    def on_train_start(self, trainer: Trainer, module: RNODE) -> None:
        for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
            group.update({name: self.factor * group[name] for name in ("lr", "initial_lr") if name in group})
        for scheduler in (config.scheduler for config in trainer.lr_scheduler_configs):
            scheduler.base_lrs = [self.factor * rate for rate in scheduler.base_lrs]


class EpochTimer(Callback):
    """Logs train/seconds_per_epoch: the time spent on training batches, without validation."""

    def __init__(self):
        self.seconds = 0.0  # in this epoch so far, by an earlier process too

    def on_train_start(self, trainer: Trainer, module: RNODE) -> None:
        self.mark = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, module: RNODE) -> None:
        self.seconds = 0.0
        self.mark = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *_) -> None:
        now = time.perf_counter()
        self.seconds += now - self.mark
        self.mark = now

    def on_train_epoch_end(self, trainer: Trainer, module: RNODE) -> None:
        module.log("train/seconds_per_epoch", self.seconds, sync_dist=True)

    def state_dict(self) -> dict:
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict) -> None:
        require(is_number(state["seconds"], at_least=0), "seconds", state["seconds"], "a number, 0 or more")
        self.seconds = state["seconds"]


class Pictures(Callback):
    """samples.png, the flow's samples next to held-out data, and curves.png of what metrics.csv holds.

    Drawn every `every_n_epochs` epochs and once more after the test, then with the weights that were tested.
    """

    def __init__(self, folder: str | Path, samples: int = 64, every_n_epochs: int = 5):
        require(is_int(samples, at_least=1), "pictures.samples", samples, "a whole number, 1 or more")
        require(is_int(every_n_epochs, at_least=1), "pictures.every_n_epochs", every_n_epochs, "a whole number, 1 or more")
        self.folder, self.samples, self.every_n_epochs = Path(folder), samples, every_n_epochs

    def on_validation_end(self, trainer: Trainer, module: RNODE) -> None:
        if not trainer.sanity_checking and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.draw(trainer, module)

    def on_test_end(self, trainer: Trainer, module: RNODE) -> None:
        self.draw(trainer, module)

    @rank_zero_only
    def draw(self, trainer: Trainer, module: RNODE) -> None:
        data: DataModule = trainer.datamodule
        held_out = data.splits.val[: self.samples].to(module.device)
        with torch.random.fork_rng(devices=[module.device] if module.device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(module.seed)  # the same noise every time, and none of it taken from the training's
            index = torch.arange(len(held_out))
            real = data.inverse(data.transform(held_out, index).y)
            drawn = data.inverse(module.flow.sample(len(held_out)))
        path = self.folder / "samples.png"
        draw_samples(real.float().cpu(), drawn.float().cpu(), path)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples", [str(path)])
            elif isinstance(logger, MetricsFile):
                draw_curves(logger.path, self.folder / "curves.png")
        gc.collect()  # figures refer to themselves: they would pile up until Python looks for such things
