"""Whole runs of the real command line, most of them in this process to save the imports."""

import csv
import functools
import hashlib
import itertools
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import cli
import train
from conftest import make_flow
from rnode.data import DENSITIES
from rnode.module import RNODE
from test_data import write_idx

ROOT = Path(__file__).parent.parent
QUICK = ["model.hidden=4", "trainer.max_epochs=1", "trainer.enable_progress_bar=false"]
TWO_STEPS = [
    *QUICK,
    "trainer.max_steps=2",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "trainer.log_every_n_steps=1",
    "dataset.batch_size=4",
    "dataset.eval_batch_size=4",
    "pictures.samples=4",
    "wandb.mode=disabled",
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call train.py with overrides; returns the run folder. A mistake ends in SystemExit, as on the command line."""

    def call(*overrides, folder="run"):
        monkeypatch.setattr(sys, "argv", ["train.py", f"hydra.run.dir={tmp_path / folder}", *overrides])
        cli.run(train.main, "train.py", "")
        return tmp_path / folder

    return call


def mistake(run, capsys, *overrides):
    """The one line that a user's mistake prints, and the exit code."""
    with pytest.raises(SystemExit) as stop:
        run(*overrides)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0], stop.value.code


def metrics(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def column(folder, key):
    return [float(row[key]) for row in metrics(folder) if row.get(key)]


def command(*arguments, cwd):
    return subprocess.run(
        [sys.executable, ROOT / "src" / "train.py", *arguments], cwd=cwd, capture_output=True, text=True, timeout=250
    )


def mnist_files(folder):
    images = np.random.default_rng(0).integers(256, size=(30, 28, 28))
    write_idx(folder / "train-images-idx3-ubyte.gz", images)
    write_idx(folder / "t10k-images-idx3-ubyte", images[:8])


def cifar10_files(folder, monkeypatch):
    """CIFAR10's pickled batches with 8 images each, and their checksums where torchvision keeps the true ones."""
    from torchvision.datasets import CIFAR10

    base = folder / CIFAR10.base_folder
    base.mkdir()

    def write(name, content):
        data = pickle.dumps(content)
        (base / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    rng = np.random.default_rng(0)

    def batch(name):
        return write(name, {"data": rng.integers(256, size=(8, 3072), dtype=np.uint8), "labels": [0] * 8})

    monkeypatch.setattr(CIFAR10, "train_list", [batch(name) for name, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [batch(name) for name, _ in CIFAR10.test_list])
    filename, md5 = write(CIFAR10.meta["filename"], {"label_names": ["x"]})
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"filename": filename, "md5": md5})


def test_the_default_run_as_a_user_starts_it(tmp_path):
    """A subprocess, two epochs of the real digits, everything that the README promises in the run folder."""
    done = command(
        "trainer.max_epochs=2",
        "dataset.batch_size=64",
        "model.hidden=8",
        "model.pieces=1",
        "hydra.run.dir=run",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "run"
    for name in ("config.yaml", "metrics.csv", "best.ckpt", "last.ckpt", "samples.png", "curves.png"):
        assert (folder / name).stat().st_size > 0, name
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["shape"] == [1, 8, 8]  # resolved
    untrained = column(folder, "train/bits_per_dim")[0]
    assert untrained > 4.5
    assert column(folder, "val/bits_per_dim")[-1] < untrained - 1.5
    assert 1.5 < column(folder, "test/bits_per_dim")[0] < untrained - 1.5
    for text in (
        "bits/dim (± standard error)",
        "NFE backward per batch",
        "kinetic energy",
        "Jacobian",
        "seconds per epoch",
    ):
        assert text in done.stdout
    assert re.search(r"Epoch 1: 100%.*bits/dim=\d.*, val=\d.*, NFE=24", done.stdout + done.stderr)
    (offline,) = folder.glob("wandb/offline-run-*")
    (record,) = offline.glob("*.wandb")
    assert record.stat().st_size > 1000
    assert list(offline.glob("files/media/images/samples_*.png"))
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    assert checkpoint["config"] == config
    assert checkpoint["epoch"] == 1


@pytest.mark.parametrize(
    "choice",
    [
        f"{group.name}={file.stem}"
        for group in sorted(path for path in cli.CONF.iterdir() if path.is_dir())
        for file in sorted(group.glob("*.yaml"))
    ],
)
def test_every_option_of_every_group_takes_two_steps(run, tmp_path, monkeypatch, choice):
    extra = []
    name = choice.split("=")[1].removesuffix("_ffjord")
    if name in ("mnist", "fashion_mnist"):
        mnist_files(tmp_path)
        extra = [f"dataset.root={tmp_path}", "dataset.validation=5", "model.pieces=1"]
    if name == "cifar10":
        cifar10_files(tmp_path, monkeypatch)
        extra = [f"dataset.root={tmp_path}", "dataset.validation=5", "model.pieces=1"]
    folder = run(choice, *TWO_STEPS, *extra)
    losses = column(folder, "train/loss")
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    for stage in ("train", "val", "test"):
        for key in ("bits_per_dim", "kinetic", "jacobian", "nfe_forward"):
            assert column(folder, f"{stage}/{key}"), (stage, key)
    assert column(folder, "train/kinetic")[1] > 0  # measured whatever the λ


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["experiment=mnist"], {"reg": (0.01, 0.01), "method": "rk4", "gradient": "adjoint", "pieces": 10}),
        (["experiment=cifar10"], {"reg": (0.01, 0.03), "method": "rk4", "gradient": "adjoint", "pieces": 14}),
        (
            ["experiment=mnist_ffjord"],
            {"reg": (0.0, 0.0), "method": "dopri5", "gradient": "adjoint", "pieces": 10, "first_step": 0.01},
        ),
        (
            ["experiment=cifar10_ffjord"],
            {"reg": (0.0, 0.0), "method": "dopri5", "gradient": "adjoint", "pieces": 14, "first_step": 0.01},
        ),
        (
            ["dataset=cifar10", "reg.lambda_j=0.03"],
            # not an experiment of the paper's: the default solver, at first two steps between Radau's nodes
            {"reg": (0.01, 0.03), "method": "rk4", "gradient": "backprop", "pieces": 14, "step_size": 1 / 2},
        ),
    ],
)
def test_the_papers_runs_are_configured_as_the_paper_says(overrides, expected):
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    from rnode import Probes

    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        cfg = compose("config", overrides)
    solver = instantiate(cfg.solver)
    assert (cfg.reg.lambda_k, cfg.reg.lambda_j) == expected["reg"]
    assert (solver.train.method, solver.gradient) == (expected["method"], expected["gradient"])
    assert (solver.train.step_size, solver.train.rtol, solver.train.atol, solver.train.first_step) == (
        pytest.approx(expected.get("step_size", 0.25)),
        1e-5,
        1e-5,
        expected.get("first_step", 0.3),
    )
    assert (solver.test.method, solver.test.rtol, solver.test.atol) == ("dopri5", 1e-5, 1e-5)
    assert (cfg.dataset.batch_size, cfg.trainer.max_epochs, cfg.optimizer.lr) == (200, 100, 1e-3)
    flow = instantiate(cfg.model)(solver=solver, probes=Probes(cfg.divergence, cfg.probes))
    assert len(flow.pieces) == expected["pieces"]
    assert [layer.out_channels for layer in flow.pieces[0].field.layers[:-1]] == [64, 64, 64]


