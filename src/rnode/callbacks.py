"""What Lightning calls while a flow trains: progress, compilation, the time an epoch takes, pictures."""

import sys
import time
from pathlib import Path

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from rnode.data import DataModule
from rnode.errors import is_int, require
from rnode.flow import Flow
from rnode.module import RNODE
from rnode.pictures import draw_curves, draw_samples


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


class EpochTimer(Callback):
    """Logs train/seconds_per_epoch: the time spent on training batches, without validation."""

    def on_train_epoch_start(self, trainer: Trainer, module: RNODE) -> None:
        self.start = self.end = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *_) -> None:
        self.end = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, module: RNODE) -> None:
        module.log("train/seconds_per_epoch", self.end - self.start)


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
            elif isinstance(logger, CSVLogger):
                logger.save()
                draw_curves(Path(logger.experiment.metrics_file_path), self.folder / "curves.png")
