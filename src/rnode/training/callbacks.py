"""Lightning callbacks: checkpoints, stopping, times, pictures."""

import contextlib
import gc
import signal
import statistics
import time
from collections import deque
from functools import cached_property
from pathlib import Path

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from rnode.errors import Stopped
from rnode.training.checkpoint import load_checkpoint
from rnode.training.loggers import MetricsCSV
from rnode.training.module import RNODE
from rnode.training.plots import plot_corner, plot_curves, plot_pair
from rnode.training.run_folder import whole_file
from rnode.transforms import TableTransform


class SaveAndStop(Callback):
    """Writes a checkpoint to `path` every `every_n_steps` training steps, at the end of an epoch
    and at a signal.

    After SIGINT, SIGTERM or SIGUSR1 it also raises Stopped, before the next training step. A second
    signal of the same kind has its usual effect.

    A checkpoint records which batches of an epoch its weights have used. Lightning's own counters
    also count batches whose gradients were still being accumulated, and an epoch that max_steps cut
    short as a whole one.
    """

    def __init__(self, path: Path, every_n_steps: int):
        self.path, self.every_n_steps = path, every_n_steps
        self.received = self.agreed = 0  # the signal that this process, or any process, received
        self.step = self.saved = 0  # the last training step, and the one of the last checkpoint
        self.epoch = self.used = 0  # that step used the batches of this epoch up to `used`

    def on_train_start(self, trainer: Trainer, module: RNODE) -> None:
        self.step = self.saved = trainer.global_step
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.receive)  # Lightning restores the handlers at the end

    def receive(self, number: int, frame: object) -> None:
        self.received = number
        with contextlib.suppress(RuntimeError):  # the signal came while another line was printed
            line = f"{signal.Signals(number).name}: stopping after this batch"
            rank_zero_only(print)(line, flush=True)
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)

    def on_train_batch_end(self, trainer: Trainer, module: RNODE, *batch: object) -> None:
        if trainer.global_step > self.step:
            self.step, self.epoch = trainer.global_step, trainer.current_epoch
            self.used = batch[-1] + 1

    def on_train_batch_start(self, trainer: Trainer, *_) -> None:
        self.agree(trainer)  # the validation and the logs of the last step are complete here
        if self.agreed:
            self.save(trainer)
        elif self.step % self.every_n_steps == 0 and self.save(trainer):
            trainer.print(f"step {self.step}: {self.path.name} written")
        self.stop(trainer)

    def on_train_epoch_end(self, trainer: Trainer, *_) -> None:
        self.save(trainer)

    def on_train_epoch_start(self, trainer: Trainer, *_) -> None:
        self.agree(trainer)
        self.stop(trainer)

    on_test_start, on_test_batch_end = on_train_start, on_train_epoch_start

    def save(self, trainer: Trainer) -> bool:
        """Write a checkpoint unless there is one of this step; return whether it was written."""
        wanted = trainer.checkpoint_callbacks and not trainer.fast_dev_run
        new = bool(wanted) and self.step > self.saved
        if new:
            self.saved = self.step
            trainer.save_checkpoint(self.path, weights_only=False)
        return new

    def on_save_checkpoint(self, trainer: Trainer, module: RNODE, checkpoint: dict) -> None:
        epoch = trainer.current_epoch
        used = self.used if self.epoch == epoch else 0
        if used < trainer.num_training_batches:
            count_batches(checkpoint["loops"]["fit_loop"], epoch, used, self.step)

    def agree(self, trainer: Trainer) -> None:
        """Stop all processes at the same step if any of them received a signal."""
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
        """A group of processes on the CPU, so that no process waits for its accelerator."""
        return torch.distributed.new_group(backend="gloo")


