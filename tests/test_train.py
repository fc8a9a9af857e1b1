"""Whole training runs, most of them in this process to save the imports."""

import itertools
import json
import math
import re
import urllib.request

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from pytorch_lightning import LightningModule

from helpers import (
    QUICK,
    TWO_STEPS,
    assert_same_run,
    call,
    cifar10_files,
    column,
    command,
    image_files,
    imagenet_files,
    make_flow,
    mnist_files,
    refused,
    svhn_files,
    wandb_records,
)
from rnode import Probes
from rnode.app.dashboard import make_view
from rnode.app.schema import CONF
from rnode.data.images import IDX_IMAGES
from rnode.training.module import RNODE
from rnode.training.solving import RefineGrid

pytestmark = pytest.mark.usefixtures("blank_figures")

EPOCHS = [*TWO_STEPS, "trainer.max_steps=-1", "trainer.limit_train_batches=2"]  # of two steps


def load(path):
    return torch.load(path, weights_only=True)


def test_the_default_run_as_a_user_starts_it(tmp_path):
    """A process, two epochs of the digits, and the files and the table that README promises."""
    sizes = ["trainer.max_epochs=2", "dataset.batch_size=64", "model.hidden=8", "model.pieces=1"]
    sizes += ["save_every_n_steps=15"]
    done = command(*sizes, "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "run"
    pictures, checkpoints = ["samples.png", "curves.png"], ["best.ckpt", "last.ckpt"]
    written = ("config.yaml", "metrics.csv", "result.json", "report.html", "environment.yaml")
    for name in (*written, *checkpoints, *pictures):
        assert (folder / name).stat().st_size > 0, name
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["shape"] == [1, 8, 8]  # resolved
    untrained = column(folder, "train/bits_per_dim")[0]
    assert untrained > 4.5
    assert column(folder, "val/bits_per_dim")[-1] < untrained - 1.5
    assert 1.5 < column(folder, "test/bits_per_dim")[0] < untrained - 1.5
    for text in ("bits/dim (± standard error)", "NFE backward per batch", "kinetic energy"):
        assert text in done.stdout
    lines = done.stdout.splitlines()
    assert lines[0] == "digits by a multiscale flow, hidden=8 layers=4 pieces=1, solver=auto"
    assert re.search(r"a step takes 24 NFE and .* s, an epoch .*, .* to go", done.stdout)
    saved = re.findall(r"^step (\d+): last.ckpt written$", done.stdout, re.MULTILINE)
    assert saved == ["15", "30"]
    best = [line for line in lines if re.match(r"epoch 2 of 2, step 40: validation \d", line)]
    assert best[0].endswith("bits/dim, the best so far")
    assert "test set, weights of epoch 2" in done.stdout
    assert list(folder.glob("wandb/offline-run-*/files/media/images/samples_*.png"))
    checkpoint = load(folder / "last.ckpt")
    assert (checkpoint["config"], checkpoint["epoch"]) == (config, 1)


def data_of(choice, root, monkeypatch):
    """Write the files that an option of a group reads, and return the overrides that name them."""
    root.mkdir()
    at = [f"dataset.root={root}", "model.pieces=1"]
    cache = [f"dataset.cache={root / 'cache'}"]
    if "mnist" in choice:
        named = IDX_IMAGES.get(choice.removeprefix("dataset=").upper(), IDX_IMAGES["MNIST"])
        mnist_files(root, named)
        return [*at, "dataset.validation=5"]
    if "cifar10" in choice:
        cifar10_files(root, monkeypatch)
        return [*at, "dataset.validation=5"]
    if "svhn" in choice:
        svhn_files(root, monkeypatch)
        return [*at, "dataset.validation=4"]
    if size := re.search(r"imagenet(\d+)", choice):
        imagenet_files(root, int(size[1]))
        return [*at, *cache, "dataset.validation=4"]
    if "patches" in choice:
        return ["dataset.size=8"]
    if "celeba" in choice or "folder" in choice:
        image_files(root / "img_align_celeba" if "celeba" in choice else root)
        return [*at, *cache, "dataset.size=8"]
    if re.search("dataset=(table|uci)|power|hepmass|miniboone|bsds300", choice):
        name = {"dataset=uci": "miniboone"}.get(choice, choice.split("=")[1])
        return uci_files(root, name)
    return []


def uci_files(root, name):
    (root / name).mkdir()
    rows = np.random.default_rng(0).normal(size=(90, 8))
    np.save(root / name / "data.npy", rows)
    if name == "table":
        return [f"dataset.path={root / name / 'data.npy'}"]
    if name == "bsds300":
        h5py = pytest.importorskip("h5py")
        with h5py.File(root / name / "BSDS300.hdf5", "w") as file:
            for part in ("train", "validation", "test"):
                file[part] = rows
    for part in ("train", "test") if name == "hepmass" else ():
        header = ",".join(["# label", *(f"f{i}" for i in range(7))])
        rows[:, 0] = np.arange(90) % 2
        path = root / name / f"1000_{part}.csv"
        np.savetxt(path, rows, delimiter=",", header=header, comments="")
    return [f"dataset.root={root}"]


def options():
    """Every option of every group, but loggers and tasks, which have tests of their own.

    Those of other groups than data sets and models differ in numbers alone, and some data sets
    are read as others are.
    """
    slow = pytest.mark.slow(reason="more than 40 runs of 2 seconds")
    alike = ("emnist", "kmnist", "qmnist", "fashion_mnist")
    alike += ("imagenet32", "imagenet64", "celeba", "uci")
    for f in sorted(CONF.glob("*/*.yaml")):
        if f.parent.name in ("logger", "task"):
            continue
        quick = f.parent.name in ("dataset", "model") and f.stem not in alike
        marks = () if quick else slow
        yield pytest.param(f"{f.parent.name}={f.stem}", marks=marks)


@pytest.mark.parametrize("choice", options())
def test_every_option_of_every_group_takes_two_steps(run, tmp_path, monkeypatch, choice):
    data = data_of(choice, tmp_path / "data", monkeypatch)
    one_path = ["model=mlp"] * (choice == "pretrain=flow_matching")
    folder = run(choice, *TWO_STEPS, *data, *one_path)
    losses = column(folder, "train/loss")
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    for stage in ("train", "val", "test"):
        for key in ("bits_per_dim", "kinetic", "jacobian", "nfe_forward"):
            assert column(folder, f"{stage}/{key}"), (stage, key)
    assert column(folder, "train/kinetic")[-1] > 0  # measured whatever the λ


def another(overrides):
    return pytest.param(overrides, marks=pytest.mark.slow(reason="a case like the others"))


@pytest.mark.parametrize(
    "overrides",
    [
        "trainer.precision=bf16-mixed divergence=rademacher probes=2",
        another(
            "trainer.precision=64-true solver.train.method=midpoint solver.gradient=checkpoint"
        ),
        "solver.dtype=float64 trainer.max_time=00:00:05:00 trainer.gradient_clip_val=1.0",
        "solver=dopri5 solver.train.method=bosh3 solver.gradient=adjoint solver.train.rtol=1e-3",
        "model=mlp divergence=exact +trainer.detect_anomaly=true",
        another("optimizer._target_=torch.optim.SGD +optimizer.momentum=0.9"),
        another("trainer.enable_checkpointing=false trainer.log_every_n_steps=0"),
        "trainer.limit_val_batches=0",
        "trainer.fast_dev_run=true",
    ],
)
def test_options_pass_through(run, overrides):
    folder = run(*TWO_STEPS, *overrides.split())
    without = re.search("checkpointing=false|fast_dev_run", overrides)
    assert (folder / "last.ckpt").exists() == (without is None)


@pytest.mark.parametrize(
    ("experiment", "reg", "method", "first_step", "pieces"),
    [
        ("mnist", (0.01, 0.01), "rk4", 0.3, 10),
        ("cifar10", (0.01, 0.03), "rk4", 0.3, 14),
        ("mnist_ffjord", (0, 0), "dopri5", 0.01, 10),
        ("cifar10_ffjord", (0, 0), "dopri5", 0.01, 14),
    ],
)
def test_the_papers_runs_have_its_settings(experiment, reg, method, first_step, pieces):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"experiment={experiment}"])
    solver = instantiate(cfg.solver)
    train, test = solver.train, solver.test
    assert (cfg.reg.lambda_k, cfg.reg.lambda_j) == reg
    assert (train.method, train.integrals, solver.gradient) == (method, "system", "adjoint")
    assert (train.step_size, train.steps, train.first_step) == (0.25, None, first_step)
    assert (test.method, test.integrals) == ("dopri5", "system")
    assert (train.rtol, train.atol, test.rtol, test.atol) == (1e-5,) * 4
    assert (cfg.dataset.batch_size, cfg.trainer.max_epochs, cfg.optimizer.lr) == (200, 100, 1e-3)
    flow = instantiate(cfg.model)(solver=solver, probes=Probes(cfg.divergence, cfg.probes))
    assert len(flow.pieces) == pieces
    assert [layer.out_channels for layer in flow.pieces[0].field.layers[:-1]] == [64, 64, 64]


