"""Lightning callbacks: what training has cost, and figures of samples and curves."""

import gc
import statistics
import time
from collections import deque
from pathlib import Path

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from rnode.training.loggers import MetricsCSV
from rnode.training.module import RNODE
from rnode.training.plots import plot_corner, plot_curves, plot_pair
from rnode.training.run_folder import whole_file
from rnode.transforms import TableTransform

IMAGES, POINTS = 64, 2000  # samples in a figure


class Cost(Callback):
    """Logs what training batches have cost, and validation apart.

    These are train/seconds_per_step, the mean of the last log_every_n_steps steps,
    train/seconds_per_epoch, and so far, including earlier processes of the run, seconds_total,
    nfe_total and val/seconds. The totals stand beside both training and validation metrics, so that
    W&B can plot either against them.
    """

    def __init__(self):
        self.seconds = 0.0  # in this epoch so far
        self.seconds_total, self.nfe_total, self.validation = 0.0, 0, 0.0

    def on_train_start(self, trainer: Trainer, module: RNODE) -> None:
        self.mark = time.perf_counter()
        # A device is behind its host, which waits for it in log steps alone.
        self.steps: deque[float] = deque(maxlen=max(1, trainer.log_every_n_steps))

    def on_train_epoch_start(self, *_) -> None:
        self.seconds, self.mark = 0.0, time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: RNODE, *_) -> None:
        before, self.mark = self.mark, time.perf_counter()
        step = self.mark - before
        self.steps.append(step)
        self.seconds += step
        self.seconds_total += step
        self.nfe_total += module.nfe
        module.log_step({"seconds_per_step": statistics.mean(self.steps), **self.totals()})

    def totals(self) -> dict[str, float]:
        return {"seconds_total": self.seconds_total, "nfe_total": self.nfe_total}

    def on_validation_start(self, *_) -> None:
        self.mark = time.perf_counter()

    def on_validation_epoch_end(self, *_) -> None:
        self.validation += time.perf_counter() - self.mark
        for name, value in {"seconds": self.validation, **self.totals()}.items():
            self.log(f"val/{name}", float(value), sync_dist=True)

    def on_validation_end(self, *_) -> None:
        self.mark = time.perf_counter()  # in the middle of an epoch, training goes on

    def on_train_epoch_end(self, *_) -> None:
        self.log("train/seconds_per_epoch", self.seconds, sync_dist=True)

    def state_dict(self) -> dict:
        names = ("seconds", "seconds_total", "nfe_total", "validation")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


class Figures(Callback):
    """Saves samples beside held-out data, and curves.png, the curves of metrics.csv.

    It does so every `every_n_epochs` epochs, and at the end for the tested weights. The folder
    samples has a figure for each of these times, and samples.png is the last one.
    """

    def __init__(self, folder: str, every_n_epochs: int):
        self.folder, self.every_n_epochs = Path(folder), every_n_epochs

    def on_validation_end(self, trainer: Trainer, module: RNODE) -> None:
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if due and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.draw(trainer, module, "val", f"{trainer.global_step:07d}")

    def on_test_end(self, trainer: Trainer, module: RNODE) -> None:
        self.draw(trainer, module, "test", "tested")

    @rank_zero_only
    def draw(self, trainer: Trainer, module: RNODE, stage: str, name: str) -> None:
        path, transform = self.folder / "samples" / f"{name}.png", trainer.datamodule.transform
        data, samples = held_out_and_samples(trainer, module)
        bits = float(trainer.callback_metrics[f"{stage}/bits_per_dim"])
        title = f"samples (step {trainer.global_step}, {stage} {bits:.3f} bits/dim)"
        panels = {"held-out data": data, title: samples}
        if isinstance(transform, TableTransform):
            plot_corner(path, panels, [column.name for column in transform.columns])
        else:
            plot_pair(path, panels)
        with whole_file(self.folder / "samples.png") as file:
            file.write(path.read_bytes())
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples", [str(path)])
            elif isinstance(logger, MetricsCSV):
                plot_curves(logger.path, self.folder / "curves.png", self.folder.name)
        gc.collect()  # figures refer to themselves and would pile up


@torch.no_grad()
def held_out_and_samples(trainer: Trainer, module: RNODE) -> tuple[torch.Tensor, torch.Tensor]:
    """Return validation data and as many samples for the same c, both (N, *shape) on the CPU."""
    data, device = trainer.datamodule, module.device
    most = IMAGES if len(data.shape) == 3 else POINTS
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(module.seed)  # the same noise every time
        x, index, c = data.fetch("val", range(min(most, len(data.splits.val))))
        held_out = data.transform.inverse(data.transform(x, index, c).y)
        samples = data.transform.inverse(module.flow.sample(len(index), c.to(device)))
    return held_out.float().cpu(), samples.float().cpu()
