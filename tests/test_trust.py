"""Checkpoints and data files that somebody has made to do harm, or that hold nonsense: data, or refused in one line."""

import builtins
import os
import pickle

import pytest
import torch

from build import load_flow
from rnode import InputError
from rnode.checkpoint import AtomicCheckpointIO, load_checkpoint
from rnode.data import cifar10
from test_scripts import call, refused
from test_train import TWO_STEPS, cifar10_files

TINY = [*TWO_STEPS, "model.pieces=1", "dataset.test=40", "dataset.validation=40"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    call("train", *TINY, f"hydra.run.dir={folder}")
    return folder


class Evil:
    """Makes `path` when it is unpickled."""

    def __init__(self, path, function=builtins.open):
        self.call = (function, (str(path), "w") if function is builtins.open else (str(path),))

    def __reduce__(self):
        return self.call


def as_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


def as_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


FORMATS = {"pickle": as_pickle, "zip": torch.save, "legacy": as_legacy}
PLACES = {
    "all of it": lambda checkpoint, evil: evil,
    "a key": lambda checkpoint, evil: checkpoint | {evil: 0},
    "the configuration": lambda checkpoint, evil: put(checkpoint, evil, "config", "seed"),
    "a weight": lambda checkpoint, evil: put(checkpoint, evil, "state_dict", next(iter(checkpoint["state_dict"]))),
    "the optimizer's state": lambda checkpoint, evil: put(checkpoint, evil, "optimizer_states", 0, "state", 0, "exp_avg"),
    "the loops": lambda checkpoint, evil: put(checkpoint, evil, "loops", "fit_loop", "state_dict", "x"),
    "a callback's state": lambda checkpoint, evil: put(checkpoint, [{"x": (evil,)}], "callbacks", "EpochTimer"),
}


def put(checkpoint, value, *where):
    """The checkpoint with `value` in one place."""
    part = checkpoint
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    return checkpoint


@pytest.mark.parametrize("function", [builtins.open, os.mkdir])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_nothing_that_is_hidden_in_a_checkpoint_is_executed(run, tmp_path, write, place, function):
    made, path = tmp_path / "made", tmp_path / "evil.ckpt"
    write(PLACES[place](load_checkpoint(run / "last.ckpt"), Evil(made, function)), path)
    for load in (load_checkpoint, load_flow, lambda p: AtomicCheckpointIO().load_checkpoint(p, weights_only=False)):
        with pytest.raises(InputError, match="is damaged or not a checkpoint of a run of ours"):
            load(str(path))
        assert not made.exists()
    with open(path, "rb") as file:  # it would have been, by a reader that trusts it
        pickle.load(file) if write is as_pickle else torch.load(file, weights_only=False)
    assert made.exists()


@pytest.mark.parametrize("name", ["train", "evaluate", "sample"])
@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_a_script_refuses_such_a_checkpoint_in_one_line(run, tmp_path, capsys, name, write):
    made, path = tmp_path / "made", tmp_path / "evil.ckpt"
    write(PLACES["the optimizer's state"](load_checkpoint(run / "last.ckpt"), Evil(made)), path)
    options = TINY if name == "train" else []
    line, code = refused(capsys, name, *options, f"ckpt_path={path}", f"hydra.run.dir={tmp_path / 'out'}")
    assert f"ckpt_path={path}: is damaged or not a checkpoint" in line
    assert code == 2
    assert not made.exists()


def test_lightning_reads_as_data_too_what_it_finds_by_itself(run, tmp_path, capsys, monkeypatch):
    """On a cluster it takes a file of a certain name in the run folder for a checkpoint that it wrote itself."""
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "training")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
        monkeypatch.setenv(name, "0")
    made, folder = tmp_path / "made", tmp_path / "out"
    folder.mkdir()
    as_pickle({"config": {}, "x": Evil(made)}, folder / "hpc_ckpt_1.ckpt")
    with pytest.raises(SystemExit):
        call("train", *TINY, f"hydra.run.dir={folder}")
    assert "hpc_ckpt_1.ckpt: is damaged or not a checkpoint" in capsys.readouterr().err
    assert not made.exists()


