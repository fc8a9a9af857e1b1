"""The command line: mistakes, help, checkpoint paths, bugs and exit codes."""

import re
import signal
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import rnode
from helpers import HANG, ROOT, TWO_STEPS, call, refused
from rnode.app import cli, evaluate, train
from rnode.app.help import known_keys
from rnode.app.report_error import describe_error
from rnode.app.schema import CONF
from rnode.errors import Diverged, InputError, Stopped, WriteError

MISTAKES = [
    # a group has no such option
    (
        "dataset=cifar11",
        "there is no dataset/cifar11; the options are celeba, cifar10, digits, emnist",
    ),
    ("hydra/launcher=pbs", "there is no hydra/launcher/pbs; pip install 'rnode[sweep]'"),
    # there is no such key
    ("trainer.max_epoch=3", "no option trainer.max_epoch; did you mean trainer.max_epochs?"),
    ("lamda_j=1", "no option lamda_j; did you mean reg.lambda_j?"),
    ("lr=1", "no option lr; did you mean optimizer.lr?"),
    ("epochs=3", "no option epochs; did you mean trainer.max_epochs?"),
    ("batch_size=3", "no option batch_size; did you mean dataset.batch_size?"),
    ("data=mnist", "no option data; did you mean dataset?"),
    ("channels=3", "no option channels; did you mean model.hidden?"),
    ("gpus=2", "no option gpus; did you mean trainer.devices?"),
    ("resume=run/last.ckpt", "no option resume; did you mean ckpt_path?"),
    ("dataset=mnist dataset.rot=1", "no option dataset.rot; did you mean dataset.root?"),
    ("trainer.detect_anomaly=true", "+trainer.detect_anomaly=… passes it to Lightning"),
    ("+lamda_k=1", "no option lamda_k"),
    ("+trainer.max_epoch=1", "trainer.max_epoch: Trainer has no such option"),
    ("+dataset.validaton=1", "validaton"),
    ("hydra.run.dirr=x", "hydra.run.dirr"),
    ("~reg.lambda_k", "reg.lambda_k=… is missing (λ_K, weight of the kinetic energy)"),
    ("dataset=table", "dataset.path=… is missing (file of a table: CSV"),
    (str(CONF), f"{CONF}: must be KEY=VALUE; that folder holds no checkpoint of a run"),
    # a type
    ("optimizer.lr=abc", "optimizer.lr=abc: must be a number"),
    ("reg.lambda_k=null", "reg.lambda_k=null: must be a number"),
    ("trainer.max_epochs=many", "trainer.max_epochs=many: must be a whole number"),
    ("decay=0.5", "decay=0.5: must be true or false"),
    ("dataset.shape=188", "dataset.shape=188: must be a list [a, b]"),
    # a range
    ("optimizer.lr=-1", "optimizer.lr=-1: must be at least 0"),
    ("reg.lambda_j=nan", "reg.lambda_j=nan: must be a finite number"),
    ("seed=99999999999", "seed=99999999999: must be at most 4294967295"),
    ("dataset.alpha=0.5", "dataset.alpha=0.5: must be less than 0.5"),
    ("solver.test.rtol=0", "solver.test.rtol=0: must be greater than 0"),
    ("trainer.devices=0", "trainer.devices=0: must be at least 1, text or a list"),
    ("trainer.limit_val_batches=1.5", "1.5: must be a whole number or a share, at most 1.0"),
    ("dataset.validation=1.0", "dataset.validation=1.0: must be a whole number from 1 on, or a"),
    ("dataset.validation=0", "dataset.validation=0: must be a whole number from 1 on, or a share"),
    ("trainer.max_time=5", "trainer.max_time=5: must be [DD:]HH:MM:SS"),
    # a choice
    ("trainer.precision=16-true", "trainer.precision=16-true: must be '32-true', 'bf16-mixed' or"),
    ("solver.train.method=rk5", "solver.train.method=rk5: must be 'euler' & 'rk4'"),
    ("divergence=hutchinson", "divergence=hutchinson: must be 'gaussian', 'rademacher' or"),
    ("trainer.on_divergence=go", "trainer.on_divergence=go: must be 'stop' or 'rewind'"),
    # a section
    ("pictures=null", "pictures= & : must be a section, whose keys are set as pictures.KEY=…"),
    ("solver.train=rk4", "solver.train=rk4: must be a section"),
    # values that do not go together
    ("solver.train.step_size=0.5", "step_size=0.5 and steps=2: give one of the two"),
    (
        "dataset.shape=[1,9,9]",
        "shape=[1, 9, 9]: the scales cannot halve 9×9; crop or pad the images, to 8×8",
    ),
    ("dataset=toy model=multiscale", "shape=[2]: must be [channels, height, width]"),
    ("dataset=toy dataset.name=moon", "name=moon: must be one of eight_gaussians, moons"),
    ("dataset=patches dataset.size=128", "size=128: must be at most 96"),
    # Hydra's grammar, and paths
    ("reg.lambda_j=[1", "[1"),
    ("seed=1,2", "--multirun"),
    ("seed=${nothing.here}", "nothing.here"),
    # errors of the classes that Hydra builds
    ("+trainer.overfit_batches=1.5", "trainer: You have passed invalid value 1.5 for overfit"),
    ("optimizer._target_=torch.optim.Adan", "Error loading 'torch.optim.Adan'"),
    ("+optimizer.momentum=1", "optimizer.momentum: Adam has no such option"),
    ("+model.width=8", "model.width: multiscale has no such option"),
    # files
    ("hydra.run.dir=/dev/null/run", "Not a directory: '/dev/null/run'"),
    ("ckpt_path=nowhere.ckpt", "ckpt_path=nowhere.ckpt: there is no such file"),
]