def count_batches(loops: dict, epoch: int, used: int, step: int) -> None:
    """Set the counters of Lightning's loops to the state after batch `used` of `epoch`."""
    total = loops["epoch_progress"]["total"]
    total |= {"ready": epoch + 1, "started": epoch + 1, "processed": epoch, "completed": epoch}
    loops["epoch_progress"]["current"] = dict(total)
    progress = loops["epoch_loop.batch_progress"]
    before = progress["total"]["ready"] - progress["current"]["ready"]  # in earlier epochs
    for name, count in (("total", before + used), ("current", used)):
        # Lightning writes checkpoints before it counts a batch as completed.
        progress[name] = {"ready": count, "started": count, "processed": count}
        progress[name]["completed"] = count - 1
    progress["is_last_batch"] = False
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1


class BestCheckpoint(ModelCheckpoint):
    """Keeps best.ckpt in the folder of this run, whatever folder a resumed checkpoint names."""

    def __init__(self, folder: Path):
        options = {"monitor": "val/bits_per_dim", "enable_version_counter": False}
        # After the validation, before last.ckpt: a run that resumes from there has its best.
        super().__init__(folder, filename="best", save_on_train_epoch_end=False, **options)

    def load_state_dict(self, state_dict: dict) -> None:
        path = str(Path(self.dirpath) / "best.ckpt")
        if Path(path).exists():
            score = load_checkpoint(path)["callbacks"][self.state_key]["current_score"]
            self.best_model_path = self.kth_best_model_path = path
            self.best_model_score = self.kth_value = score
            self.best_k_models = {path: score}


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

    def on_validation_epoch_end(self, trainer: Trainer, module: RNODE) -> None:
        self.validation += time.perf_counter() - self.mark
        for name, value in {"seconds": self.validation, **self.totals()}.items():
            module.log(f"val/{name}", float(value), sync_dist=True)

    def on_validation_end(self, *_) -> None:
        self.mark = time.perf_counter()  # in the middle of an epoch, training goes on

    def on_train_epoch_end(self, trainer: Trainer, module: RNODE) -> None:
        module.log("train/seconds_per_epoch", self.seconds, sync_dist=True)

    def state_dict(self) -> dict:
        names = ("seconds", "seconds_total", "nfe_total", "validation")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


class Pictures(Callback):
    """Saves samples beside held-out data, and curves.png, the curves of metrics.csv.

    It does so every `every_n_epochs` epochs, and at the end for the tested weights. The folder
    samples has a picture for each of these times, and samples.png is the last one.
    """

    def __init__(self, folder: Path, data: str, samples: int = 64, every_n_epochs: int = 5):
        self.folder, self.data = folder, data  # the name of the data set
        self.samples, self.every_n_epochs = samples, every_n_epochs

    def on_validation_end(self, trainer: Trainer, module: RNODE) -> None:
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if due and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.on_test_end(trainer, module)

    @rank_zero_only
    @torch.no_grad()
    def on_test_end(self, trainer: Trainer, module: RNODE) -> None:
        data = trainer.datamodule
        transform, index = data.transform, torch.arange(min(self.samples, len(data.splits.val)))
        devices = [module.device] if module.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # training's random stream stays as it is
            torch.manual_seed(module.seed)  # the same noise every time
            x, index, c = data.fetch_from("val")(index.tolist())
            real = transform.inverse(transform(x, index, c).y)
            sampled = transform.inverse(module.flow.sample(len(index), c.to(module.device)))
        name = "tested" if trainer.testing else f"{trainer.global_step:07d}"
        path = self.folder / "samples" / f"{name}.png"
        stage, steps = ("test", "") if trainer.testing else ("val", f"step {trainer.global_step}, ")
        bits = float(trainer.callback_metrics[f"{stage}/bits_per_dim"])
        title = f"samples ({steps}{stage} {bits:.3f} bits/dim)"
        panels = {f"{self.data} (held out)": real.float().cpu(), title: sampled.float().cpu()}
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
                plot_curves(logger.path, self.folder / "curves.png", self.data)
        gc.collect()  # figures refer to themselves and would pile up
