import gzip
import math

import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer
from sklearn.datasets import load_digits, load_sample_images

from rnode import InputError
from rnode.data import DENSITIES, DataModule, Order, digits, idx_images, patches, read_idx, toy


def write_idx(path, images):
    """The format of MNIST's files, gzipped if the name says so."""
    content = bytes([0, 0, 8, 3]) + np.array(images.shape, ">u4").tobytes() + images.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(256, size=(50, 28, 28))


def rows(tensor):
    return {bytes(row.numpy().tobytes()) for row in tensor}


def test_digits_are_scikit_learns_all_of_them_once():
    splits = digits()
    assert [len(part) for part in splits] == [1257, 180, 360]
    assert splits.train.dtype == torch.uint8
    every = torch.cat(splits)
    assert every.shape == (1797, 1, 8, 8)
    assert sorted(map(bytes, every.numpy().reshape(1797, 64))) == sorted(
        map(bytes, load_digits().images.astype(np.uint8).reshape(1797, 64))
    )


def test_the_split_never_changes_and_the_test_set_does_not_depend_on_validation():
    first, second = digits(validation=180), digits(validation=100)
    assert torch.equal(first.test, second.test)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, digits(), strict=True))


def test_patches_come_from_disjoint_regions_of_the_photographs():
    splits = patches(size=32, stride=8)
    assert all(part.shape[1:] == (3, 32, 32) and part.dtype == torch.uint8 for part in splits)
    photos = np.stack(load_sample_images().images)
    first = photos[0, :32, :32].transpose(2, 0, 1)
    assert np.array_equal(splits.train[0].numpy(), first)
    edges = [0, int(0.70 * 640), int(0.85 * 640), 640]
    for part, left, right in zip(splits, edges, edges[1:], strict=False):
        columns = (right - left - 32) // 8 + 1
        assert len(part) == 2 * ((427 - 32) // 8 + 1) * columns
        last = photos[0, :32, left + 8 * (columns - 1) : left + 8 * (columns - 1) + 32].transpose(2, 0, 1)
        assert left + 8 * (columns - 1) + 32 <= right
        assert np.array_equal(part[columns - 1].numpy(), last)


@pytest.mark.parametrize("name", DENSITIES)
def test_densities_are_drawn_afresh_for_every_batch_and_stay_in_view(name):
    splits = toy(name, train=1000, validation=100, test=200)
    assert [len(part) for part in splits] == [1000, 100, 200]
    first, again, second = (splits.train.__getitems__(indices)[0] for indices in ([0, 1, 2], [0, 1, 2], [0, 2, 1]))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    points = torch.from_numpy(DENSITIES[name](20000, np.random.default_rng(0)))
    assert points.abs().max() < 4
    assert points.std(0).min() > 0.5
    assert points.mean(0).abs().max() < 0.5


def test_densities_with_a_known_entropy_have_it():
    rng = np.random.default_rng(0)
    points = DENSITIES["checkerboard"](4000, rng)
    cell = np.floor(points).astype(int)
    assert set((cell.sum(1) % 2).tolist()) == {0}
    assert len({tuple(c) for c in cell}) == 8
    points = DENSITIES["eight_gaussians"](200000, rng)
    angle = np.round(np.arctan2(points[:, 1], points[:, 0]) / (math.pi / 4)) * (math.pi / 4)
    spread = points - 2 * np.stack([np.cos(angle), np.sin(angle)], 1)
    entropy = math.log(8) + math.log(2 * math.pi * math.e * spread.var())
    assert math.isclose(entropy, 0.985, abs_tol=0.01)


@pytest.mark.parametrize("folder", ["", "MNIST/raw"])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_files_gzipped_or_plain_where_a_user_or_torchvision_puts_them(tmp_path, images, ending, folder):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    write_idx(tmp_path / folder / f"train-images-idx3-ubyte{ending}", images)
    write_idx(tmp_path / folder / f"t10k-images-idx3-ubyte{ending}", images[:7])
    splits = idx_images("MNIST", str(tmp_path), validation=10)
    assert [len(part) for part in splits] == [40, 10, 7]
    assert rows(torch.cat(splits[:2])) == rows(torch.from_numpy(images.astype(np.uint8)))
    assert torch.equal(splits.test[:, 0], torch.from_numpy(images[:7].astype(np.uint8)))


def test_torchvision_reads_what_the_tests_write(tmp_path, images):
    from torchvision.datasets.mnist import read_image_file

    write_idx(tmp_path / "images", images)
    assert torch.equal(read_image_file(str(tmp_path / "images")), read_idx(tmp_path / "images"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "starts with nothing"),
        (lambda content: content[:9], "starts with 00000803"),
        (lambda content: content[:-1], "39199 bytes of pixels"),
        (lambda content: content + b"x", "holds more bytes of pixels"),
        (lambda content: content[:4] + b"\xff" * 12 + content[16:], "holds 0 bytes of pixels"),
        (lambda content: b"\x89PNG" + content, "starts with 89504e47"),
        (lambda content: bytes([0, 0, 8, 1]) + content[4:], "starts with 00000801"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path, images, damage, message):
    path = tmp_path / "train-images-idx3-ubyte"
    write_idx(path, images)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=message):
        read_idx(path)


@pytest.mark.parametrize("cut", [0, 5, 1000, -1])
def test_damaged_gzip_files_are_refused(tmp_path, images, cut):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    write_idx(path, images)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match="cannot be read|starts with nothing"):
        read_idx(path)