def test_trainer_yaml_has_every_option_of_lightnings_trainer_with_its_default():
    import inspect

    from pytorch_lightning import Trainer

    text = (cli.CONF / "trainer.yaml").read_text()
    ours = yaml.safe_load(text)
    theirs = {name: p.default for name, p in inspect.signature(Trainer.__init__).parameters.items() if name != "self"}
    assert ours.keys() - {"_target_", "on_divergence"} == theirs.keys() - {"logger", "callbacks", "default_root_dir"}
    changed = {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}
    for name in changed - {"enable_checkpointing", "enable_progress_bar"}:  # null there means true
        assert any(line.startswith(f"{name}:") and "#" in line for line in text.splitlines()), name


def test_help_lists_groups_options_and_knobs_with_a_line_on_each():
    text = cli.help_text("train.py", "")
    for group in (path for path in cli.CONF.iterdir() if path.is_dir()):
        assert f"{group.name}=" in text
        for file in group.glob("*.yaml"):
            assert any(line.split()[:1] == [file.stem] and len(line.split()) > 3 for line in text.splitlines()), file
    for knob in (
        "reg.lambda_k",
        "reg.lambda_j",
        "solver.gradient",
        "optimizer.lr",
        "trainer.max_time",
        "wandb.mode",
        "divergence",
    ):
        assert any(line.split()[:1] == [knob] and len(line.split()) > 3 for line in text.splitlines()), knob
    epochs = yaml.safe_load((cli.CONF / "dataset" / "digits.yaml").read_text())["trainer"]["max_epochs"]
    assert f"[{epochs}]" in next(line for line in text.splitlines() if "trainer.max_epochs" in line)


