import hashlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_sample_images

from rnode import InputError
from rnode.data.datamodule import DataModule, EpochOrder, fetch
from rnode.data.densities import DENSITIES, FreshSamples, toy
from rnode.data.images import digits, idx_images, patches, reduce_images
from rnode.data.splits import Splits

# Fixed values, here and below, hold that the same seed gives the same data in every version.
# These are the last rows of the validation set, of the test set and of a training batch.
POINTS = {
    "eight_gaussians": [[-1.50669, -1.41093], [2.14029, 0.00335], [-1.55761, 1.30469]],
    "moons": [[0.77593, 0.57042], [2.64252, -0.68336], [3.21565, 0.20747]],
    "circles": [[0.7219, 1.82663], [0.15398, -0.90792], [-0.87061, -0.17552]],
    "pinwheel": [[1.93083, 0.00713], [-1.84292, 1.11161], [-0.79492, 1.25476]],
    "checkerboard": [[0.11937, 0.54938], [-1.51135, -1.24463], [1.9573, -0.19793]],
    "spirals": [[-1.93289, 0.3347], [-0.71417, -0.2202], [-2.20163, -1.37778]],
    "rings": [[-1.55659, 1.07049], [-0.56886, -0.29224], [0.3873, -1.14134]],
    "two_gaussians": [[1.57345], [0.73516], [-1.73197]],
}


def module(**changes):
    arguments = {
        "source": digits,
        "shape": [1, 8, 8],
        "batch_size": 32,
        "eval_batch_size": 100,
        "levels": 17,
        "alpha": 1e-5,
    }
    return DataModule(**(arguments | changes))


def trainer(training, epoch=0, step=0, rank=0, processes=1, done=0):
    """What a DataModule reads of a Lightning Trainer."""
    current = SimpleNamespace(ready=step, processed=done)
    progress = SimpleNamespace(current=current, is_last_batch=False)
    return SimpleNamespace(
        training=training,
        current_epoch=epoch,
        global_rank=rank,
        world_size=processes,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )


def transfer(data, batch):
    return data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)


# Splits


def test_digits_are_all_of_scikit_learns_in_splits_that_never_change():
    splits = digits()
    assert [len(part) for part in splits[:3]] == [1257, 180, 360]
    pixels = torch.cat(splits[:3]).numpy()
    expected = load_digits().images.astype(np.uint8).reshape(1797, 64)
    assert sorted(map(bytes, pixels.reshape(1797, 64))) == sorted(map(bytes, expected))
    assert hashlib.sha256(pixels.tobytes()).hexdigest().startswith("89fb075c4295214c55350029312c65")
    assert torch.equal(digits(validation=100).test, splits.test)


def test_patches_come_from_disjoint_regions_of_the_photographs():
    splits = patches(size=32, stride=8)
    photo = torch.tensor(load_sample_images().images[0]).permute(2, 0, 1)
    edges = [0, int(0.70 * 640), int(0.85 * 640), 640]
    for part, left, right in zip(splits[:3], edges[:-1], edges[1:], strict=True):
        columns = (right - left - 32) // 8 + 1
        assert part.shape == (2 * ((427 - 32) // 8 + 1) * columns, 3, 32, 32)
        last = left + 8 * (columns - 1)
        assert last + 32 <= right
        assert torch.equal(part[0], photo[:, :32, left : left + 32])
        assert torch.equal(part[columns - 1], photo[:, :32, last : last + 32])


@pytest.mark.parametrize("name", DENSITIES)
def test_densities_are_sampled_afresh_for_every_batch_and_stay_in_view(name):
    splits = toy(name, train=1000, validation=100, test=200)
    assert [len(part) for part in splits[:3]] == [1000, 100, 200]
    batches = [splits.train.__getitems__(order)[0] for order in ([2, 0, 1], [2, 0, 1], [0, 1, 2])]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])
    found = torch.stack([splits.val[-1], splits.test[-1], batches[0][-1]])
    torch.testing.assert_close(found, torch.tensor(POINTS[name]), rtol=0, atol=1e-4)
    points = torch.from_numpy(DENSITIES[name](20000, np.random.default_rng(0)))
    assert points.abs().max() < 4
    assert points.std(0).min() > 0.5
    assert points.mean(0).abs().max() < 0.5


def test_densities_have_their_known_entropy_and_moments():
    rng = np.random.default_rng(0)
    cell = np.floor(DENSITIES["checkerboard"](4000, rng)).astype(int)
    assert set((cell.sum(1) % 2).tolist()) == {0}
    assert len({tuple(c) for c in cell}) == 8

    points = DENSITIES["eight_gaussians"](200000, rng)
    angle = np.round(np.arctan2(points[:, 1], points[:, 0]) / (math.pi / 4)) * (math.pi / 4)
    spread = points - 2 * np.stack([np.cos(angle), np.sin(angle)], 1)
    entropy = math.log(8) + math.log(2 * math.pi * math.e * spread.var())
    assert math.isclose(entropy, 0.985, abs_tol=0.01)

    x = DENSITIES["two_gaussians"](200000, rng)
    mean = (-1.6 + 2 * 1.2) / 3
    assert math.isclose(x.mean(), mean, abs_tol=0.02)
    assert math.isclose(x.var(), 0.4**2 + (1.6**2 + 2 * 1.2**2) / 3 - mean**2, abs_tol=0.02)


# Batches