def test_a_checkpoint_removes_nothing(run, tmp_path, capsys):
    """Lightning would remove what its state names as the best checkpoint before, once there is a better one."""
    folder, victim = tmp_path / "out", tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("")
    folder.mkdir()
    checkpoint = load_checkpoint(run / "last.ckpt")
    state = next(state for state in checkpoint["callbacks"].values() if state.get("monitor"))
    worst, path = torch.tensor(99.0), f"local://{victim}"
    state |= {"dirpath": str(folder), "best_k_models": {path: worst}, "kth_best_model_path": path, "kth_value": worst}
    state |= {"best_model_path": path, "best_model_score": worst}
    torch.save(checkpoint, folder / "last.ckpt")
    more = ["trainer.max_steps=4", "trainer.max_epochs=2", "trainer.val_check_interval=1"]
    with pytest.raises(SystemExit, match="2"):
        call("train", *TINY, *more, f"hydra.run.dir={folder}", "ckpt_path=auto")
    assert f"would have it remove {path}" in capsys.readouterr().err
    assert (victim / "file").exists()


def changed(run, path, change):
    """A copy of the run's checkpoint with a changed configuration."""
    checkpoint = load_checkpoint(run / "best.ckpt" if (run / "best.ckpt").exists() else run / "last.ckpt")
    change(checkpoint)
    torch.save(checkpoint, path)
    return str(path)


def deep(levels):
    value = [1]
    for _ in range(levels):
        value = [value]
    return value


def shared(levels):
    value = [1]
    for _ in range(levels):
        value = [value, value]
    return value


def circular():
    value = []
    value.append(value)
    return value


