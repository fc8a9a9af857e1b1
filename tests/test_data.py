"""Splits that never change, densities, and the batches of the DataModule."""

import hashlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_sample_images

from data_files import parts_of
from rnode import InputError
from rnode.data.datamodule import DataModule, EpochOrder
from rnode.data.densities import DENSITIES, toy
from rnode.data.images import digits, patches, reduce_images
from rnode.data.splits import Splits, hold_out
from rnode.seeding import NOISE, step_generator
from rnode.transforms import Column, TableTransform

# Fixed values, here and below, hold that the same seed gives the same data in every version.
# These are the last rows of the validation set, of the test set and of a training batch.
POINTS = {
    "eight_gaussians": [[-1.50669, -1.41093], [2.14029, 0.00335], [-1.55761, 1.30469]],
    "moons": [[0.77593, 0.57042], [2.64252, -0.68336], [3.21565, 0.20747]],
    "circles": [[0.7219, 1.82663], [0.15398, -0.90792], [-0.87061, -0.17552]],
    "checkerboard": [[0.11937, 0.54938], [-1.51135, -1.24463], [1.9573, -0.19793]],
    "spirals": [[-1.93289, 0.3347], [-0.71417, -0.2202], [-2.20163, -1.37778]],
    "two_gaussians": [[1.57345], [0.73516], [-1.73197]],
}


def module(source=digits, **options):
    return DataModule(source, **{"batch_size": 32, "eval_batch_size": 100} | options)


def trainer(training, epoch=0, step=0, rank=0, processes=1, done=0):
    """What a DataModule reads of a Lightning Trainer."""
    progress = SimpleNamespace(current=SimpleNamespace(ready=step, processed=done))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    place = {"current_epoch": epoch, "global_rank": rank, "world_size": processes}
    return SimpleNamespace(training=training, fit_loop=loop, **place)


def transfer(data, batch):
    return data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)


def test_digits_are_all_of_scikit_learns_in_splits_that_never_change():
    splits = digits(context="label")
    assert [len(part) for part in parts_of(splits)] == [1257, 180, 360]
    pixels = torch.cat(parts_of(splits)).numpy()
    known = load_digits()
    label_of = dict(zip(map(bytes, known.images.astype(np.uint8)), known.target, strict=True))
    c = torch.cat([splits.c[name] for name in ("train", "val", "test")])
    assert c.shape == (1797, 10)
    assert c.argmax(1).tolist() == [label_of[image.tobytes()] for image in pixels]
    assert hashlib.sha256(pixels.tobytes()).hexdigest().startswith("89fb075c4295214c55350029312c65")
    assert digits().c["val"].shape == (180, 0)


def test_missing_splits_are_cut_off_the_training_samples():
    rows = np.arange(100)
    parts = hold_out({"train": rows}, 0.25, 20)
    assert [len(parts[name]) for name in ("train", "val", "test")] == [60, 20, 20]
    assert sorted(np.concatenate(list(parts.values()))) == rows.tolist()
    again = hold_out({"train": torch.from_numpy(rows)}, 5, 0.2)["test"].tolist()
    assert parts["test"].tolist() == again != rows[:20].tolist()
    parts = hold_out({"train": rows, "test": rows[:7]}, 0.001, 0.5)  # one sample at least
    assert [len(parts[name]) for name in ("train", "val", "test")] == [99, 1, 7]


def test_patches_come_from_disjoint_regions_of_the_photographs():
    photo = torch.tensor(load_sample_images().images[0]).permute(2, 0, 1)
    regions = ((0, 448), (448, 544), (544, 640))
    for part, (left, right) in zip(parts_of(patches(size=32, stride=8)), regions, strict=True):
        columns = (right - left - 32) // 8 + 1
        assert part.shape == (2 * ((427 - 32) // 8 + 1) * columns, 3, 32, 32)
        last = left + 8 * (columns - 1)
        assert torch.equal(part[0], photo[:, :32, left : left + 32])
        assert torch.equal(part[columns - 1], photo[:, :32, last : last + 32])


@pytest.mark.parametrize("name", DENSITIES)
def test_densities_are_sampled_afresh_for_every_batch_and_stay_in_view(name):
    splits = toy(name, train=1000, validation=100, test=200)
    assert [len(part) for part in parts_of(splits)] == [1000, 100, 200]
    batches = [splits.train[torch.tensor(order)] for order in ([2, 0, 1], [2, 0, 1], [0, 1, 2])]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])
    found = torch.stack([splits.val[-1], splits.test[-1], batches[0][-1]])
    torch.testing.assert_close(found, torch.tensor(POINTS[name]), rtol=0, atol=1e-4)
    assert splits.transform.names == ["x1", "x2"][: found.shape[1]]
    assert torch.equal(splits.transform(found, torch.arange(3), torch.empty(3, 0)).y, found)
    points = torch.from_numpy(DENSITIES[name](20000, np.random.default_rng(0)))
    assert points.abs().max() < 4