def test_a_multirun_leaves_two_folders_and_two_wandb_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = [o for o in TWO_STEPS if not o.startswith("wandb")]
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "reg.lambda_k=0,0.1", *overrides, "hydra.sweep.dir=sweep"])
    cli.run(train.main, "train.py", "")
    folders = sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    assert len(folders) == 2
    values, runs = [], set()
    for folder in folders:
        values.append(yaml.safe_load((folder / "config.yaml").read_text())["reg"]["lambda_k"])
        runs |= {path.name for path in folder.glob("wandb/offline-run-*/*.wandb")}
        assert len(column(folder, "train/loss")) == 2
    assert values == [0, 0.1]
    assert len(runs) == 2


def test_resuming_goes_on_where_the_run_stopped(run):
    long = ["trainer.limit_train_batches=2", "trainer.max_steps=-1"]
    first = run(*TWO_STEPS, *long, "trainer.max_epochs=1", folder="first")
    second = run(*TWO_STEPS, *long, "trainer.max_epochs=2", f"ckpt_path={first / 'last.ckpt'}", folder="second")
    whole = run(*TWO_STEPS, *long, "trainer.max_epochs=2", folder="whole")
    assert [row["step"] for row in metrics(second) if row["train/loss"]] == ["2", "3"]
    ends = [torch.load(folder / "last.ckpt", weights_only=True) for folder in (second, whole)]
    assert [end["epoch"] for end in ends] == [1, 1]
    assert [end["global_step"] for end in ends] == [4, 4]


def evaluate(checkpoint, **changes):
    """Test bits/dim and its standard error of a checkpoint, by one process, the classes put together by hand."""
    from hydra.utils import instantiate
    from pytorch_lightning import Trainer

    from rnode import Probes
    from rnode.module import RNODE

    config = checkpoint["config"]
    flow = instantiate(config["model"])(solver=instantiate(config["solver"]), probes=Probes())
    module = RNODE(flow, optimizer=torch.optim.Adam, **config["reg"])
    module.load_state_dict(checkpoint["state_dict"])
    data = instantiate(config["dataset"], **changes)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (result,) = trainer.test(module, data, verbose=False)
    return [result["test/bits_per_dim"]], [result["test/bits_per_dim_se"]]


def test_a_trained_models_figures_are_those_of_its_checkpoint_whatever_the_batch(run):
    """trainer.test runs on the best weights: recomputed here from best.ckpt, they give the same bits/dim."""
    folder = run(*QUICK, "wandb.mode=disabled", "trainer.limit_train_batches=3", "dataset.eval_batch_size=100")
    checkpoint = torch.load(folder / "best.ckpt", weights_only=True)
    bits, error = evaluate(checkpoint, eval_batch_size=77)
    assert bits == pytest.approx(column(folder, "test/bits_per_dim"), abs=2e-5)
    assert error == pytest.approx(column(folder, "test/bits_per_dim_se"), abs=2e-5)


def test_validation_takes_nothing_from_trainings_random_stream(run):
    often = run(*TWO_STEPS, "trainer.max_steps=3", "trainer.val_check_interval=1", folder="often")
    never = run(*TWO_STEPS, "trainer.max_steps=3", folder="never")
    assert column(often, "train/loss") == column(never, "train/loss")


