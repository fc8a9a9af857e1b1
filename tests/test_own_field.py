"""docs/own-field.md: its files and commands work as printed."""

import json
import re
import shlex
from pathlib import Path

import pytest

from helpers import ROOT, TWO_STEPS, call, column, refused

pytestmark = pytest.mark.usefixtures("blank_figures")


def test_a_field_of_the_users_own_trains_and_is_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "own-field.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"```(python|yaml)\n(.*?)```", page, re.DOTALL))
    Path("mynet.py").write_text(files["python"])
    Path("mine/model").mkdir(parents=True)
    Path("mine/model/residual.yaml").write_text(files["yaml"])
    (train, evaluate) = re.findall("^    rnode (.*)$", page, re.MULTILINE)
    small = [*TWO_STEPS, "dataset.train=8", "dataset.validation=4", "dataset.test=4"]
    small = [option for option in small if "hidden" not in option]
    call(*shlex.split(train), *small, "hydra.run.dir=run")
    command, _, trust = shlex.split(evaluate)
    line, code = refused(capsys, command, "run/best.ckpt")
    assert "if it is yours, add trust=[mynet]" in line
    assert code == 2
    call(command, "run/best.ckpt", trust, "hydra.run.dir=evaluation")
    summary = json.loads(Path("evaluation/evaluation.json").read_text(encoding="utf-8"))
    (bits,) = column(Path("run"), "test/bits_per_dim")
    assert summary["bits_per_dim"] == pytest.approx(bits, abs=1e-5)
