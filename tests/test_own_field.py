"""docs/own-field.md and docs/own-data.md: files and commands of the user's own work as printed."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import rnode
from helpers import EPOCHS, ROOT, call, column, refused
from rnode import InputError

pytestmark = pytest.mark.usefixtures("blank_figures")


@pytest.mark.parametrize(
    ("page", "source", "config", "sizes"),
    [
        ("own-field", "mynet.py", "mine/model/residual.yaml", ["dataset.train=8"]),
        ("own-data", "mydata.py", "own/dataset/mine.yaml", ["model.hidden=4"]),
    ],
)
def test_a_class_of_the_users_own_is_called_when_trusted(
    monkeypatch, capsys, page, source, config, sizes
):
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which a command adds the working folder
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"```(python|yaml)\n(.*?)```", text, re.DOTALL))  # the last of each
    Path(source).write_text(files["python"])
    Path(config).parent.mkdir(parents=True)
    Path(config).write_text(files["yaml"])
    train, evaluate = re.findall("^    rnode (.*)$", text, re.MULTILINE)[-2:]
    small = [option for option in EPOCHS if "hidden" not in option] + sizes
    small += ["trainer.limit_test_batches=null", "dataset.eval_batch_size=1000"]
    call(*shlex.split(train), *small, "hydra.run.dir=run")
    command, _, trust = shlex.split(evaluate)
    for options in ([], ["--config-dir", config.split("/")[0]]):
        line = refused(capsys, command, *options, "run/best.ckpt")
        assert f"which conf/ does not name; if it is yours, add {trust}" in line
    with pytest.raises(InputError, match=source.removesuffix(".py")):
        rnode.load("run", trust=["my"])
    call(command, "run/best.ckpt", trust, "hydra.run.dir=evaluation")
    summary = json.loads(Path("evaluation/evaluation.json").read_text(encoding="utf-8"))
    (bits,) = column(Path("run"), "test/bits_per_dim")
    assert summary["bits_per_dim"] == pytest.approx(bits, abs=1e-5)
    density = rnode.load("run", trust=[source.removesuffix(".py")])
    assert density.log_prob(density.sample(2)).shape == (2,)