def test_warm_up_raises_the_learning_rate_linearly(run):
    folder = run(*TWO_STEPS, "warmup_steps=3", "trainer.max_steps=4", "optimizer.lr=1e-3")
    state = torch.load(folder / "last.ckpt", weights_only=True)["lr_schedulers"][0]
    assert state["last_epoch"] == 4
    assert state["_last_lr"] == [pytest.approx(1e-3)]


def test_decay_lowers_the_learning_rate_as_half_a_cosine(run):
    """After 3 of 4 steps (1 + cos 3π/4) / 2 is left, and nothing after the last; the warm-up multiplies it."""
    folder = run(*TWO_STEPS, "decay=true", "warmup_steps=7", "trainer.max_steps=4", "optimizer.lr=1e-3", folder="first")
    state = torch.load(folder / "last.ckpt", weights_only=True)["lr_schedulers"][0]
    assert state["_last_lr"] == [pytest.approx(0, abs=1e-12)]
    module = RNODE(make_flow((2,)), None, 0.0, 0.0, warmup_steps=7, decay=True)
    assert module.learning_rate_factor(3, 4) == pytest.approx(4 / 8 * (1 + math.cos(3 * math.pi / 4)) / 2)


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.precision=bf16-mixed"],
        ["trainer.precision=64-true"],
        ["solver.dtype=float64"],
        ["trainer.max_time=00:00:05:00"],
        ["trainer.accelerator=cpu", "trainer.devices=1"],
        ["solver.train.method=midpoint", "solver.gradient=checkpoint"],
        ["solver.train.method=bosh3", "solver.gradient=adjoint", "solver.train.rtol=1e-3", "solver.train.atol=1e-3"],
        ["divergence=rademacher", "probes=2"],
        ["model=mlp", "divergence=exact"],
        ["trainer.gradient_clip_val=1.0", "optimizer.weight_decay=1e-4"],
        ["trainer.fast_dev_run=true"],
        ["trainer.enable_checkpointing=false"],
        ["trainer.limit_val_batches=0"],
        ["trainer.log_every_n_steps=0"],
    ],
    ids=" ".join,
)
def test_options_pass_through(run, overrides):
    run(*TWO_STEPS, *overrides)


@pytest.mark.slow(reason="torch.compile takes half a minute")
def test_compile_says_what_it_cost_and_trains_as_without(run, capsys):
    toy = ["dataset=toy", *TWO_STEPS, "trainer.max_steps=3", "dataset.batch_size=16", "dataset.eval_batch_size=16"]
    plain = run(*toy, folder="plain")
    assert "compiled" not in capsys.readouterr().out
    compiled = run(*toy, "compile=true", folder="compiled")
    assert re.search(r"compiled: the first step took \d+ s", capsys.readouterr().out)
    np.testing.assert_allclose(column(compiled, "test/bits_per_dim"), column(plain, "test/bits_per_dim"), rtol=1e-5)