def test_a_multirun_has_a_folder_and_a_wandb_run_for_each_job(tmp_path):
    overrides = [override for override in TWO_STEPS if not override.startswith("wandb")]
    call("train", "-m", "reg.lambda_k=0,0.1", *overrides, f"hydra.sweep.dir={tmp_path}")
    jobs = [tmp_path / "0", tmp_path / "1"]
    for folder, lambda_k in zip(jobs, (0, 0.1), strict=True):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["reg"]["lambda_k"] == lambda_k
        assert len(column(folder, "train/loss")) == 2
    assert len({path.name for path in tmp_path.glob("*/wandb/offline-run-*/*.wandb")}) == 2
    for folder, name in zip(jobs, ("reg.lambda_k=0", "reg.lambda_k=0.1"), strict=True):
        (records,) = wandb_records(folder).values()
        run = next(record.run for record in records if record.HasField("run"))
        assert (run.display_name, run.run_group) == (name, tmp_path.name)
        assert set(run.tags) == {"dataset=digits", "model=multiscale", "solver=auto"}
        defined = [record.metric for record in records if record.HasField("metric")]
        least = [metric for metric in defined if metric.name == "val/bits_per_dim"]
        assert least[0].summary.min
        items = (item for record in records for item in record.history.item)
        keys = {(item.key or "/".join(item.nested_key)).split("/_")[0] for item in items}
        scalars = ("lr", "gradient_norm", "nfe_total", "seconds_total")
        assert {"samples", "result", *(f"train/{name}" for name in scalars)} <= keys
    panels = json.dumps(make_view("team", "rnode")._to_model().model_dump(), default=str)
    shown = set(re.findall(r'"(?:summary:|run:)?((?:train|val)/\w+)"', panels))
    assert len(shown) == 7
    assert shown <= keys
    (records,) = wandb_records(tmp_path).values()
    run = next(record.run for record in records if record.HasField("run"))
    assert (run.display_name, run.run_group) == ("sweep", tmp_path.name)
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/sweep_*.json")
    table = json.loads(table.read_text())
    assert table["columns"][:3] == ["job", "reg.lambda_k", "status"]
    assert [row[:3] for row in table["data"]] == [["0", "0", "finished"], ["1", "0.1", "finished"]]


