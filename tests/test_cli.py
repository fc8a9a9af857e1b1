"""The command line: mistakes, help, checkpoint paths, bugs and exit codes."""

import re
import sys

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import rnode
from helpers import TRAIN, TWO_STEPS, call, process, refused
from rnode.app import cli, train
from rnode.app.exits import describe_error
from rnode.app.schema import COMMANDS, CONF, flatten
from rnode.errors import Diverged, InputError

MISTAKES = {
    "dataset=cifar11": "Could not find 'dataset/cifar11' Available options in 'dataset': arrays ",
    "-m dataset=digits,toy,cifar11": "Could not find 'dataset/cifar11' Available options",
    "-m hydra/launcher=joblob": "hydra/launcher/joblob",
    "trainer.max_epoch=3": "no option trainer.max_epoch; did you mean trainer.max_epochs?",
    "epochs=3": "no option epochs; did you mean trainer.max_epochs?",
    "trainer.detect_anomaly=true": "+trainer.detect_anomaly=… passes it on",
    "+lamda_k=1": "lamda_k=1: Extra inputs are not permitted",
    "dataset=table": "dataset.path=… is missing; --help describes it",
    "-m reg.lambda_k=interval(0,1) seed=x": "error: seed=x: Input should be a valid integer",
    "-m optimizer.lr=-1 seed=1,2": "optimizer.lr=-1: Input should be greater than or equal to 0",
    "reg.lambda_j=nan": "reg.lambda_j=nan: Input should be a finite number",
    "-m sweep_metrics=[val/nfe]": "sweep_metrics.0=val/nfe: Input should be 'val/bits_per_dim', ",
    "logger.wandb.mode=on": "logger.wandb.mode=on: Input should be 'offline', 'online' or",
    "dataset=patches dataset.size=9": "the scales cannot halve 9×9; use images of 8×8",
    "reg.lambda_j=[1": "error: reg.lambda_j=[1: & override_grammar",
    f"{CONF}": f"{CONF}/last.ckpt: there is no such checkpoint",
    "seed=1,2": "--multirun",
    "ckpt_path=nowhere.ckpt": "/nowhere.ckpt: there is no such file",
    "hydra.run.dir=/dev/null/run": "Not a directory: '/dev/null/run'",
    # errors of the classes that Hydra builds
    "+trainer.overfit_batches=1.5": "You have passed invalid value 1.5 for overfit",
    "optimizer._target_=torch.optim.Adan": "Error loading 'torch.optim.Adan'",
}


@pytest.mark.parametrize(("arguments", "words"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_gets_one_line(tmp_path, capsys, arguments, words):
    run = tmp_path / "run"
    code = 1 if "/dev/null" in arguments else 2
    line = refused(capsys, "train", f"hydra.run.dir={run}", *arguments.split(), code=code)
    assert all(part in line for part in words.split(" & "))
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    "arguments",
    ["train", "train dataset=mnist", "train dataset=table dataset.path=x.csv", "sample"],
)
def test_help_describes_every_group_option_and_key(capsys, arguments):
    command, *overrides = arguments.split()
    call(command, *overrides, "--help")
    lines = capsys.readouterr().out.splitlines()
    described = {line.split()[0].rstrip(":"): line.split()[1:] for line in lines if line}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose(command, overrides), throw_on_missing=False)
    keys = [key for key in flatten(config) if not re.search(r"\._|\.source\b", key)]
    assert all(described[key] for key in keys)
    assert not [key for key in described if re.search(r"\._|\.source$", key)]
    assert ("dataset.root" in keys) == (arguments in ("train dataset=mnist", "sample"))
    if command == "train":
        assert " ".join(described["optimizer.lr"]).startswith("learning rate [")
        assert f"[{config['trainer']['max_epochs']}]" in described["trainer.max_epochs"]
        assert " ".join(described["callbacks.save.every_n_steps"]).startswith("steps between")
        for file in CONF.glob("*/*.yaml"):
            assert f"{file.parent.name}=" in " ".join(lines)
            assert len(described[file.stem]) > 3, file


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("optimizer.lr=abc", 2)])
def test_help_and_mistakes_import_no_torch_and_write_nothing(tmp_path, argument, code):
    done = process(TRAIN[0], "-X", "importtime", TRAIN[1], argument)
    assert done.returncode == code
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "rnode.app.cli" in imported
    assert not imported & {"torch", "numpy", "pytorch_lightning", "matplotlib", "wandb"}
    assert not list(tmp_path.iterdir())


