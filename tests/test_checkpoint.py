"""Checkpoints: read as data alone, checked byte for byte, and resumed under other settings."""

import functools
import operator
import pickle
import random
import shutil
import zipfile

import pytest
import torch
import yaml

from helpers import TWO_STEPS, call, refused
from rnode.app import density
from rnode.errors import InputError
from rnode.training.checkpoint import FORMAT, AtomicCheckpointIO, load_checkpoint
from rnode.training.run_folder import lock

pytestmark = pytest.mark.usefixtures("blank_figures")

MORE = [*TWO_STEPS, "model.pieces=1", "trainer.max_steps=4", "trainer.max_epochs=2"]
WEIGHT = "flow.layers.0.field.layers.0.weight"


class Evil(str):
    """A path of a file, which unpickling makes."""

    def __reduce__(self):
        return open, (str(self), "w")


def as_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


def put(checkpoint, value, *place):
    """Set one place of nested containers; return the checkpoint."""
    functools.reduce(operator.getitem, place[:-1], checkpoint)[place[-1]] = value
    return checkpoint


@pytest.mark.parametrize("place", [(), ("config", "seed"), ("state_dict", WEIGHT)], ids=str)
@pytest.mark.parametrize("write", [torch.save, as_pickle])
def test_nothing_in_a_checkpoint_is_executed(tiny_run, tmp_path, write, place):
    path, made = tmp_path / "evil.ckpt", tmp_path / "made"
    whole = load_checkpoint(tiny_run / "last.ckpt")
    write(put(whole, Evil(made), *place) if place else Evil(made), path)
    for load in (load_checkpoint, density.load, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(InputError, match="is damaged or not a checkpoint"):
            load(str(path))
    assert not made.exists()
    with open(path, "rb") as file:  # a reader that trusts the file would have made it
        pickle.load(file) if write is as_pickle else torch.load(file, weights_only=False)
    assert made.exists()


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("model", {"_target_": "os.system", "_args_": ["true"]}, "would call os.system"),
        ("dataset.source._target_", "rnode.flow.torch.load", "would call rnode.flow.torch.load"),
        ("dataset.test", [1, [{"a": [{"_target_": "os.system"}]}], 8], "would call os.system"),
        ("model._target_", ["os.system"], "would call ['os.system']"),
        ("model.hidden", "${oc.env:HOME}", "would interpret ${oc.env:HOME}"),
        ("model.${seed}", 1, "would interpret"),
    ],
)
def test_a_configuration_that_would_do_more_is_refused(tiny_run, tmp_path, place, value, words):
    checkpoint, path = load_checkpoint(tiny_run / "last.ckpt"), tmp_path / "evil.ckpt"
    torch.save(put(checkpoint, value, "config", *place.split(".")), path)
    with pytest.raises(InputError) as refusal:
        density.load(path)
    assert f"ckpt_path={path}: its configuration would" in str(refusal.value)
    assert words in str(refusal.value)


def test_another_format_is_refused(tmp_path):
    path, others = tmp_path / "other.ckpt", [({"format": n}, n) for n in (1, FORMAT + 1)]
    for content, found in [*others, ({}, "none"), ([1, 2], "none")]:
        torch.save(content, path)
        words = f"has format {found}, and this version of rnode reads format {FORMAT}; use the"
        with pytest.raises(InputError, match=words):
            load_checkpoint(path)


def test_a_run_resumes_with_its_own_model_and_optimizer_alone(tiny_run, tmp_path, capsys):
    resume = [*MORE, f"ckpt_path={tiny_run / 'last.ckpt'}", f"hydra.run.dir={tmp_path}"]
    for key, there, here in (
        ("model.hidden", "4", "5"),
        ("optimizer._target_", "torch.optim.Adam", "torch.optim.SGD"),
    ):
        line = refused(capsys, "train", *resume, f"{key}={here}")
        assert f"{key} is {there} there and {here} here; a run resumes with the same" in line


def test_a_new_run_does_not_overwrite_the_checkpoints_of_an_earlier_one(tiny_run, tmp_path, capsys):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    for path in ("null", tiny_run / "last.ckpt"):
        options = [*MORE, f"ckpt_path={path}", f"hydra.run.dir={folder}"]
        line = refused(capsys, "train", *options)
        assert f"{folder / 'last.ckpt'} is from an earlier run: ckpt_path=auto resumes" in line
    with lock(folder, resumes=True):
        line = refused(capsys, "train", *MORE, "ckpt_path=auto", f"hydra.run.dir={folder}")
    assert f"{folder}: another run is using this folder; wait until" in line
    for path in tiny_run.glob("*.[cjy]*"):
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_a_checkpoint_removes_nothing(tiny_run, tmp_path):
    """Lightning removes the best checkpoint that its state names once there is a better one."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").touch()
    checkpoint = load_checkpoint(tiny_run / "last.ckpt")
    (state,) = (state for state in checkpoint["callbacks"].values() if state.get("monitor"))
    worst, path = torch.tensor(99.0), f"local://{victim}"
    state |= {"dirpath": str(tmp_path), "best_k_models": {path: worst}, "kth_value": worst}
    state |= {"kth_best_model_path": path, "best_model_path": path, "best_model_score": worst}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    often = "+trainer.val_check_interval=1"
    call("train", *MORE, often, f"hydra.run.dir={tmp_path}", "ckpt_path=auto")
    assert (tmp_path / "best.ckpt").exists()
    assert (victim / "file").exists()


def test_a_resumed_run_has_the_settings_of_its_command_line(tiny_run, tmp_path, capsys):
    """The command line's settings apply; weights, optimizer state, step and epoch continue."""
    path = tiny_run / "last.ckpt"
    changes = ["optimizer.lr=0.001", "optimizer.weight_decay=0.1", "warmup_steps=9", "seed=7"]
    call("train", *MORE, *changes, f"hydra.run.dir={tmp_path}", f"ckpt_path={path}")
    assert f"resuming from {path}, step 2, epoch 0\n" in capsys.readouterr().out
    checkpoint = load_checkpoint(tmp_path / "last.ckpt")
    assert checkpoint["config"] == yaml.safe_load((tmp_path / "config.yaml").read_text())
    (group,) = checkpoint["optimizer_states"][0]["param_groups"]
    assert group["lr"] == pytest.approx(0.001 * 4 / 10)  # the last step is the fourth
    assert checkpoint["config"]["optimizer"]["weight_decay"] == group["weight_decay"] == 0.1


def test_any_flipped_bit_of_a_record_is_found(tiny_run, tmp_path):
    good, path = (tiny_run / "last.ckpt").read_bytes(), tmp_path / "flipped.ckpt"
    with zipfile.ZipFile(tiny_run / "last.ckpt") as archive:
        records = [archive.read(info) for info in archive.infolist()]
    assert sum(map(len, records)) > len(good) // 2
    choose = random.Random(0)
    for record in filter(None, records):
        position = good.index(record) + choose.randrange(len(record))
        flipped = bytearray(good)
        flipped[position] ^= 1 << choose.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(InputError, match="is damaged"):
            load_checkpoint(path)
