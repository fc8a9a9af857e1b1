"""Batches of a data set for Lightning, transformed on the device."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from pytorch_lightning import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from rnode.data.splits import Splits
from rnode.errors import InputError, require
from rnode.seeding import step_seed
from rnode.transforms import Batch, Transform

SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}
Rows = tuple[Tensor, Tensor]  # data (B, *shape) and the index of each sample in its split (B,)


def fetch(rows: Tensor | Dataset, indices: list[int]) -> Rows:
    """Fetch a whole batch at a time."""
    if not isinstance(rows, Tensor):
        samples, index = rows.__getitems__(indices)
        require_finite(samples, "a batch of training data")
        return samples, index
    index = torch.tensor(indices)
    return rows[index], index


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
        shape: Sequence[int],  # of one sample
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
        self.shape, self.flip, self.seed = tuple(shape), flip, seed
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.transform = Transform(levels, alpha)
        self.splits: Splits | None = None

    def prepare_data(self) -> None:
        self.setup()  # one process on each node downloads what the others then find

    def setup(self, stage: str | None = None) -> None:
        if self.splits is not None:
            return
        splits, dequantize = self.source(**self.arguments), self.transform.dequantize
        for name in SPLIT_NAMES:
            rows = getattr(splits, name)
            require(len(rows) > 0, f"the {name} split is empty")
            if not isinstance(rows, Tensor):
                continue
            require_finite(rows, f"the {SPLIT_NAMES[name]} data")
            shape, found = list(self.shape), f"the {name} split has"
            wrong = f"shape={shape}: {found} samples of shape {list(rows.shape[1:])}"
            require(list(rows.shape[1:]) == shape, wrong)
            if dequantize is not None:
                wrong = f"levels={dequantize.levels}: {found} the grey level {rows.max()}"
                require(int(rows.max()) < dequantize.levels, f"{wrong}; levels must exceed it")
        self.splits = splits

    def train_dataloader(self) -> DataLoader:
        indices, collate = range(len(self.splits.train)), partial(fetch, self.splits.train)
        order = EpochOrder(indices, self.batch_size, self.trainer, self.seed)
        return DataLoader(indices, self.batch_size, sampler=order, collate_fn=collate)

    def val_dataloader(self) -> DataLoader:
        return self.eval_dataloader(self.splits.val)

    def test_dataloader(self) -> DataLoader:
        return self.eval_dataloader(self.splits.test)

    def eval_dataloader(self, rows: Tensor, rank: int = 0, processes: int = 1) -> DataLoader:
        """Load every `processes`-th of the rows (N, *shape) from row `rank` on, in their order."""
        indices, collate = range(rank, len(rows), processes), partial(fetch, rows)
        generator = torch.Generator()  # a loader samples a seed: not from training's generator
        return DataLoader(indices, self.eval_batch_size, collate_fn=collate, generator=generator)

    def on_before_batch_transfer(self, batch: Rows, dataloader_idx: int) -> Rows:
        trainer = self.trainer
        if trainer.training:
            step = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            epoch, rank = trainer.current_epoch, trainer.global_rank
            torch.manual_seed(step_seed(self.seed, epoch, step, rank))
        return batch

    def on_after_batch_transfer(self, batch: Rows, dataloader_idx: int) -> Batch:
        x, index = batch
        if not self.trainer.training:
            return self.transform.for_evaluation(x, index, self.seed)
        if self.flip:
            flipped = torch.rand(len(x), device=x.device) < 0.5
            x = torch.where(flipped[:, None, None, None], x.flip(-1), x)
        return self.transform(x, index)