SYSTEM = {"_target_": "os.system", "_args_": ["true"]}


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ("dataset", SYSTEM | {"shape": [1, 8, 8]}, "would call os.system"),
        ("dataset.source", SYSTEM, "would call os.system"),
        ("dataset.validation", SYSTEM, "would call os.system"),
        ("dataset.shape", [1, [SYSTEM], 8], "would call os.system"),
        ("dataset.shape", [1, {"a": [{"b": SYSTEM}]}, 8], "would call os.system"),
        ("model", SYSTEM, "would call os.system"),
        ("model._target_", "builtins.eval", "would call builtins.eval"),
        ("model._target_", "rnode.flow.torch.load", "would call rnode.flow.torch.load"),
        ("model._target_", "rnode.data.toy", "would call rnode.data.toy for model"),
        ("model._target_", "${oc.env:HOME}", "would be interpreted"),
        ("model._target_", ["os.system"], "would call"),
        ("model._target_", {"_target_": "os.system"}, "would call"),
        ("model._target_", 5, "would call 5"),
        ("model._target_", None, "would call None"),
        ("model._partial_", False, "would call rnode.flow.multiscale for model"),
        ("model._args_", ["x"], "would call rnode.flow.multiscale for model"),
        ("model._recursive_", False, "would call rnode.flow.multiscale for model"),
        ("model._convert_", "object", "would call rnode.flow.multiscale for model"),
        ("model.hidden", "${seed}", "would be interpreted"),
        ("model.${seed}", 1, "would be interpreted"),
        (
            "solver.train.method",
            {"_target_": "rnode.solver.Method"},
            "would call rnode.solver.Method for solver.train.method",
        ),
        ("solver.test", {"_target_": "subprocess.Popen", "_partial_": True, "args": "true"}, "would call subprocess.Popen"),
        ("solver.test", None, "does not say what solver.test is"),
        ("solver", "rk4", "does not say what solver is"),
        ("dataset.source", [SYSTEM], "would call os.system"),
        ("divergence", SYSTEM, "would call os.system"),
        ("probes", [SYSTEM], "would call os.system"),
        ("dataset.3", 3, "keys that are not names"),
        ("dataset.test", torch.zeros(3), "is not text, numbers, lists and sections"),
        ("dataset.test", (1, 2), "is not text, numbers, lists and sections"),
        ("dataset.shape", deep(200), "is not text, numbers, lists and sections"),
        ("dataset.shape", shared(18), "is not text, numbers, lists and sections"),
        ("dataset.shape", circular(), "is not text, numbers, lists and sections"),
        ("wandb.name", circular(), "is not text, numbers, lists and sections"),
        # Nothing to call, and still not to be built.
        ("dataset.shape", [1, 100000, 100000], "dataset.shape=[1, 100000, 100000]: must be a list of whole numbers"),
        ("dataset.shape", [-1, 8, 8], "dataset.shape=[-1, 8, 8]: must be"),
        ("dataset.shape", "188", "dataset.shape=188: must be"),
        ("dataset.shape", [1, 8, 16], "dataset.shape=[1, 8, 16]: must be [1, 8, 8]"),
        ("model.shape", [1, 16, 16], "do not fit the model"),
        ("model.shape", [2**18, 64, 64], "do not fit the model"),
        ("model.hidden", 2**16, "do not fit the model"),
        ("model.hidden", 10**30, "model.hidden=10"),
        ("model.layers", 10**9, "model.layers=1000000000: must be"),
        ("model.pieces", -1, "model.pieces=-1: must be"),
        ("dataset.batch_size", 10**30, "dataset.batch_size=10"),
        ("dataset.levels", "many", "dataset.levels=many"),
        ("dataset.unheard_of", 1, "unheard_of"),
        ("model.unheard_of", 1, "unheard_of"),
        ("solver.train.unheard_of", 1, "unheard_of"),
        ("solver.test.max_steps", None, "solver.test.max_steps=None"),
        ("solver.test.step_size", 1e-30, "solver.test.step_size=1e-30"),
        ("divergence", None, "divergence=None"),
        ("probes", [], "probes=[]"),
    ],
)
def test_a_configuration_that_would_do_other_things_is_refused(run, tmp_path, capsys, where, value, words):
    def change(checkpoint):
        *above, last = where.split(".")
        put(checkpoint["config"], value, *above, int(last) if last.isdigit() else last)

    path = changed(run, tmp_path / "evil.ckpt", change)
    line, code = refused(capsys, "evaluate", f"ckpt_path={path}", "samples=1", f"hydra.run.dir={tmp_path / 'out'}")
    assert words in line
    assert code == 2


@pytest.mark.parametrize("name", ["celeba", "__builtins__", "os", 5, None])
def test_a_data_sets_name_chooses_among_ours(name, tmp_path):
    from rnode.data import idx_images

    with pytest.raises(InputError, match=f"dataset.name={name}: must be MNIST or FashionMNIST"):
        idx_images(name, str(tmp_path), validation=1)


def test_a_batch_of_cifar10_that_is_not_the_true_one_is_not_unpickled(tmp_path, monkeypatch):
    import urllib.request

    def no_network(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    cifar10_files(tmp_path, monkeypatch)
    assert len(cifar10(str(tmp_path), validation=5).train) == 35
    made = tmp_path / "made"
    for path in (tmp_path / "cifar-10-batches-py").iterdir():
        whole = path.read_bytes()
        path.write_bytes(pickle.dumps(Evil(made)))
        with pytest.raises(InputError, match="is not there or not whole"):
            cifar10(str(tmp_path), validation=5)
        assert not made.exists()
        path.write_bytes(whole)


FIRST = "flow.last.0.field.layers.0.weight"


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (("state_dict",), [1], "weights"),
        (("state_dict",), {}, "weights"),
        (("state_dict", FIRST), "x", "weights"),
        (("state_dict", FIRST), torch.zeros(3), "weights do not fit"),
        (("state_dict", FIRST), torch.zeros(1).expand(4, 5, 3, 3), "weights"),
        (("state_dict", FIRST), torch.full((4, 5, 3, 3), float("nan")), "weights are not finite"),
        (("state_dict", FIRST), torch.zeros(4, 5, 3, 3, dtype=torch.int32), "weights"),
        (("state_dict", FIRST), torch.zeros(4, 5, 3, 3, dtype=torch.float64), "weights"),
        (("state_dict", FIRST), torch.zeros(4, 5, 3, 3).to_sparse(), "weights"),
        (("state_dict", FIRST), torch.zeros(4, 5, 3, 3, device="meta"), "weights"),
        (("state_dict", FIRST), torch.zeros(4, 5, 3, 3, dtype=torch.complex64), "weights"),
        (("state_dict", "flow.other"), torch.zeros(3), "weights do not fit"),
    ],
)
def test_weights_that_do_not_fit_are_refused(run, tmp_path, capsys, where, value, words):
    path = changed(run, tmp_path / "evil.ckpt", lambda checkpoint: put(checkpoint, value, *where))
    line, code = refused(capsys, "sample", f"ckpt_path={path}", "n=1", f"hydra.run.dir={tmp_path / 'out'}")
    assert f"ckpt_path={path}: " in line
    assert words in line
    assert code == 2