def test_a_folder_with_half_of_the_files_is_refused(tmp_path, images):
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    with pytest.raises(InputError, match="holds no t10k-images-idx3-ubyte"):
        idx_images("MNIST", str(tmp_path), validation=10)


@pytest.mark.parametrize("validation", [0, 50, 51, "ten"])
def test_a_validation_set_that_cannot_be_cut_is_refused(tmp_path, images, validation):
    for name in ("train", "t10k"):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte", images)
    with pytest.raises(InputError, match=f"dataset.validation={validation}"):
        idx_images("MNIST", str(tmp_path), validation=validation)


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


class FakeTrainer:
    def __init__(self, training):
        self.training = training


def test_a_batch_is_the_logit_of_the_dequantized_images_with_its_log_det():
    data = module()
    data.setup()
    x = data.splits.train[:5]
    y, log_det, _index = data.transform(x, torch.arange(5))
    u = (y.double().sigmoid() - 1e-5) / (1 - 2e-5)
    assert torch.equal((u * 17).floor().to(torch.uint8), x)
    # d y / d x = (1 − 2α) / 17 / (s (1 − s)), s = sigmoid(y)
    s = y.double().sigmoid()
    expected = (math.log((1 - 2e-5) / 17) - s.log() - (1 - s).log()).flatten(1).sum(1)
    torch.testing.assert_close(log_det.double(), expected, rtol=1e-4, atol=1e-3)
    assert data.inverse(y).min() >= 0
    assert data.inverse(y).max() <= 1


def test_noise_is_fresh_in_training_and_belongs_to_the_image_in_evaluation():
    data = module()
    data.setup()
    x, index = data.splits.val[:4], torch.arange(4)
    data.trainer = FakeTrainer(training=True)
    assert not torch.equal(data.on_after_batch_transfer((x, index), 0).y, data.on_after_batch_transfer((x, index), 0).y)
    data.trainer = FakeTrainer(training=False)
    y = data.on_after_batch_transfer((x, index), 0).y
    assert torch.equal(y[2:], data.on_after_batch_transfer((x[2:], index[2:]), 0).y)
    other = module(seed=1)
    other.trainer = FakeTrainer(training=False)
    assert not torch.equal(y, other.on_after_batch_transfer((x, index), 0).y)


