"""Batches of a data set for Lightning, transformed on the device."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from pytorch_lightning import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from rnode.data.context import Context
from rnode.data.splits import Splits
from rnode.errors import InputError, require
from rnode.seeding import NOISE, step_generator
from rnode.transforms import Batch, ImageTransform, TableTransform, Transform

SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}
# data (B, *shape), the index of each sample in its split (B,), and what it is conditioned on (B, k)
Rows = tuple[Tensor, Tensor, Tensor]


def fetch(rows: Tensor | Dataset, contexts: Tensor | None, indices: list[int]) -> Rows:
    """Fetch a whole batch at a time."""
    if not isinstance(rows, Tensor):
        samples, index = rows.__getitems__(indices)
        require_finite(samples, "a batch of training data")
        return samples, index, samples.new_empty(len(samples), 0)
    index = torch.tensor(indices)
    c = torch.empty(len(index), 0) if contexts is None else contexts[index]
    return rows[index], index, c


def require_finite(rows: Tensor, where: str) -> None:
    """Raise InputError with the first row and column that is NaN or infinite."""
    if rows.is_floating_point() and not rows.isfinite().all():
        row, *column = (~rows.isfinite()).nonzero()[0].tolist()
        place = f"column {', '.join(map(str, column))} is {float(rows[(row, *column)])}"
        raise InputError(f"row {row} of {where} is not finite: {place}")


class EpochOrder(DistributedSampler):
    """Shuffles by (seed, epoch); leaves out the batches that a resumed epoch has used."""

    def __init__(self, data: Sequence, batch_size: int, trainer: Trainer, seed: int):
        ranks = {"num_replicas": trainer.world_size, "rank": trainer.global_rank}
        super().__init__(data, **ranks, seed=seed)
        self.batch_size, self.progress = batch_size, trainer.fit_loop.epoch_loop.batch_progress

    def __iter__(self) -> Iterator[int]:
        used = self.progress.current.processed * self.batch_size
        return itertools.islice(super().__iter__(), used, None)


class DataModule(LightningDataModule):
    """Loads batches and transforms them on the device; a training batch gets fresh noise."""

    def __init__(
        self,
        source: Callable[..., Splits],  # called with **arguments
        shape: Sequence[int] | None,  # of one sample; None: as the data are
        batch_size: int,  # of a training batch, in each process
        eval_batch_size: int,
        levels: int | None = None,  # grey levels of images; None for vectors
        alpha: float | None = None,  # α of the logit transform of images; None for vectors
        flip: bool = False,  # whether training mirrors each image with probability 1/2
        seed: int = 0,  # of the order, the flips and the noise
        **arguments,
    ):
        super().__init__()
        try:
            inspect.signature(source).bind(**arguments)
        except TypeError as error:
            raise InputError(f"arguments of the data source: {error}") from None
        self.source, self.arguments = source, arguments
        self.shape, self.flip, self.seed = shape and tuple(shape), flip, seed
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.transform: Transform = ImageTransform(levels, alpha) if levels else None
        self.context: Context | None = None  # how what samples are conditioned on becomes numbers
        self.splits: Splits | None = None
        self.expected: dict = {}  # the state of a checkpoint

    def prepare_data(self) -> None:
        self.setup()  # one process on each node downloads what the others then find

    def setup(self, stage: str | None = None) -> None:
        if self.splits is not None:
            return
        splits = self.source(**self.arguments)
        self.shape = self.shape or tuple(splits.val.shape[1:])
        self.transform, self.context = splits.transform or self.transform, splits.context
        for name in SPLIT_NAMES:
            rows = getattr(splits, name)
            require(len(rows) > 0, f"the {name} split is empty")
            if not isinstance(rows, Tensor):
                continue
            require_finite(rows, f"the {SPLIT_NAMES[name]} data")
            shape, found = list(self.shape), f"the {name} split has"
            wrong = f"shape={shape}: {found} samples of shape {list(rows.shape[1:])}"
            require(list(rows.shape[1:]) == shape, wrong)
            levels = getattr(self.transform, "levels", None)
            if levels is not None and levels <= torch.iinfo(rows.dtype).max:
                wrong = f"levels={levels}: {found} the grey level {rows.max()}"
                require(int(rows.max()) < levels, f"{wrong}; levels must exceed it")
        self.splits = splits
        found = self.state_dict()
        for key in self.expected.keys() - {"whitening"}:  # statistics may differ in the last digits
            there, here = list(self.expected[key]), list(found.get(key, ()))
            require(there == here, f"the {key} of the data: {here}, but {there} in the checkpoint")

    def state_dict(self) -> dict:
        """What a trained flow needs of its data where the configuration does not say it."""
        state: dict[str, Any] = {"shape": list(self.shape)}
        if isinstance(self.transform, TableTransform):
            state |= self.transform.state()
        return state | ({"context": self.context.state()} if self.context else {})

    def load_state_dict(self, state: dict) -> None:
        self.expected, self.shape = state, tuple(state["shape"])
        if "columns" in state:
            self.transform = TableTransform.from_state(state)
        if "context" in state:
            self.context = Context.from_state(state["context"])

    def fetch_from(self, split: str) -> Callable[[list[int]], Rows]:
        """Return the function that fetches the samples of a split by their indices."""
        contexts = self.splits.contexts
        contexts = None if contexts is None else contexts[list(SPLIT_NAMES).index(split)]
        return partial(fetch, getattr(self.splits, split), contexts)

    def evaluation_batch(self, split: str, index: Tensor, seed: int) -> Batch:
        """Return samples of a split, transformed with the noise that belongs to them and `seed`."""
        return self.transform.for_evaluation(*self.fetch_from(split)(index.tolist()), seed)

    def train_dataloader(self) -> DataLoader:
        indices, collate = range(len(self.splits.train)), self.fetch_from("train")
        order = EpochOrder(indices, self.batch_size, self.trainer, self.seed)
        return DataLoader(indices, self.batch_size, sampler=order, collate_fn=collate)

    def val_dataloader(self) -> DataLoader:
        return self.eval_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        return self.eval_dataloader("test")

    def eval_dataloader(self, split: str, rank: int = 0, processes: int = 1) -> DataLoader:
        """Load every `processes`-th sample of a split from `rank` on, in their order."""
        indices = range(rank, len(getattr(self.splits, split)), processes)
        collate = self.fetch_from(split)
        generator = torch.Generator()  # a loader samples a seed: not from training's generator
        return DataLoader(indices, self.eval_batch_size, collate_fn=collate, generator=generator)

    def on_before_batch_transfer(self, batch: Rows, dataloader_idx: int) -> Rows | Batch:
        # Tables are float64, which some devices lack.
        return self.transformed(batch) if isinstance(self.transform, TableTransform) else batch

    def on_after_batch_transfer(self, batch: Rows | Batch, dataloader_idx: int) -> Batch:
        return batch if isinstance(batch, Batch) else self.transformed(batch)

    def transformed(self, rows: Rows) -> Batch:
        """Transform rows: with fresh noise in training, else with the noise of each sample."""
        x, index, c = rows
        trainer = self.trainer
        if not trainer.training:
            return self.transform.for_evaluation(x, index, c, self.seed)
        step = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        place = (self.seed, trainer.current_epoch, step, trainer.global_rank)
        generator = step_generator(x.device, *place, NOISE)
        if self.flip:
            flipped = torch.rand(len(x), generator=generator, device=x.device) < 0.5
            x = torch.where(flipped[:, None, None, None], x.flip(-1), x)
        return self.transform(x, index, c, generator=generator)