MISSING = object()


@pytest.mark.parametrize(
    ("where", "value"),
    [
        *(((key,), MISSING) for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks")),
        *(((key,), MISSING) for key in ("epoch", "global_step", "pytorch-lightning_version")),
        (("state_dict",), [1]),
        (("state_dict", FIRST), torch.zeros(3)),
        (("state_dict", FIRST), torch.full((4, 5, 3, 3), float("nan"))),
        (("optimizer_states",), []),
        (("optimizer_states",), [{}]),
        (("optimizer_states",), [circular()]),
        (("optimizer_states", 0, "state", 0, "exp_avg"), torch.zeros(3)),
        (("optimizer_states", 0, "state", 0, "exp_avg"), "x"),
        (("optimizer_states", 0, "state", 0, "exp_avg"), MISSING),
        (("optimizer_states", 0, "param_groups"), []),
        (("optimizer_states", 0, "param_groups", 0, "lr"), "x"),
        (("optimizer_states", 0, "param_groups", 0, "lr"), float("nan")),
        (("optimizer_states", 0, "param_groups", 0, "params"), [0]),
        (("lr_schedulers",), {}),
        (("loops", "fit_loop"), MISSING),
        (("loops", "fit_loop", "epoch_loop.batch_progress", "current", "ready"), -1),
        (("loops", "fit_loop", "epoch_progress", "current", "completed"), 10**30),
        (("loops", "fit_loop", "epoch_progress", "current", "completed"), []),
        (("global_step",), "2"),
        (("global_step",), -5),
        (("pytorch-lightning_version",), "x"),
        (("pytorch-lightning_version",), [1]),
        (("callbacks", "EpochTimer"), 5),
        (("callbacks", "EpochTimer", "seconds"), "x"),
        (("callbacks", "RefineGrid"), {"step": 1}),
        (("callbacks", "RefineGrid", "step_size"), -1),
        (("config", "model"), MISSING),
        (("config", "model"), 5),
        (("config", "model", "hidden"), torch.zeros(3)),
        (("config", "model", "hidden"), deep(5)),
    ],
)
def test_a_run_does_not_go_on_from_a_checkpoint_that_lacks_something(run, tmp_path, capsys, where, value):
    def change(checkpoint):
        put(checkpoint, value, *where)
        if value is MISSING:
            part = checkpoint
            for key in where[:-1]:
                part = part[key]
            del part[where[-1]]

    path = changed(run, tmp_path / "evil.ckpt", change)
    more = [*TINY, "trainer.max_steps=3", "trainer.max_epochs=2", f"hydra.run.dir={tmp_path / 'out'}"]
    line, code = refused(capsys, "train", *more, f"ckpt_path={path}")
    assert f"ckpt_path={path}: " in line
    assert code == 2
    assert not list((tmp_path / "out").glob("*.ckpt"))
