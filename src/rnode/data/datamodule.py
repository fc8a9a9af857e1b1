"""Batches of a data set for Lightning, transformed on the device."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from pytorch_lightning import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from rnode.data.conditions import Conditions
from rnode.data.splits import Splits
from rnode.errors import require
from rnode.seeding import NOISE, step_generator
from rnode.transforms import Batch, ImageTransform, Rows, TableTransform, Transform


def settings(shape: torch.Size, transform: Transform, context: list[str]) -> dict[str, Any]:
    """What data must have in common with those of a checkpoint, beside what was fitted."""
    options: Any = transform.state()
    if isinstance(transform, TableTransform):
        options = {column.name: column.given_bounds for column in transform.columns}
    return {"shape": list(shape), "transform": options, "context": context}


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
        batch_size: int | None,  # of a training batch, in each process; None: an eighth of `train`
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
        self.fingerprint: str | None = None  # a hash of the data
        self.hashes: dict[str, Tensor] | None = None  # of each sample, by split

    def setup(self, stage: str | None = None) -> None:
        if self.splits is not None:
            return
        trained = hasattr(self, "shape")  # a checkpoint has what was fitted
        if trained and isinstance(self.transform, TableTransform) and "columns" in self.arguments:
            # The file may have got other columns since, and other values have another unit.
            self.arguments["columns"] = self.arguments["columns"] or self.transform.names
            self.arguments["integer"] = []
        splits = self.splits = self.source(**self.arguments)
        shape = splits.val.shape[1:]
        context = list(splits.columns[0])
        if trained:
            here = settings(shape, splits.transform, context)
            there = settings(self.shape, self.transform, list(self.conditions.columns))
            require(here == there, f"the data have {here}, but those of the checkpoint {there}")
            splits.encode(self.transform, self.conditions)
        else:
            splits.fit()
        self.shape, self.transform, self.conditions = shape, splits.transform, splits.conditions
        self.identify()
        if self.batch_size is None:
            most = 512 if isinstance(self.transform, TableTransform) else 64
            self.batch_size = min(most, max(16, len(splits.train) // 8))

    def identify(self) -> None:
        """Compare the data with those of the checkpoint, and keep their samples apart as there."""
        hashes = self.splits.hashes()
        if hashes is None:
            return
        parts = [*hashes.values(), *self.splits.c.values(), *(self.splits.weights or ())]
        content = b"".join(part.numpy().tobytes() for part in parts)
        fingerprint = hashlib.blake2b(content).hexdigest()
        if self.fingerprint is None:
            self.fingerprint, self.hashes = fingerprint, hashes
        elif fingerprint != self.fingerprint:
            path = self.arguments.get("path") or self.arguments.get("root") or "the data"
            what = "differs from what the checkpoint was trained on"
            print(f"{path}: {what}; samples that it knows stay in their splits")
            self.splits.restore(self.hashes)
            for name, part in self.splits.hashes().items():
                self.hashes[name] = torch.cat([part, self.hashes[name]]).unique()

    def state_dict(self) -> dict:
        """What a trained flow needs of its data."""
        transform, conditions = self.transform.state(), self.conditions.state()
        state = {"shape": list(self.shape), "transform": transform, "conditions": conditions}
        return state | {"fingerprint": self.fingerprint, "hashes": self.hashes}

    def load_state_dict(self, state: dict) -> None:
        """Take what a checkpoint holds, before `setup` reads the data; afterwards it is there."""
        if self.splits is not None:
            return
        kind = TableTransform if "columns" in state["transform"] else ImageTransform
        self.transform = kind.from_state(state["transform"])
        self.conditions = Conditions.from_state(state["conditions"])
        self.shape = torch.Size(state["shape"])
        self.fingerprint, self.hashes = state.get("fingerprint"), state.get("hashes")

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