@pytest.mark.slow(reason="MLflow takes seconds to import")
def test_mlflow_holds_the_figures_of_metrics_csv(run, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="needs pip install mlflow")
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    folder = run(*TWO_STEPS[:-1], "logger=[csv,mlflow]", f"mlflow.tracking_uri='{address}'")
    mlflow.set_tracking_uri(address)
    runs = mlflow.search_runs(experiment_names=["rnode"])
    assert list(runs["tags.mlflow.runName"]) == [folder.name]
    expected = pytest.approx(column(folder, "val/bits_per_dim")[-1], rel=1e-6)
    assert runs["metrics.val/bits_per_dim"][0] == expected


@pytest.mark.slow(reason="TensorBoard takes seconds to import")
def test_tensorboard_holds_the_figures_of_metrics_csv(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run(*TWO_STEPS[:-1], "logger=tensorboard")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for name in ("train/bits_per_dim", "train/nfe_forward", "val/bits_per_dim"):
        values = [event.value for event in events.Scalars(name)]
        assert values == pytest.approx(column(folder, name), rel=1e-6)
    assert not (folder / "wandb").exists()


def test_a_resumed_run_ends_as_one_that_never_stopped(run):
    once = [*EPOCHS, "solver.train.steps=2", "warmup_steps=3", "refine=1e-9"]
    whole = run(*once, "trainer.max_epochs=3", folder="whole")
    folder = run(*once, "trainer.max_epochs=1")
    run(*once, "trainer.max_epochs=3", "ckpt_path=auto")
    assert_same_run(folder, whole)


def test_validation_takes_nothing_from_trainings_random_stream(run):
    often = run(*TWO_STEPS, "trainer.max_steps=3", "trainer.val_check_interval=1", folder="often")
    never = run(*TWO_STEPS, "trainer.max_steps=3", folder="never")
    assert column(often, "train/loss") == column(never, "train/loss")


def test_the_learning_rate_rises_linearly_and_falls_as_half_a_cosine(run, monkeypatch):
    folder = run(*EPOCHS, "warmup_steps=3", "decay=true", "optimizer.lr=1e-3")
    (state,) = load(folder / "last.ckpt")["lr_schedulers"]
    assert state["last_epoch"] == 2
    assert state["_last_lr"] == [pytest.approx(0, abs=1e-12)]  # 2 of 2 steps

    class Steps:
        estimated_stepping_batches, max_epochs = 8, -1

    monkeypatch.setattr(LightningModule, "trainer", Steps)
    options = {"lambda_k": 0.0, "lambda_j": 0.0, "warmup_steps": 3, "learning_rate_factor": 0.5}
    for decay in (False, True):
        module = RNODE(make_flow((2,)), torch.optim.Adam, **options, decay=decay)
        optimizers = module.configure_optimizers()
        rates = []
        for _ in range(8):
            rates.append(optimizers["optimizer"].param_groups[0]["lr"])
            optimizers["optimizer"].step()
            optimizers["lr_scheduler"]["scheduler"].step()
        rise = [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]
        fall = [(1 + math.cos(math.pi * step / 8)) / 2 if decay else 1 for step in range(8)]
        expected = [0.5e-3 * a * b for a, b in zip(rise, fall, strict=True)]
        assert rates == pytest.approx(expected)


@pytest.mark.slow  # torch.compile takes half a minute
def test_a_compiled_run_trains_as_an_uncompiled_one(run, capsys):
    batches = ["dataset.batch_size=16", "dataset.eval_batch_size=16"]
    toy = ["dataset=toy", *TWO_STEPS, "trainer.max_steps=3", *batches]
    plain = run(*toy, folder="plain")
    assert "compiled:" not in capsys.readouterr().out
    compiled = run(*toy, "compile=true", folder="compiled")
    assert re.search(r"compiled: step 1 took \d+ s", capsys.readouterr().out)
    bits = [column(folder, "test/bits_per_dim") for folder in (compiled, plain)]
    np.testing.assert_allclose(*bits, rtol=1e-5)


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist", "cifar10"])
def test_missing_or_truncated_data_get_one_line(capsys, tmp_path, monkeypatch, dataset):
    def no_network(*args, **kwargs):
        raise OSError("there is no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    path, words = tmp_path, "put the files there"
    if dataset == "mnist":
        mnist_files(tmp_path)
        path, words = tmp_path / "t10k-images-idx3-ubyte", ""
        path.write_bytes(path.read_bytes()[:-100])
    data = [f"dataset={dataset}", f"dataset.root={tmp_path}", "dataset.validation=5"]
    line, code = refused(capsys, "train", f"hydra.run.dir={tmp_path / 'run'}", *data, *TWO_STEPS)
    assert str(path) in line
    assert words in line
    assert code == 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("optimizer.lr=1e15", "piece 1 became NaN or infinite at training step 1"),
        ("optimizer.lr=1e15 solver=dopri5 solver.gradient=adjoint", "underflow"),
        ("solver=dopri5 solver.train.max_steps=1", "max_num_steps exceeded"),
    ],
)
def test_a_run_that_diverges_says_when_and_what_to_try(capsys, tmp_path, overrides, words):
    options = [*TWO_STEPS, "trainer.max_steps=20", *overrides.split()]
    line, code = refused(capsys, "train", f"hydra.run.dir={tmp_path}", *options)
    assert words in line
    assert re.search(r"piece \d+ .*at training step \d+; try a smaller optimizer.lr", line)
    assert line.endswith("last good checkpoint: none yet")
    assert code == 1