def test_the_configuration_of_a_command_line_is_printed_without_a_run(capsys, tmp_path):
    mine = tmp_path / "own" / "experiment" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("# @package _global_\ndataset:\n  size: 16\n")
    own = ["--config-dir", f"{tmp_path / 'own'}", "dataset=patches", "experiment=mine"]
    assert "no option sed; did you mean seed?" in refused(capsys, "train", *own, "sed=3")
    call("train", *own, "seed=3", "--cfg", "job", "--resolve")
    config = OmegaConf.create(capsys.readouterr().out)
    assert (config.dataset.size, config.dataset.seed) == (16, 3)
    assert "hydra" not in config
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_the_command_lists_and_runs_its_commands(monkeypatch, capsys):
    def rnode_command(*arguments):
        monkeypatch.setattr(sys, "argv", ["rnode", *arguments])
        cli.main()
        return capsys.readouterr().out

    for arguments in ([], ["--help"]):
        assert re.findall(r"(?m)^  (\w+) ", rnode_command(*arguments)) == list(COMMANDS)
    assert rnode_command("--version") == f"rnode {rnode.__version__}\n"
    with pytest.raises(SystemExit, match="2"):
        rnode_command("trian")
    assert capsys.readouterr().err.startswith("error: there is no command trian")
    seeds = []
    monkeypatch.setattr(train, "main", lambda cfg: seeds.append((cfg.seed, *sys.argv)))
    assert rnode_command("train").startswith("digits by a multiscale flow, solver=auto\nrun folder")
    rnode_command("train", "seed=3")
    assert seeds == [(0, "rnode", "train"), (3, "rnode", "train", "seed=3")]


@pytest.mark.parametrize("dataset", ["digits", "table"])
def test_a_model_of_ones_own_keeps_its_sizes_with_every_data_set(capsys, tmp_path, dataset):
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "model" / "mine.yaml").write_text("_target_: mynet.mine\nhidden: 7\n")
    own = ["--config-dir", f"{tmp_path / 'own'}", f"dataset={dataset}", "model=mine"]
    call("train", *own, "--cfg", "job")
    config = OmegaConf.create(capsys.readouterr().out)
    assert config.model == {"_target_": "mynet.mine", "hidden": 7}


def test_bare_paths_stand_for_keys(tmp_path):
    def expand(command, *overrides):
        return cli.expand(command, list(map(str, overrides)))

    folder = tmp_path / 'lr=0.1,λ="1"'
    folder.mkdir()
    with pytest.raises(InputError, match=r"/best.ckpt: there is no such checkpoint"):
        expand("evaluate", folder)
    (folder / "last.ckpt").touch()
    quoted = str(folder).replace('"', '\\"')
    assert expand("train", folder, "seed=3") == [f'ckpt_path="{quoted}/last.ckpt"', "seed=3"]
    assert expand("evaluate", folder) == [f'ckpt_path="{quoted}/last.ckpt"']
    (folder / "best.ckpt").touch()
    assert expand("evaluate", folder) == [f'ckpt_path="{quoted}/best.ckpt"']
    assert expand("sample", "a/b.ckpt", "context.a=1") == ["ckpt_path=a/b.ckpt", "++context.a=1"]
    assert expand("score", "ckpt_path=a.ckpt", "~id") == ["ckpt_path=a.ckpt", "~id"]
    assert expand("train", "folder='a b'") == ["hydra.run.dir='a b'", "hydra.sweep.dir='a b'"]
    assert expand("report", "a", folder, "b") == [f'folders=[a,"{quoted}",b]']


def test_a_bug_gets_one_line_and_its_traceback_is_saved(tmp_path, capsys, monkeypatch):
    def build(cfg, state):
        raise KeyError("two\nlines")

    monkeypatch.setattr(train, "build", build)
    line = refused(capsys, "train", f"hydra.run.dir={tmp_path}", *TWO_STEPS, code=1)
    log = tmp_path / "error.log"
    assert line.startswith("error: KeyError: ")
    assert line.endswith(f"the traceback is in {log}")
    assert "in build" in log.read_text()


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (InputError("levels=1:\n must be 2"), "levels=1: must be 2$", 2),
        (InputError("x" * 9999), "x{1000}$", 2),
        (Diverged("z became NaN"), "z became NaN$", 1),
        (RuntimeError("CUDA out of memory"), "try a smaller dataset.batch_size .*error.log", 1),
        (ZeroDivisionError("x" * 9999), "ZeroDivisionError: x{1000}; the traceback is in", 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_exit_codes(tmp_path, monkeypatch, error, line, code):
    monkeypatch.chdir(tmp_path)  # error.log of an error outside a run is in outputs/
    described, exit_code = describe_error(error)
    assert re.match(line, described)
    assert exit_code == code
    assert (tmp_path / "outputs" / "error.log").exists() == ("error.log" in described)
