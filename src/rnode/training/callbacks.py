"""Lightning callbacks: cost, validation intervals, a stop far behind, figures of samples."""

import gc
import math
import time
from pathlib import Path

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from rnode.training.checkpoint import load_checkpoint
from rnode.training.module import RNODE
from rnode.training.plots import plot_corner, plot_grids, save_figure
from rnode.training.schedule import passed
from rnode.transforms import ImageTransform

IMAGES, POINTS = 64, 2000  # samples in a figure


class Cost(Callback):
    """Logs seconds_total and nfe_total: what all training steps so far have cost, from step 0 on.

    Validation does not count. Both stand beside validation metrics too, to plot them against.
    """

    def __init__(self):
        self.seconds = 0.0
        self.nfe = 0

    def on_train_epoch_start(self, *_) -> None:
        self.mark = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: RNODE, *_) -> None:
        now = time.perf_counter()
        self.seconds += now - self.mark
        self.mark = now
        self.nfe += module.nfe
        module.log_step({"seconds_total": self.seconds, "nfe_total": self.nfe})

    def on_validation_epoch_end(self, *_) -> None:
        self.log("val/seconds_total", self.seconds, sync_dist=True)
        self.log("val/nfe_total", float(self.nfe), sync_dist=True)

    on_train_start = on_validation_end = on_train_epoch_start

    def state_dict(self) -> dict:
        return {"seconds": self.seconds, "nfe": self.nfe}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


class ValidationInterval(Callback):
    """Validates after an epoch only if `every_n_steps` have passed, and at the end of a run.

    On small data a validation would cost as much as an epoch. Other intervals of Lightning stay.
    """

    def __init__(self, every_n_steps: int):
        self.every_n_steps = every_n_steps

    def on_train_start(self, trainer: Trainer, module: RNODE) -> None:
        self.steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        default = trainer.val_check_interval == trainer.check_val_every_n_epoch == 1
        self.epochs = math.ceil(self.every_n_steps / self.steps) if default else 1

    def on_train_batch_start(self, trainer: Trainer, module: RNODE, *_) -> None:
        if self.epochs > 1:
            last = trainer.current_epoch + 1 == trainer.max_epochs
            last |= 0 < trainer.max_steps - trainer.global_step <= self.steps
            trainer.check_val_every_n_epoch = 1 if last else self.epochs

    def on_train_batch_end(self, trainer: Trainer, module: RNODE, *_) -> None:
        if self.epochs > 1 and trainer.global_step == trainer.max_steps:
            trainer.should_stop = True  # Lightning then validates before the end of the epoch


class StopBehindClosedForm(Callback):
    """Ends training at three quarters of a run if the flow is far behind the closed form.

    It is far behind if it would not catch up by gaining half of what it has gained since the middle
    of the run. The rest of the time is left to fits of mixtures.

    Args:
        path: the checkpoint of the density in closed form; without it, training goes on.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        self.stopped = False
        self.validations: list[tuple[int, float]] = []  # steps, and bits/dim

    def on_train_start(self, trainer: Trainer, module: RNODE) -> None:
        self.closed = math.inf
        if self.path.exists():
            self.closed = float(load_checkpoint(self.path)["validation_bits"].mean())

    def on_validation_end(self, trainer: Trainer, module: RNODE) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        step = trainer.global_step
        share = passed(trainer)
        self.validations.append((step, float(trainer.callback_metrics["val/bits_per_dim"])))
        if share >= 3 / 4:
            half = step / (2 * share)  # the step at half of the run
            lowest = min(bits for _, bits in self.validations)
            at_half = min((bits for n, bits in self.validations if n < half), default=math.inf)
            if lowest - self.closed > (at_half - lowest) / 2:
                self.stopped = trainer.should_stop = True

    def state_dict(self) -> dict:
        return {"validations": self.validations}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


class Figures(Callback):
    """Saves samples.png, samples beside held-out data: every `every_n_epochs`, and at the test.

    In training it waits for a validation.
    """

    def __init__(self, folder: str, every_n_epochs: int):
        self.path = Path(folder) / "samples.png"
        self.every_n_epochs = every_n_epochs

    def on_train_start(self, trainer: Trainer, module: RNODE) -> None:
        self.drawn = trainer.current_epoch // self.every_n_epochs

    def on_validation_end(self, trainer: Trainer, module: RNODE) -> None:
        due = (trainer.current_epoch + 1) // self.every_n_epochs
        if trainer.state.fn == "fit" and not trainer.sanity_checking and due > self.drawn:
            self.drawn = due
            self.draw(trainer, module, "val")

    def on_test_end(self, trainer: Trainer, module: RNODE) -> None:
        self.draw(trainer, module, "test")

    @rank_zero_only
    @torch.no_grad()
    def draw(self, trainer: Trainer, module: RNODE, stage: str) -> None:
        """Write and log a figure of validation data and as many samples for the same c."""
        data = trainer.datamodule
        device = module.device
        images = isinstance(data.transform, ImageTransform)
        count = min(IMAGES if images else POINTS, len(data.splits.val))
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(module.seed)  # the same noise every time
            x, index, c = data.fetch("val", range(count))
            held_out = data.transform.inverse(data.transform(x, index, c).y)
            samples = data.transform.inverse(module.flow.sample(count, c.to(device)))
        bits = float(trainer.callback_metrics[f"{stage}/bits_per_dim"])
        nats = math.log(2) * module.flow.d * bits
        measured = f"{bits:.3f} bits/dim" if images else f"{nats:.3f} nats"
        title = f"samples (step {trainer.global_step}, {stage} {measured})"
        panels = {"held-out data": held_out.float().cpu(), title: samples.float().cpu()}
        figure = plot_grids(panels) if images else plot_corner(panels, data.transform.names)
        save_figure(figure, self.path)
        for logger in (each for each in trainer.loggers if isinstance(each, WandbLogger)):
            logger.log_image("samples", [str(self.path)])
        gc.collect()  # figures refer to themselves and would pile up