@pytest.mark.parametrize(("overrides", "words"), MISTAKES, ids=[text for text, _ in MISTAKES])
def test_a_mistake_gets_one_line(tmp_path, capsys, overrides, words):
    line, code = refused(capsys, "train", f"hydra.run.dir={tmp_path / 'run'}", *overrides.split())
    assert all(part in line for part in words.split(" & "))
    assert code == (1 if re.search("error.log|Errno", line) else 2)
    assert not list(tmp_path.rglob("*.ckpt"))
    run = tmp_path / "run"
    assert not run.is_dir() or list(run.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        *("train", "train dataset=mnist", "train model=mlp pretrain=flow_matching"),
        *("evaluate", "sample", "reproduce"),
    ],
)
def test_help_describes_every_group_option_and_key(capsys, arguments):
    command, *overrides = arguments.split()
    call(command, *overrides, "--help")
    lines = capsys.readouterr().out.splitlines()
    described = {line.split()[0].rstrip(":"): line.split()[1:] for line in lines if line}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose(command, overrides), throw_on_missing=False)
    keys = [key for key in known_keys(config) if not re.search(r"\._|\.source\b", key)]
    assert not [key for key in keys if len(described[key]) < 2]
    assert ("dataset.root" in keys) == (arguments in ("train dataset=mnist", "evaluate", "sample"))
    assert ("pretrain.share" in keys) == ("pretrain" in arguments)
    if command == "train":
        assert " ".join(described["optimizer.lr"]).startswith("learning rate [")
        assert f"[{config['trainer']['max_epochs']}]" in described["trainer.max_epochs"]
        for file in CONF.glob("*/*.yaml"):
            assert any(line.startswith(f"{file.parent.name}=") for line in lines), file
            assert len(described[file.stem]) > 3, file


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("optimizer.lr=abc", 2)])
def test_help_and_mistakes_import_no_torch_and_survive_a_closed_pipe(tmp_path, argument, code):
    command = [sys.executable, "-X", "importtime", ROOT / "src" / "train.py", argument]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True) as process:
        process.stdout.close()  # as `head -1` does after a line
        printed = process.stderr.read()
        assert process.wait(HANG) == code
    times = [line for line in printed.splitlines() if line.startswith("import time:")]
    imported = {line.split("|")[-1].strip() for line in times}
    assert "rnode.app.cli" in imported
    assert not imported & {"torch", "numpy", "pytorch_lightning", "matplotlib", "wandb"}
    others = [line for line in printed.splitlines() if line not in times]
    assert len(others) == (code != 0)


