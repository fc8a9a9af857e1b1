"""docs/own-field.md, followed to the letter."""

import re
import shlex
from pathlib import Path

import pytest

from helpers import ROOT, TWO_STEPS, call, metrics, refused

pytestmark = pytest.mark.usefixtures("blank_figures")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the page's files, in which the commands run."""
    page = (ROOT / "docs" / "own-field.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"```(python|yaml)\n(.*?)```", page, re.DOTALL))
    (tmp_path / "mynet.py").write_text(files["python"])
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "residual.yaml").write_text(files["yaml"])
    monkeypatch.chdir(tmp_path)
    return page


def test_a_field_of_the_users_own_trains_and_is_evaluated(folder, capsys):
    (train, evaluate) = re.findall("^    rnode (.*)$", folder, re.MULTILINE)
    small = [*TWO_STEPS, "dataset.train=8", "dataset.validation=4", "dataset.test=4"]
    small = [option for option in small if "hidden" not in option]
    call(*shlex.split(train), *small, "hydra.run.dir=run")
    command, _, trust = shlex.split(evaluate)
    untrusted, code = refused(capsys, command, "run/best.ckpt")
    assert "if it is yours, add trust=[mynet]" in untrusted
    assert code == 2
    call(command, "run/best.ckpt", trust, "hydra.run.dir=evaluation")
    (row,) = (row for row in metrics(Path("run")) if row.get("test/bits_per_dim"))
    text = Path("evaluation/evaluation.txt").read_text(encoding="utf-8")
    assert f"{float(row['test/bits_per_dim']):.4f}" in text
