"""Batches of a data set for Lightning, transformed on the device."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from pytorch_lightning import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from rnode.data.conditions import Conditions
from rnode.data.splits import SPLIT_NAMES, Splits
from rnode.errors import InputError, require
from rnode.seeding import NOISE, step_generator
from rnode.transforms import Batch, ImageTransform, TableTransform, Transform

# x (B, *shape), the index of each sample in its split (B,), and what it is conditioned on, c (B, k)
Rows = tuple[Tensor, Tensor, Tensor]


def require_finite(rows: Tensor, where: str) -> None:
    """Raise InputError with the first row and column that is NaN or infinite."""
    if rows.is_floating_point() and not rows.isfinite().all():
        row, column = (~rows.isfinite()).nonzero()[0, :2].tolist()
        value = rows[row, column]
        raise InputError(f"row {row} of {where} is not finite: column {column} is {value}")


def default_batch_size(n: int, most: int) -> int:
    """Return an eighth of the `n` samples of an epoch, but 16 to `most`."""
    return min(most, max(16, n // 8))


class EpochOrder(DistributedSampler):
    """Shuffles by (seed, epoch); leaves out the batches that a resumed epoch has used."""

    def __init__(self, data: Sequence, batch_size: int, trainer: Trainer, seed: int):
        super().__init__(data, trainer.world_size, trainer.global_rank, seed=seed)
        self.batch_size = batch_size
        self.progress = trainer.fit_loop.epoch_loop.batch_progress

    def __iter__(self) -> Iterator[int]:
        used = self.progress.current.processed * self.batch_size
        return itertools.islice(super().__iter__(), used, None)


class DataModule(LightningDataModule):
    """Loads batches and transforms them on the device; a training batch gets fresh noise.

    `setup` reads the data and sets `splits`, `transform`, `conditions` and `shape`, the shape of a
    sample; all but `splits` are also in a checkpoint.
    """

    transform: Transform
    conditions: Conditions
    shape: torch.Size

    def __init__(
        self,
        source: Callable[..., Splits],  # called with **arguments
        batch_size: int | None,  # of a training batch, in each process; None: `default_batch_size`
        eval_batch_size: int,
        flip: bool = False,  # whether training mirrors each image with probability 1/2
        seed: int = 0,  # of the order, the flips and the noise
        **arguments,
    ):
        super().__init__()
        self.source = source
        self.arguments = arguments
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.flip = flip
        self.seed = seed
        self.splits: Splits | None = None

    def setup(self, stage: str | None = None) -> None:
        if self.splits is not None:
            return
        checkpoint = self.names() if hasattr(self, "shape") else None
        splits = self.source(**self.arguments)
        self.shape = splits.val.shape[1:]
        for name, word in SPLIT_NAMES.items():
            x = getattr(splits, name)
            require(len(x) > 0, f"the {name} split is empty")
            if isinstance(x, Tensor):
                require_finite(x, f"the {word} data")
        self.splits = splits
        self.transform = splits.transform
        if self.batch_size is None:
            table = isinstance(self.transform, TableTransform)
            self.batch_size = default_batch_size(len(splits.train), 512 if table else 64)
        self.conditions = splits.conditions
        message = f"the data have {self.names()}, but those of the checkpoint {checkpoint}"
        require(checkpoint in (None, self.names()), message)

    def names(self) -> dict[str, list]:
        """What the data of a checkpoint must have in common with those that are read."""
        transform: Any = self.transform.state()
        if isinstance(self.transform, TableTransform):  # statistics may differ by rounding
            transform = [column._replace(mean=0.0, std=1.0) for column in self.transform.columns]
        context = list(self.conditions.columns)
        return {"shape": list(self.shape), "transform": transform, "context": context}

    def state_dict(self) -> dict:
        """What a trained flow needs of its data."""
        transform, conditions = self.transform.state(), self.conditions.state()
        return {"shape": list(self.shape), "transform": transform, "conditions": conditions}

    def load_state_dict(self, state: dict) -> None:
        kind = TableTransform if "columns" in state["transform"] else ImageTransform
        self.transform = kind.from_state(state["transform"])
        self.conditions = Conditions.from_state(state["conditions"])
        self.shape = torch.Size(state["shape"])

    def fetch(self, split: str, index: Tensor | Sequence[int]) -> Rows:
        """Return the samples of a split with the indices (B,)."""
        index = torch.as_tensor(index)
        return getattr(self.splits, split)[index].contiguous(), index, self.splits.c[split][index]

    def train_dataloader(self) -> DataLoader:
        indices = range(len(self.splits.train))
        order = EpochOrder(indices, self.batch_size, self.trainer, self.seed)
        collate = partial(self.fetch, "train")
        return DataLoader(indices, self.batch_size, sampler=order, collate_fn=collate)

    def val_dataloader(self) -> DataLoader:
        return self.eval_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        return self.eval_dataloader("test")

    def eval_dataloader(self, split: str) -> DataLoader:
        """Load a split in its order."""
        indices = range(len(getattr(self.splits, split)))
        collate = partial(self.fetch, split)
        generator = torch.Generator()  # a loader samples a seed: not from training's generator
        return DataLoader(indices, self.eval_batch_size, collate_fn=collate, generator=generator)

    def on_before_batch_transfer(self, batch: Rows, dataloader_idx: int) -> Rows | Batch:
        # Tables are float64, which some devices lack.
        return self.transformed(batch) if isinstance(self.transform, TableTransform) else batch

    def on_after_batch_transfer(self, batch: Rows | Batch, dataloader_idx: int) -> Batch:
        return batch if isinstance(batch, Batch) else self.transformed(batch)

    def transformed(self, rows: Rows) -> Batch:
        """Transform rows: with fresh noise in training, else with the noise of each sample."""
        trainer = self.trainer
        if not trainer.training:
            return self.transform.for_evaluation(*rows, self.seed)
        x, index, c = rows
        step = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        place = (trainer.current_epoch, step, trainer.global_rank)
        generator = step_generator(x.device, self.seed, *place, NOISE)
        if self.flip:
            flipped = torch.rand(len(x), generator=generator, device=x.device) < 0.5
            x = torch.where(flipped[:, None, None, None], x.flip(-1), x)
        return self.transform(x, index, c, generator=generator)