def test_the_command_lists_and_runs_its_commands(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for arguments in ([], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["rnode", *arguments])
        cli.main()
        assert re.findall(r"^  (\w+) ", capsys.readouterr().out, re.MULTILINE) == list(cli.ABOUT)
    monkeypatch.setattr(sys, "argv", ["rnode", "--version"])
    cli.main()
    assert capsys.readouterr().out == f"rnode {rnode.__version__}\n"
    monkeypatch.setattr(sys, "argv", ["rnode", "trian"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err == "error: there is no command trian\n"
    seeds = []
    monkeypatch.setattr(train, "main", lambda cfg: seeds.append(cfg.seed))
    for arguments in ([], ["seed=3"]):
        monkeypatch.setattr(sys, "argv", ["rnode", "train", *arguments])
        cli.main()
    assert seeds == [0, 3]


@pytest.mark.parametrize("path", ["best.ckpt", "a run/lr=0.1,λ='1'/best.ckpt"])
def test_the_bare_path_of_a_checkpoint_or_its_folder_stands_for_ckpt_path(
    tmp_path, monkeypatch, path
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).touch()
    given = []
    monkeypatch.setattr(evaluate, "main", lambda cfg: given.append((cfg.ckpt_path, cfg.seed)))
    call("evaluate", path, "seed=3")
    call("evaluate", "seed=3", f"{tmp_path / path}")
    call("evaluate", f"{(tmp_path / path).parent}", "seed=3")
    assert given == [(path, 3), *[(f"{tmp_path / path}", 3)] * 2]
    (tmp_path / path).with_name("last.ckpt").touch()
    monkeypatch.setattr(train, "main", lambda cfg: given.append(cfg.ckpt_path))
    call("train", f"{(tmp_path / path).parent}")
    assert given[-1] == f"{(tmp_path / path).with_name('last.ckpt')}"


def test_a_bug_gets_one_line_and_its_traceback_is_saved(tmp_path, capsys, monkeypatch):
    def build(cfg):
        raise KeyError("two\nlines")

    monkeypatch.setattr(train, "build", build)
    line, code = refused(capsys, "train", f"hydra.run.dir={tmp_path}", *TWO_STEPS)
    log = tmp_path / "error.log"
    assert line.startswith("error: KeyError: ")
    assert line.endswith(f"the traceback is in {log}")
    assert code == 1
    assert "Traceback" in log.read_text()
    assert "in build" in log.read_text()
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(KeyError):
        call("train", f"hydra.run.dir={tmp_path}", *TWO_STEPS)


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (InputError("levels=1:\n must be 2"), "levels=1: must be 2", 2),
        (Diverged("z became NaN"), "z became NaN", 1),
        (WriteError("x could not be written"), "x could not be written", 1),
        (FileNotFoundError(2, "No such file or directory", "x"), "No such file.*'x'", 1),
        (Stopped("by SIGTERM", signal.SIGTERM), "by SIGTERM", 143),
        (MemoryError("4 GB"), "not enough memory; try a smaller dataset.batch_size .*error.log", 1),
        (ZeroDivisionError("x" * 9999), "ZeroDivisionError: x{500}; the traceback is in", 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_exit_codes(tmp_path, monkeypatch, error, line, code):
    monkeypatch.chdir(tmp_path)  # error.log of an error outside a run is in outputs/
    described, exit_code = describe_error(error)
    assert re.search(line, described)
    assert exit_code == code
    assert (tmp_path / "outputs" / "error.log").exists() == ("error.log" in described)