def test_a_density_trained_on_2d_data_integrates_to_one(run):
    from hydra.utils import instantiate

    from rnode import Probes

    folder = run(
        "dataset=toy",
        "dataset.name=moons",
        "trainer.max_steps=150",
        "model.hidden=32",
        *QUICK[1:],
        "wandb.mode=disabled",
    )
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    config = checkpoint["config"]
    flow = instantiate(config["model"])(solver=instantiate(config["solver"]), probes=Probes(config["divergence"]))
    flow.load_state_dict({key.removeprefix("flow."): value for key, value in checkpoint["state_dict"].items()})
    side = torch.linspace(-6, 6, 241)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        density = flow.eval().log_prob(grid).exp()
    points = torch.from_numpy(DENSITIES["moons"](2000, np.random.default_rng(5))).float()
    with torch.no_grad():
        gained = flow.log_prob(points).mean() - torch.distributions.Normal(0, 1).log_prob(points).sum(1).mean()
    assert gained > 0.3  # it has learnt something: at the start it was the standard normal
    assert density.sum() * (side[1] - side[0]) ** 2 == pytest.approx(1, abs=0.003)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["dataset=cifar11"], "no dataset/cifar11; the options are cifar10, digits"),
        (["solver=euler"], "no solver/euler; the options are auto, dopri5, radau, rk4, simpson"),
        (["experiment=imagenet"], "no experiment/imagenet"),
        (["solver.train.method=rk5"], "solver.train.method=rk5: must be one of euler"),
        (["trainer.max_epoch=3"], "no option trainer.max_epoch; did you mean trainer.max_epochs?"),
        (["reg.lambda=1"], "no option reg.lambda;"),
        (["lamda_k=1"], "no option lamda_k"),
        (["+lamda_k=1"], "no option lamda_k"),
        (["+reg.lamda_k=1"], "no option reg.lamda_k"),
        (["+dataset.validaton=1"], "validaton"),
        (["+trainer.max_epoch=1"], "max_epoch"),
        (["+pictures.sample=1"], "sample"),
        (["reg.lambda_k=-0.1"], "reg.lambda_k=-0.1: must be a number, 0 or more"),
        (["reg.lambda_j=nan"], "reg.lambda_j=nan: must be"),
        ([f"reg.lambda_j={10**30}"], "must be a number, 0 or more, at most"),
        (["trainer.detect_anomaly=3"], "trainer.detect_anomaly=3: must be true or false"),
        (["trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches=0: must be a whole number, 1 or more"),
        (["optimizer.weight_decay=true"], "optimizer: Boolean"),
        (["pictures=null"], "pictures=None: must be a section"),
        (["+model=int(3)"], "+model=int(3): "),
        (["solver.train.step_size=0.3"], "solver.train.step_size=0.3: must be a positive number that divides T = 1"),
        (["solver.train.step_size=0"], "solver.train.step_size=0: must be"),
        (["solver.test.rtol=0"], "solver.test.rtol=0: must be a positive number"),
        (["solver.train.atol=-1"], "solver.train.atol=-1: must be a positive number"),
        (["solver.gradient=forward"], "solver.gradient=forward: must be backprop or adjoint or checkpoint"),
        (["dataset.alpha=0.5"], "dataset.alpha=0.5: must be a number between 0 and 0.5"),
        (["dataset.shape=[1,9,9]"], "dataset.shape=[1, 9, 9]: model=multiscale halves"),
        (["dataset=toy", "model=multiscale"], "dataset.shape=[2]: must be [channels, height, width]"),
        (["dataset=toy", "dataset.name=moon"], "dataset.name=moon: must be one of eight_gaussians"),
        (["dataset=patches", "dataset.size=128"], "dataset.size=128: must be a whole number from 1 to 96"),
        (["divergence=hutchinson"], "divergence=hutchinson: must be gaussian or rademacher or exact"),
        (["seed=-1"], "seed=-1: must be a whole number"),
        (["optimizer.lr=-1"], "optimizer: Invalid learning rate: -1"),
        (["warmup_steps=1.5"], "warmup_steps=1.5: must be"),
        (["decay=0.5"], "decay=0.5: must be true or false"),
        (["compile=maybe"], "compile=maybe: must be true or false"),
        (["wandb.mode=on"], "wandb.mode=on: must be offline or online or disabled"),
        (["pictures.samples=0"], "pictures.samples=0: must be"),
        (["trainer.precision=bf17"], "bf17"),
        (["trainer.max_epochs=many"], "trainer.max_epochs=many: must be a whole number"),
        (["trainer.max_steps=1.5"], "trainer.max_steps=1.5: must be a whole number"),
        (["trainer.max_time=long"], "not a valid duration"),
        (["reg.lambda_j=[1"], "[1"),
        (["ckpt_path=nowhere.ckpt"], "ckpt_path=nowhere.ckpt: there is no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_gets_one_line(run, capsys, tmp_path, overrides, words):
    line, code = mistake(run, capsys, *overrides)
    assert words in line
    assert code == 2
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist", "cifar10"])
def test_data_that_are_not_there_and_cannot_be_had_get_one_line(run, capsys, tmp_path, monkeypatch, dataset):
    import urllib.request

    def no_network(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    for root in (tmp_path, tmp_path / "missing"):
        line, code = mistake(run, capsys, f"dataset={dataset}", f"dataset.root={root}", *TWO_STEPS)
        assert f"dataset.root={root}" in line
        assert "put its files there" in line
        assert code == 2


@pytest.mark.slow  # two processes that import everything
def test_two_processes_make_one_run(tmp_path):
    """DDP over gloo: one folder, one set of checkpoints, and every validation image counted once."""
    options = [o for o in TWO_STEPS if "limit_" not in o and "eval_batch" not in o]
    options += ["dataset.eval_batch_size=50", "model.pieces=1", "trainer.accelerator=cpu", "hydra.run.dir=run"]
    options += ["dataset.validation=151", "dataset.test=101"]  # neither is a multiple of two
    done = command(*options, "trainer.devices=2", "trainer.strategy=ddp", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert done.stdout.count("bits/dim (± standard error)") == 1
    (two,) = column(tmp_path / "run", "test/bits_per_dim")
    checkpoint = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    (one,), _ = evaluate(checkpoint)
    assert one == pytest.approx(two, abs=2e-5)


def test_truncated_data_get_one_line(run, capsys, tmp_path):
    mnist_files(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])
    line, code = mistake(run, capsys, "dataset=mnist", f"dataset.root={tmp_path}", "dataset.validation=5", *TWO_STEPS)
    assert str(path) in line
    assert code == 2


def test_checkpoints_that_do_not_fit_get_one_line(run, capsys, tmp_path):
    folder = run(*TWO_STEPS)
    good = (folder / "last.ckpt").read_bytes()
    damaged, elsewhere = tmp_path / "damaged.ckpt", functools.partial(run, folder="elsewhere")
    for content in (b"", b"not a checkpoint", good[: len(good) // 2], pickle.dumps({"a": os.system})):
        damaged.write_bytes(content)
        line, code = mistake(elsewhere, capsys, *TWO_STEPS, f"ckpt_path={damaged}")
        assert f"ckpt_path={damaged}: is damaged or not a checkpoint" in line
        assert code == 2
    torch.save({"state_dict": {}}, damaged)
    assert "carries no configuration" in mistake(elsewhere, capsys, *TWO_STEPS, f"ckpt_path={damaged}")[0]
    line, _ = mistake(run, capsys, *TWO_STEPS, "model.hidden=5", f"ckpt_path={folder / 'last.ckpt'}")
    assert "another architecture: model.hidden is 4 there and 5 here" in line
    line, _ = mistake(run, capsys, *TWO_STEPS, "dataset.alpha=0.01", f"ckpt_path={folder / 'last.ckpt'}")
    assert "on another data set: dataset.alpha is 1e-05 there and 0.01 here" in line


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.lr=1e15"], ["became NaN or infinite"]),
        (["optimizer.lr=1e15", "solver=dopri5"], ["underflowed"]),
        (["optimizer.lr=1e15", "solver=dopri5", "solver.gradient=adjoint"], ["underflowed"]),
        (["solver=dopri5", "solver.train.max_steps=1"], ["more than max_steps", "in piece 1 at"]),
    ],
)
def test_a_run_that_diverges_says_when_and_what_to_try(run, capsys, overrides, words):
    line, code = mistake(run, capsys, *TWO_STEPS, "trainer.max_steps=20", *overrides)
    assert all(word in line for word in words)
    assert re.search(r"piece \d+ .*at training step \d+; ", line)
    assert "try a smaller optimizer.lr" in line
    assert "last good checkpoint: none yet" in line
    assert code == 1


def test_divergence_keeps_the_last_good_checkpoint(run, capsys, tmp_path, monkeypatch):
    """The loss becomes NaN at the fifth step, in the third epoch: last.ckpt stays that of the second."""
    from rnode.module import RNODE

    healthy = RNODE.training_step

    def sick(self, batch, batch_idx):
        if self.global_step == 4:
            batch = batch._replace(y=batch.y * float("nan"))
        return healthy(self, batch, batch_idx)

    monkeypatch.setattr(RNODE, "training_step", sick)
    epochs = ["trainer.limit_train_batches=2", "trainer.max_steps=-1", "trainer.max_epochs=5"]
    line, code = mistake(run, capsys, *TWO_STEPS, *epochs, "trainer.log_every_n_steps=50")
    assert "z of piece 1 became NaN or infinite at training step 4" in line
    assert f"last good checkpoint: {tmp_path / 'run' / 'last.ckpt'}" in line
    assert code == 1
    for name in ("last", "best"):
        checkpoint = torch.load(tmp_path / "run" / f"{name}.ckpt", weights_only=True)
        assert checkpoint["global_step"] <= 4
        assert all(weight.isfinite().all() for weight in checkpoint["state_dict"].values())
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.parametrize(
    ("sick_runs", "factor"), [(1, 0.5), (3, 0.125), (4, None)], ids=["one rewind", "three rewinds", "one too many"]
)
def test_rewind_goes_back_to_the_last_checkpoint_with_half_the_learning_rate(
    run, capsys, tmp_path, monkeypatch, sick_runs, factor
):
    from rnode.module import RNODE

    healthy, count = RNODE.training_step, itertools.count(1)

    def sick(self, batch, batch_idx):
        if self.global_step == 3 and next(count) <= sick_runs:
            batch = batch._replace(y=batch.y * float("nan"))
        return healthy(self, batch, batch_idx)

    monkeypatch.setattr(RNODE, "training_step", sick)
    options = ["trainer.limit_train_batches=2", "trainer.max_steps=-1", "trainer.max_epochs=3", "warmup_steps=1"]
    options += ["trainer.on_divergence=rewind", "optimizer.lr=0.01"]
    if factor is None:
        with pytest.raises(SystemExit, match="1"):
            run(*TWO_STEPS, *options)
        *rewinds, line = capsys.readouterr().err.strip().splitlines()
        assert len(rewinds) == 3
        assert "z of piece 1 became NaN or infinite at training step 3; try" in line
        assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 2
        return
    folder = run(*TWO_STEPS, *options)
    assert capsys.readouterr().err.count("going back to step 2 with half the learning rate") == sick_runs
    end = torch.load(folder / "last.ckpt", weights_only=True)
    assert end["global_step"] == 6
    assert end["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.01 * factor)
    assert [int(row["step"]) for row in metrics(folder) if row["train/loss"]] == list(range(6))


def test_a_checkpoint_that_is_cut_short_leaves_the_one_before(tmp_path, monkeypatch):
    from rnode.checkpoint import AtomicCheckpointIO

    AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True) == {"step": 1}


def test_last_ckpt_is_the_last_epoch_even_if_it_is_not_the_best(run):
    epochs = ["trainer.limit_train_batches=2", "trainer.max_steps=-1", "trainer.max_epochs=4"]
    folder = run(*TWO_STEPS, *epochs, "optimizer.lr=0.3")
    last, best = (torch.load(folder / f"{name}.ckpt", weights_only=True) for name in ("last", "best"))
    values = column(folder, "val/bits_per_dim")
    assert last["epoch"] == 3
    assert best["epoch"] == values.index(min(values)) < 3


def test_the_training_grid_is_refined_only_where_a_finer_one_says_otherwise(run, monkeypatch):
    """solver=auto starts with two steps a piece, 8 evaluations; any difference at all, or none, is to count."""
    from rnode.callbacks import RefineGrid

    monkeypatch.setattr(RefineGrid, "EVERY_N_STEPS", 1)
    few = [*QUICK, "model.pieces=1", "solver=auto", "dataset.batch_size=32", "wandb.mode=disabled", "trainer.max_steps=4"]
    few += ["trainer.log_every_n_steps=1", "trainer.limit_test_batches=1", "trainer.max_epochs=1", "optimizer.lr=0.05"]
    never = column(run(*few, "refine=100", folder="never"), "train/nfe_forward")
    assert never == [24, 24, 24, 24]
    # At the first step f = 0, the same on every grid.
    always = column(run(*few, "refine=0", folder="always"), "train/nfe_forward")
    assert always[0] == 24
    assert always[-1] >= 48
    assert all(b in (a, 2 * a) for a, b in itertools.pairwise(always))
    again = run(*few, "refine=100", "trainer.max_steps=5", "trainer.max_epochs=2", "ckpt_path=auto", folder="always")
    assert column(again, "train/nfe_forward")[-1] >= 48  # the step is part of the checkpoint
    assert "refine" in yaml.safe_load((again / "config.yaml").read_text())
