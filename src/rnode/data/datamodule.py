"""Batches of a data set for Lightning, transformed on the device."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from rnode.data.splits import Splits
from rnode.errors import InputError, require
from rnode.seeding import step_seed
from rnode.transforms import Batch, Transform

Rows = tuple[Tensor, Tensor]  # data (B, *shape) and the index of each sample in its split (B,)


class IndexedRows(Dataset):
    """The rows of a tensor with their indices; a whole batch is fetched at a time."""

    def __init__(self, rows: Tensor):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> Rows:
        index = torch.tensor(indices)
        return self.rows[index], index


class EpochOrder(DistributedSampler):
    """The order of the training samples, shuffled by (seed, epoch) and divided among processes.

    The first epoch leaves out `skip` samples, which the run has used before it was interrupted.
    """

    def __init__(self, data: Dataset, replicas: int, rank: int, seed: int, skip: int):
        super().__init__(data, num_replicas=replicas, rank=rank, seed=seed)
        self.skip = skip

    def __iter__(self) -> Iterator[int]:
        skip, self.skip = self.skip, 0
        return itertools.islice(super().__iter__(), skip, None)


class DataModule(LightningDataModule):
    """Loads batches as the source gives them and transforms them on the device.

    A training batch gets fresh noise; in evaluation the noise belongs to each sample and the seed.

    Args:
        source: returns the splits.
        shape: shape of one sample.
        batch_size: samples of a training batch, in each process.
        eval_batch_size: samples of a validation or test batch.
        levels: number of grey levels of images; None for vectors.
        alpha: α of the logit transform of images; None for vectors.
        flip: whether training mirrors images left to right, each with probability 1/2.
        seed: seed of the order, the flips and the noise.
        **arguments: arguments of `source`.

    Raises:
        InputError: if `source` does not take `arguments`.
    """

    def __init__(
        self,
        source: Callable[..., Splits],
        shape: Sequence[int],
        batch_size: int,
        eval_batch_size: int,
        levels: int | None = None,
        alpha: float | None = None,
        flip: bool = False,
        seed: int = 0,
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
        """Download once on each node, before the other processes look for the files."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Load the splits and check that they fit `shape` and `levels`."""
        if self.splits is not None:
            return
        splits, dequantize = self.source(**self.arguments), self.transform.dequantize
        for name, rows in splits._asdict().items():
            require(len(rows) > 0, f"the {name} split is empty")
            if not isinstance(rows, Tensor):
                continue
            fits = rows.shape[1:] == self.shape
            found = f"the {name} split has samples of shape {list(rows.shape[1:])}"
            require(fits, f"shape={list(self.shape)}: {found}")
            if dequantize is not None:
                levels, largest = dequantize.levels, int(rows.max())
                found = f"the {name} split has the grey level {largest}"
                require(largest < levels, f"levels={levels}: {found}; levels must exceed it")
        self.splits = splits

    def train_dataloader(self) -> DataLoader:
        rows, trainer = self.splits.train, self.trainer
        data = IndexedRows(rows) if isinstance(rows, Tensor) else rows
        progress = trainer.fit_loop.epoch_loop.batch_progress  # a resumed run's is not at zero
        skip = 0 if progress.is_last_batch else progress.current.processed * self.batch_size
        order = EpochOrder(data, trainer.world_size, trainer.global_rank, self.seed, skip)
        return DataLoader(data, self.batch_size, sampler=order, collate_fn=as_fetched)

    def val_dataloader(self) -> DataLoader:
        return self.eval_dataloader(self.splits.val)

    def test_dataloader(self) -> DataLoader:
        return self.eval_dataloader(self.splits.test)

    def eval_dataloader(self, rows: Tensor, rank: int = 0, processes: int = 1) -> DataLoader:
        """Load every `processes`-th of the rows (N, *shape) from row `rank` on, in their order."""
        data = IndexedRows(rows)
        if processes > 1:
            data = Subset(data, range(rank, len(rows), processes))
        # A loader samples a number when it starts: from its own generator, not from training's.
        generator = torch.Generator()
        return DataLoader(data, self.eval_batch_size, collate_fn=as_fetched, generator=generator)

    def on_before_batch_transfer(self, batch: Rows, dataloader_idx: int) -> Rows:
        """Seed everything that this process samples in a training step."""
        trainer = self.trainer
        if trainer.training:
            step = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            epoch, rank = trainer.current_epoch, trainer.global_rank
            torch.manual_seed(step_seed(self.seed, epoch, step, rank))
        return batch

    def on_after_batch_transfer(self, batch: Rows, dataloader_idx: int) -> Batch:
        """Transform a batch on the device, with flips and fresh noise in training."""
        x, index = batch
        if not self.trainer.training:
            return self.transform.for_evaluation(x, index, self.seed)
        if self.flip:
            flipped = torch.rand(len(x), device=x.device) < 0.5
            x = torch.where(flipped[:, None, None, None], x.flip(-1), x)
        return self.transform(x, index)


def as_fetched(rows: Rows) -> Rows:
    """Collate nothing: the data set gave a whole batch."""
    return rows