@pytest.mark.parametrize(
    ("times", "rewind"),
    [(1, False), (2, True), pytest.param(4, True, marks=pytest.mark.slow(reason="four runs"))],
)
def test_a_divergence_stops_the_run_or_rewinds_it(tmp_path, capsys, monkeypatch, times, rewind):
    """The batch of step 3, in the second epoch, is NaN the first `times` that it comes."""
    healthy, left = RNODE.training_step, iter(range(times))

    def sick(self, batch, batch_idx):
        if self.global_step == 3 and next(left, None) is not None:
            batch = batch._replace(y=batch.y * math.nan)
        return healthy(self, batch, batch_idx)

    monkeypatch.setattr(RNODE, "training_step", sick)
    options = ["trainer.max_epochs=3", "trainer.log_every_n_steps=50", "optimizer.lr=0.01"]
    options += ["trainer.on_divergence=rewind"] if rewind else []
    train = ["train", *EPOCHS, *options, f"hydra.run.dir={tmp_path}"]
    if times == 2:
        call(*train)
    else:
        with pytest.raises(SystemExit, match="1"):
            call(*train)
    lines = capsys.readouterr().err.strip().splitlines()
    diverged = "z of piece 1 became NaN or infinite at training step 3; "
    if times != 2:
        advice = lines.pop()
        assert advice.startswith(f"error: {diverged}try a smaller optimizer.lr")
        assert advice.endswith(f"last good checkpoint: {tmp_path / 'last.ckpt'}")
    back = f"{diverged}going back to step 2 with half the learning rate"
    assert lines == [back] * {1: 0, 2: 2, 4: 3}[times]  # a run goes back three times at most
    last, best = load(tmp_path / "last.ckpt"), load(tmp_path / "best.ckpt")
    assert last["global_step"] == (6 if times == 2 else 2)
    for checkpoint in (last, best):
        assert all(weight.isfinite().all() for weight in checkpoint["state_dict"].values())
    lr = last["optimizer_states"][0]["param_groups"][0]["lr"]
    assert lr == pytest.approx(0.01 / 4 if times == 2 else 0.01)