def test_densities_have_their_known_entropy_and_moments():
    rng = np.random.default_rng(0)
    cells = np.floor(DENSITIES["checkerboard"](4000, rng))
    assert set(cells.sum(1) % 2) == {0}
    assert len(np.unique(cells, axis=0)) == 8
    points = DENSITIES["eight_gaussians"](200000, rng)
    angle = np.round(np.arctan2(points[:, 1], points[:, 0]) / (math.pi / 4)) * (math.pi / 4)
    spread = points - 2 * np.stack([np.cos(angle), np.sin(angle)], 1)
    entropy = math.log(8) + math.log(2 * math.pi * math.e * spread.var())
    assert math.isclose(entropy, 0.985, abs_tol=0.01)
    mean = DENSITIES["two_gaussians"](100000, rng).mean()
    assert math.isclose(mean, 1.2 * 2 / 3 - 1.6 / 3, abs_tol=0.02)


def test_training_batches_have_not_changed():
    """Order, flips and noise of a resumed run in the second of two processes."""
    data = module(flip=True, seed=5, alpha=1e-5, context="label")
    data.setup()
    data.trainer = trainer(True, epoch=1, step=3, rank=1, processes=2, done=3)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(1)
    x, index, c = next(iter(loader))
    assert index[:8].tolist() == [159, 1016, 888, 850, 364, 1028, 1240, 996]
    assert torch.equal(c, data.splits.c["train"][index])
    torch.manual_seed(0)
    batch = transfer(data, (x, index, c))
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(batch.c, c)
    levels = data.transform.dequantize.inverse(data.transform.inverse(batch.y.double()))
    flipped = (levels != x).flatten(1).any(1)
    generator = step_generator(torch.device("cpu"), 5, 1, 3, 1, NOISE)
    assert torch.equal(flipped, torch.rand(32, generator=generator) < 0.5)
    assert torch.equal(levels, torch.where(flipped[:, None, None, None], x.flip(-1), x))
    expected = torch.tensor([-3.9571, -0.0945, 1.4329, 0.2230])
    torch.testing.assert_close(batch.y[0, 0, 3, :4], expected, rtol=1e-4, atol=1e-3)
    data.trainer = trainer(True, epoch=1, step=4, rank=1)
    assert not torch.equal(transfer(data, (x, index, c)).y, batch.y)


def test_evaluation_batches_have_not_changed_and_are_not_flipped():
    data = module(flip=True, seed=5, alpha=1e-5)
    data.setup()
    data.trainer = trainer(False)
    torch.manual_seed(0)
    x, index, c = next(iter(data.val_dataloader()))
    assert torch.equal(x, data.splits.val[:100])
    assert torch.equal(index, torch.arange(100))
    batch = transfer(data, (x, index, c))
    assert torch.equal(data.transform.dequantize.inverse(data.transform.inverse(batch.y)), x)
    expected = torch.tensor([-3.50291, -2.83699, 1.11643, 1.42571])
    torch.testing.assert_close(batch.y[7, 0, 3, :4], expected, rtol=1e-4, atol=1e-4)
    after = torch.rand(1)  # training's random stream has not moved
    assert torch.equal(after, torch.rand(1, generator=torch.Generator().manual_seed(0)))


def test_the_order_follows_from_the_seed_and_the_epoch_and_is_shared_out():
    def order(seed=0, epoch=0, **place):
        sampler = EpochOrder(range(10), 2, trainer(True, **place), seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    first = order()
    assert sorted(first) == list(range(10))
    assert first == order()
    assert first != order(seed=1)
    assert first != order(epoch=1)
    assert first[4:] == order(done=2)
    halves = order(rank=0, processes=2) + order(rank=1, processes=2)
    assert sorted(halves) == list(range(10))


def test_a_checkpoint_holds_what_a_flow_needs_of_its_data():
    data = module(context="label", alpha=0.01)
    data.setup()
    other = module(context="label", alpha=0.3)
    other.load_state_dict(data.state_dict())
    assert other.shape == (1, 8, 8)
    assert other.transform.state() == {"levels": 17, "alpha": 0.01}
    assert other.conditions.size == 10
    with pytest.raises(InputError, match=r"the data have .*0\.3.* the checkpoint .*0\.01"):
        other.setup()
    same = module(context="label", alpha=0.01)
    same.load_state_dict(data.state_dict())
    same.setup()
    moons = module(toy, name="moons")
    moons.load_state_dict(data.state_dict())
    with pytest.raises(InputError, match=r"the data have .*x2.* the checkpoint .*label"):
        moons.setup()


@pytest.mark.parametrize("split", range(3))
def test_data_that_are_not_finite_are_named(split):
    parts = torch.zeros(3, 9, 3)
    parts[split, 5, 1] = math.nan
    with pytest.raises(InputError, match="b=nan: must be"):
        Splits(*parts, TableTransform([Column(name) for name in "abc"]))


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda: module(toy, name="moons", train=0).setup(), "the train split is empty"),
        (lambda: toy("moon"), "name=moon: must be one of eight_gaussians, moons"),
        (lambda: digits(validation=1437), "validation=1437: must be 1 to 1436, out of 1437"),
        (lambda: reduce_images(torch.zeros(2, 1, 28, 28), 29), "resize=29: must be at most 28"),
    ],
)
def test_arguments_that_do_not_fit_the_data_are_refused(load, message):
    with pytest.raises(InputError, match=f"^{message}"):
        load()
