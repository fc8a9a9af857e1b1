"""Any command line and any file: a run succeeds, or ends with one line and exit code 1 or 2.

Each test tries the same few cases. This tries a hundred times as many, others each time:

    TIMES=100 pytest -n 0 tests/test_properties.py
"""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from helpers import TWO_STEPS, call
from rnode.app import density
from rnode.app.schema import CONF, flatten
from rnode.errors import InputError

TIMES = int(os.environ.get("TIMES", "1"))
TINY = [*TWO_STEPS, "model.pieces=1", "dataset.test=12", "dataset.validation=12"]
TOY = ["dataset=toy", "dataset.train=40", "model.layers=2"]
# By these keys a larger value asks for more work, or for other processes, as it should.
WORK = {"samples", "n", "devices", "num_nodes", "fast_dev_run", "max_steps", "max_epochs"}
WORK |= {"model.layers", "model.pieces", "model.hidden", "solver.train.steps", "solver.test.steps"}
WORK |= {f"limit_{stage}_batches" for stage in ("train", "val", "test")}
FEW = st.sampled_from(["-1", "1", "0.5", "nan", "x", "null", "[]", "{}", "[1", "", "${seed}"])
NUMBERS = "0 -1 1 2 0.5 -0.0 1e-30 1e30 nan inf 2147483648 1000000000000000000000000000000"
TEXTS = "abc / .. ~ null true cpu auto best ü a=b 01:00:00:00 1,2 # % * @ ??? [1 {a:1 ] ( [[[[]]]]"
GRAMMAR = "{a:{b:[c]}} range(1,3) choice(1,2) int(3) f(x) ${seed} ${nothing.here} ${ \" ' \\"
ATOMS = st.sampled_from([*NUMBERS.split(), *TEXTS.split(), *GRAMMAR.split(), "", " ", "x" * 3000])
ATOMS |= st.text("ab01.,:=[]{}\"'$()-+~ü \\\t\n", max_size=8)
VALUES = ATOMS | st.lists(ATOMS, max_size=3).map(lambda parts: f"[{','.join(parts)}]")


def cases(count):
    """How many cases a test tries."""
    more = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    return settings(max_examples=count * TIMES, derandomize=TIMES == 1, **more)


@st.composite
def overrides(draw, command, data):
    """One to three overrides, some of them misspelt or without a key."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose(command, data), throw_on_missing=False)
    groups = [path.name for path in CONF.iterdir() if path.is_dir()]
    keys = [*flatten(config), *(groups if command == "train" else ["solver"])]
    found = []
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(keys))
        value = draw(FEW if key.removeprefix("trainer.") in WORK else VALUES)
        change = draw(st.sampled_from([*["="] * 8, "letter", "bare", "+", "++", "~"]))
        if change == "letter":
            i, letter = draw(st.integers(0, len(key) - 1)), draw(st.sampled_from("ablz_.0@/"))
            key = key[:i] + letter + key[i + 1 :]
        prefix = change if change in ("+", "++", "~") else ""
        # What starts with - is a flag of Hydra.
        found.append(value.lstrip("-") if change == "bare" else f"{prefix}{key}={value}")
    return found


@pytest.mark.parametrize(("command", "options"), [("train", [*TINY, *TOY]), ("sample", ["n=2"])])
def test_any_overrides(tmp_path, tiny_run, capsys, monkeypatch, command, options):
    monkeypatch.setattr("urllib.request.urlopen", None)  # downloads fail
    if command != "train":
        options = [f"ckpt_path={tiny_run / 'last.ckpt'}", *options]

    @cases(3)
    @given(overrides(command, [option for option in options if option == "dataset=toy"]))
    def check(overrides):
        folder = Path(tempfile.mkdtemp(dir=tmp_path)) / "run"
        code = 0
        try:
            call(command, *options, *overrides, f"hydra.run.dir={folder}")
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr().err
        lines = printed.strip().splitlines()
        assert code in (0, 1, 2), printed
        assert "Traceback" not in printed
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:] * (code != 0)
        assert max(map(len, lines), default=0) < 2000
        shutil.rmtree(folder.parent)

    check()


@st.composite
def damaged(draw, content):
    """Bytes of which parts were removed, doubled or replaced, and others inserted."""
    for _ in range(draw(st.integers(1, 3))):
        i, j = draw(st.tuples(*[st.integers(0, len(content))] * 2))
        content = content[:i] + draw(st.binary(max_size=20)) + content[j:]
    return content


def test_any_bytes_as_a_checkpoint(tmp_path, tiny_run):
    path = tmp_path / "last.ckpt"

    @cases(60)
    @given(damaged((tiny_run / "last.ckpt").read_bytes()))
    def check(content):
        path.write_bytes(content)
        with contextlib.suppress(InputError):
            density.load(path)

    check()