def test_last_ckpt_is_of_the_last_epoch_even_if_it_is_not_the_best(run):
    folder = run(*EPOCHS, "trainer.max_epochs=4", "optimizer.lr=0.3")
    values = column(folder, "val/bits_per_dim")
    assert load(folder / "last.ckpt")["epoch"] == 3
    assert load(folder / "best.ckpt")["epoch"] == values.index(min(values)) < 3


@pytest.mark.slow(reason="two runs of 158 steps")
def test_a_flow_that_exploits_the_error_of_its_grid_is_noticed(run, capsys):
    """With one node, the rule for l sees div f at t = 0 alone, which soon grows without bound.

    The entropy of the density is 0.71 bits/dim, less than which no flow can have.
    """
    toy = ["dataset=toy", "solver=radau", "solver.train.steps=1", "optimizer.lr=1.5e-2"]
    toy += ["dataset.batch_size=256", "trainer.max_steps=158", "trainer.log_every_n_steps=1"]
    toy += ["trainer.limit_val_batches=2", "trainer.limit_test_batches=1", "warmup_steps=0"]
    toy += ["trainer.enable_progress_bar=false", "wandb.mode=disabled", "pictures.samples=4"]
    gaps = []
    for refine in ("null", "2e-3"):
        folder = run(*toy, f"refine={refine}", folder=refine)
        train, val = (column(folder, f"{stage}/bits_per_dim") for stage in ("train", "val"))
        gaps.append(val[-1] - sum(train[-10:]) / 10)
        noticed = re.findall(r"step (\d+): a finer grid changes bits", capsys.readouterr().out)
    assert gaps[0] > 3
    assert abs(gaps[1]) < 0.3
    assert int(noticed[0]) <= 50


def test_the_training_grid_is_refined_where_a_finer_one_gives_another_likelihood(run, monkeypatch):
    """solver=auto starts with two steps a piece, 8 evaluations, in 3 pieces."""
    monkeypatch.setattr(RefineGrid, "EVERY_N_STEPS", 1)
    few = [*QUICK, "model.pieces=1", "dataset.batch_size=32", "wandb.mode=disabled"]
    few += ["trainer.log_every_n_steps=1", "trainer.limit_test_batches=1", "optimizer.lr=0.05"]
    few += ["trainer.limit_val_batches=1", "dataset.eval_batch_size=4"]
    four = [*few, "trainer.max_steps=4"]
    never = column(run(*four, "refine=100", folder="never"), "train/nfe_forward")
    assert never == [24, 24, 24, 24]
    # At the first step f = 0, the same on every grid.
    always = column(run(*four, "refine=0"), "train/nfe_forward")
    assert always[0] == 24
    assert always[-1] >= 48
    assert all(b in (a, 2 * a) for a, b in itertools.pairwise(always))
    more = ["trainer.max_steps=5", "trainer.max_epochs=2", "ckpt_path=auto"]
    again = column(run(*few, *more, "refine=100"), "train/nfe_forward")
    assert again[-1] == always[-1]  # the checkpoint has the steps of the grid
