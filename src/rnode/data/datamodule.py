"""Batches of a data set for Lightning, transformed on the device."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from rnode.data.splits import Splits
from rnode.errors import InputError, require
from rnode.seeding import step_seed
from rnode.transforms import Batch, Transform

Rows = tuple[Tensor, Tensor]  # data (B, *shape) and the index of each sample in its split (B,)


def fetch(rows: Tensor | Dataset, indices: list[int]) -> Rows:
    """Fetch a whole batch at a time."""
    if not isinstance(rows, Tensor):
        return rows.__getitems__(indices)
    index = torch.tensor(indices)
    return rows[index], index


class EpochOrder(DistributedSampler):
    """Shuffles by (seed, epoch); the first epoch leaves out the first `skip` of a process."""

    def __init__(self, data: Sequence, replicas: int, rank: int, seed: int, skip: int):
        super().__init__(data, num_replicas=replicas, rank=rank, seed=seed)
        self.skip = skip

    def __iter__(self) -> Iterator[int]:
        skip, self.skip = self.skip, 0
        return itertools.islice(super().__iter__(), skip, None)


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
        for name, rows in splits._asdict().items():
            require(len(rows) > 0, f"the {name} split is empty")
            if not isinstance(rows, Tensor):
                continue
            shape, found = list(self.shape), f"the {name} split has"
            wrong = f"shape={shape}: {found} samples of shape {list(rows.shape[1:])}"
            require(list(rows.shape[1:]) == shape, wrong)
            if dequantize is not None:
                wrong = f"levels={dequantize.levels}: {found} the grey level {rows.max()}"
                require(int(rows.max()) < dequantize.levels, f"{wrong}; levels must exceed it")
        self.splits = splits

    def train_dataloader(self) -> DataLoader:
        rows, trainer = self.splits.train, self.trainer
        indices = range(len(rows))
        progress = trainer.fit_loop.epoch_loop.batch_progress  # a resumed run's is not at zero
        skip = 0 if progress.is_last_batch else progress.current.processed * self.batch_size
        order = EpochOrder(indices, trainer.world_size, trainer.global_rank, self.seed, skip)
        collate = partial(fetch, rows)
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