def test_training_batches_have_not_changed():
    """Order, flips and noise of a resumed run in the second of two processes."""
    data = module(flip=True, seed=5)
    data.setup()
    data.trainer = trainer(True, epoch=1, step=3, rank=1, processes=2, done=3)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(1)
    x, index, _ = next(iter(loader))
    assert index[:8].tolist() == [159, 1016, 888, 850, 364, 1028, 1240, 996]
    y, log_det, *_ = transfer(data, (x, index, None))
    levels = data.transform.dequantize.inverse(data.transform.inverse(y.double()))
    flipped = torch.tensor([0, 1, 1, 0, 0, 1, 1, 0]).bool()[:, None, None, None]
    assert torch.equal(levels[:8], torch.where(flipped, x[:8].flip(-1), x[:8]))
    close = {"rtol": 1e-4, "atol": 1e-3}
    expected = torch.tensor([-4.34446, -6.36591, -1.16659, 1.10608])
    torch.testing.assert_close(y[0, 0, 3, :4], expected, **close)
    torch.testing.assert_close(log_det[:2], torch.tensor([-3.61627, -6.69835]), **close)


def test_evaluation_batches_have_not_changed_and_are_not_flipped():
    data = module(flip=True, seed=5)
    data.setup()
    data.trainer = trainer(False)
    torch.manual_seed(0)
    x, index, _ = next(iter(data.val_dataloader()))
    assert torch.equal(x, data.splits.val[:100])
    y, _, index, _ = transfer(data, (x, index, None))
    assert torch.equal(index, torch.arange(100))
    assert torch.equal(data.transform.dequantize.inverse(data.transform.inverse(y.double())), x)
    expected = torch.tensor([-3.50291, -2.83699, 1.11643, 1.42571])
    torch.testing.assert_close(y[7, 0, 3, :4], expected, rtol=1e-4, atol=1e-4)
    after = torch.rand(1)  # training's random stream has not moved
    assert torch.equal(after, torch.rand(1, generator=torch.Generator().manual_seed(0)))


def test_processes_share_an_evaluation():
    data = module()
    rows = torch.arange(250)[:, None]
    data.splits = Splits(rows, rows, rows)
    shares = [list(data.eval_dataloader("test", rank, processes=3)) for rank in range(3)]
    assert [[len(x) for x, *_ in share] for share in shares] == [[84], [83], [83]]
    assert [index[:2].tolist() for ((_, index, _),) in shares] == [[0, 3], [1, 4], [2, 5]]


def test_the_order_follows_from_the_seed_and_the_epoch_and_is_shared_out():
    def orders(seed, epoch, world_size=1, used=0):
        loop = SimpleNamespace(
            batch_progress=SimpleNamespace(current=SimpleNamespace(processed=used))
        )
        trainer = SimpleNamespace(world_size=world_size, fit_loop=SimpleNamespace(epoch_loop=loop))
        samplers = []
        for trainer.global_rank in range(world_size):
            samplers.append(EpochOrder(range(10), 2, trainer, seed))
        for sampler in samplers:
            sampler.set_epoch(epoch)
        return [list(sampler) for sampler in samplers]

    (first,) = orders(0, 0)
    assert sorted(first) == list(range(10))
    assert [first] == orders(0, 0) != orders(1, 0)
    assert [first] != orders(0, 1)
    assert orders(0, 0, used=2) == [first[4:]]
    first, second = orders(0, 0, world_size=2)
    assert sorted(first + second) == list(range(10))


# Errors


@pytest.mark.parametrize(("split", "words"), [(0, "training"), (1, "validation"), (2, "test")])
def test_data_that_are_not_finite_are_named(split, words):
    def source():
        parts = [torch.zeros(9, 3) for _ in range(3)]
        parts[split][5, 1] = math.nan
        return Splits(*parts)

    data = DataModule(source, [3], batch_size=4, eval_batch_size=4)
    line = f"row 5 of the {words} data is not finite: column 1 is nan"
    with pytest.raises(InputError, match=line):
        data.setup()


def test_samples_that_are_not_finite_are_named():
    def broken(n, rng):
        return np.full((n, 2), np.inf)

    with pytest.raises(InputError, match="row 0 of a batch of training data is not finite"):
        fetch(FreshSamples(broken, 9), None, [0, 1])


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda: module(validaton=10), "arguments of the data source: .*'validaton'"),
        (lambda: module(source=idx_images, name="MNIST"), "arguments of the data source: .*'root'"),
        (lambda: module(levels=16).setup(), "levels=16: the train split has the grey level 16"),
        (lambda: module(shape=[1, 8, 9]).setup(), r"shape=\[1, 8, 9\]: .* shape \[1, 8, 8\]"),
        (lambda: module(source=toy, name="rings", train=0).setup(), "the train split is empty"),
        (lambda: toy("moon"), "name=moon: must be one of eight_gaussians, moons"),
        (
            lambda: idx_images("SVHN", ".", 1),
            "name=SVHN: must be one of MNIST, FashionMNIST, KMNIST",
        ),
        (lambda: digits(test=1797), "test=1797: must be 1 to 1796, out of 1797 samples"),
        (lambda: digits(validation=1437), "validation=1437: must be 1 to 1436, out of 1437"),
        (lambda: patches(size=97), "size=97: must be at most 96"),
        (lambda: reduce_images(torch.zeros(2, 1, 28, 28), 29), "resize=29: must be at most 28"),
    ],
)
def test_arguments_that_do_not_fit_the_data_are_refused(load, message):
    with pytest.raises(InputError, match=f"^{message}"):
        load()