def test_images_are_flipped_in_training_alone():
    data = module(flip=True)
    data.setup()
    x = data.splits.train[:200]
    for training in (True, False):
        data.trainer = FakeTrainer(training)
        levels = (data.inverse(data.on_after_batch_transfer((x, torch.arange(200)), 0).y) * 17).floor().to(torch.uint8)
        same, flipped = ((levels == reference).flatten(1).all(1) for reference in (x, x.flip(-1)))
        assert (same | flipped).all()
        if training:
            assert 60 < int((flipped & ~same).sum()) < 140
        else:
            assert same.all()


def test_vectors_pass_unchanged():
    data = DataModule(toy, shape=[2], batch_size=8, eval_batch_size=8, name="rings")
    data.setup()
    x, index = next(iter(data.val_dataloader()))
    y, log_det, _ = data.transform(x, index)
    assert torch.equal(y, x)
    assert not log_det.any()
    assert torch.equal(data.inverse(y), x)


def test_batches_are_fetched_whole_and_every_image_once():
    data = module()
    data.trainer = Trainer(logger=False, accelerator="cpu")
    data.setup()
    seen = torch.cat([index for _, index in data.train_dataloader()])
    assert torch.equal(seen.sort().values, torch.arange(1257))
    x, index = next(iter(data.train_dataloader()))
    assert x.dtype == torch.uint8
    assert torch.equal(x, data.splits.train[index])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "dataset.batch_size=0"),
        ({"eval_batch_size": -1}, "dataset.eval_batch_size=-1"),
        ({"alpha": 0.5}, "dataset.alpha=0.5"),
        ({"levels": 16}, "dataset.levels=16: must be more than 16"),
        ({"shape": [1, 8, 9]}, r"dataset.shape=\[1, 8, 9\]: must be \[1, 8, 8\]"),
        ({"source": toy, "name": "moon"}, "dataset.name=moon: must be one of eight_gaussians"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        module(**changes).setup()


def test_an_argument_that_the_source_does_not_know_is_refused_at_once():
    with pytest.raises(TypeError, match="validaton"):
        module(validaton=10)


def test_reduced_images_are_the_means_of_their_blocks(tmp_path):
    from rnode.data import reduced

    images = torch.randint(256, (5, 3, 28, 28), dtype=torch.uint8)
    blocks = images.double().unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1))
    smaller = reduced(images, 14)
    assert smaller.dtype == torch.uint8
    assert (smaller.double() - blocks).abs().max() <= 0.5
    assert reduced(images, 28) is images
    for side in (3, 29, 14.0):
        with pytest.raises(InputError, match="dataset.resize"):
            reduced(images, side)
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((9, 28, 28)))
    write_idx(tmp_path / "t10k-images-idx3-ubyte", np.zeros((4, 28, 28)))
    assert idx_images("MNIST", str(tmp_path), 2, resize=14).val.shape == (2, 1, 14, 14)


def test_the_density_on_the_line_has_its_moments():
    x = torch.from_numpy(DENSITIES["two_gaussians"](200000, np.random.default_rng(0)))
    assert x.shape == (200000, 1)
    mean = (-1.6 + 2 * 1.2) / 3
    variance = 0.4**2 + (1.6**2 + 2 * 1.2**2) / 3 - mean**2
    assert abs(x.mean() - mean) < 0.02
    assert abs(x.var() - variance) < 0.02


def test_the_order_of_an_epoch_follows_from_its_seed_and_is_shared_out():
    def orders(seed, epoch, replicas=1, skip=0):
        samplers = [Order(range(10), replicas, rank, seed, skip) for rank in range(replicas)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        return [list(sampler) for sampler in samplers]

    (first,) = orders(0, 0)
    assert sorted(first) == list(range(10))
    assert [first] == orders(0, 0) != orders(1, 0)
    assert [first] != orders(0, 1)
    assert orders(0, 0, skip=4) == [first[4:]]
    a, b = orders(0, 0, replicas=2)
    assert sorted(a + b) == list(range(10))
    sampler = Order(range(10), 1, 0, 0, skip=4)
    assert len(list(sampler)) == 6
    assert len(list(sampler)) == 10
