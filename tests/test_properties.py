"""Whatever the command line or a file says: a run works, or ends with one line and exit code 1 or 2.

The suite tries few cases, always the same. TIMES=100 tries a hundred times as many, others each time:

    TIMES=100 pytest -n 0 -s tests/test_properties.py

-s shows how many were tried and how they ended.
"""

import collections
import contextlib
import copy
import functools
import gzip
import io
import itertools
import json
import math
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from omegaconf import DictConfig

import build
import cli
from rnode.checkpoint import load_checkpoint
from rnode.errors import InputError
from test_data import write_idx
from test_faults import SOURCE
from test_train import TWO_STEPS, cifar10_files

TIMES = int(os.environ.get("TIMES", "1"))
LIMITS = {"memory": 6 * 2**30, "seconds": 60, "network": False}  # a run takes a second and a few hundred MB
TINY = [*TWO_STEPS, "model.pieces=1", "save_every_n_steps=1"]
DATA = {
    "digits": ["dataset.test=1700", "dataset.validation=60"],
    "toy": ["dataset=toy", "dataset.train=40", "dataset.validation=20", "dataset.test=20", "model.layers=2"],
}


def cases(count):
    """How many cases a test tries."""
    return settings(
        max_examples=count * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# What stands on a command line


def dotted(config: DictConfig, above: str = "") -> list[str]:
    """The keys of all sections and of all values in them."""
    found = []
    for key in config:
        name = f"{above}{key}"
        found.append(name)
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none():
            found += dotted(node, f"{name}.")
    return found


@functools.cache
def keys(script: str) -> list[str]:
    """Of the configuration that a script's tiny run is made of, and of the groups it is chosen from."""
    overrides = [[*TINY, *data] for data in DATA.values()] if script == "train" else [[]]
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        configs = [compose("config" if script == "train" else script, o) for o in overrides]
    return sorted({key for config in configs for key in dotted(config)} | set(cli.groups(f"{script}.py")))


def misspelt(draw, key: str) -> str:
    i = draw(st.integers(0, len(key) - 1))
    letter = draw(st.sampled_from("abclxz_.0@/"))
    return draw(st.sampled_from([key[:i] + key[i + 1 :], key[:i] + letter + key[i:], key[:i] + letter + key[i + 1 :]]))


NUMBERS = st.one_of(
    st.sampled_from(["0", "-1", "1", "2", "3", "0.5", "-0.0", "1.0", "1e-30", "1e30", "1e400", "nan", "inf", "-inf"]),
    st.sampled_from(["1000000", str(10**12), str(2**31), str(2**32), str(2**63), str(2**64), str(10**30), str(-(10**30))]),
    st.integers(-5, 40).map(str),
    st.integers().map(str),
    st.floats().map(str),
)
TEXTS = st.one_of(
    st.sampled_from(["abc", '""', "''", '"a b"', "x" * 3000, "/", "..", "~", "null", "true", "false", "cpu", "auto", "best"]),
    st.sampled_from(["ü", "λ=1", "a=b", "a:b", "01:00:00:00", "1,2", "a b", "#", "%", "!", "\\", "*", "<x>", "@", "\t", "\n"]),
    st.sampled_from(["range(1,3)", "choice(1,2)", "glob(*)", "int(3)", "sort(2,1)", "f(x)", "${seed}", "${nothing.here}"]),
    st.sampled_from(["${oc.env:HOME}", "${now:%Y}", "${hydra:job.name}", "${", "${}", "???", "$", "${dataset}", "${.}"]),
    st.sampled_from(["[1", "{a:1", "]", "}", "[[[[]]]]", "{a:{b:[c]}}", "[1,,2]", "{1}", '"', "'", "(", ")", "", " "]),
    st.text("ab01.,:=[]{}\"'${}()-+~ü \\", max_size=8),
)
VALUES = st.recursive(
    NUMBERS | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]")
        | st.dictionaries(st.sampled_from(["a", "lr", "_target_", "0"]), inner, max_size=2).map(
            lambda items: f"{{{','.join(f'{key}:{value}' for key, value in items.items())}}}"
        )
    ),
    max_leaves=4,
)
# A larger value of these asks for more work, as it should, and for more than is waited for here.
WORK = {"samples", "n", "trainer.devices", "trainer.num_nodes"}


@st.composite
def overrides(draw, script: str, most: int = 3) -> list[str]:
    found = []
    for _ in range(draw(st.integers(1, most))):
        key = draw(st.sampled_from(keys(script)))
        value = draw(VALUES)
        if key in WORK:
            value = draw(st.sampled_from(["0", "-1", "1", "0.5", "nan", "inf", "x", "null", "[]", "{}", "true", "[1", ""]))
        if draw(st.integers(0, 7)) == 0:
            key = misspelt(draw, key)
        prefix = draw(st.sampled_from(["", "", "", "", "", "+", "++", "~"]))
        whole = prefix == "~" and draw(st.booleans())
        found.append(f"{prefix}{key}" if whole else f"{prefix}{key}={value}")
    return found


# A run, and what is wrong with how it ended


class Runner:
    def __init__(self, server: subprocess.Popen, folder: Path):
        self.server, self.folder, self.numbers = server, folder, itertools.count()
        self.ended = collections.Counter()

    def ask(self, request: dict) -> int:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def complaint(self, script: str, *arguments: str) -> str:
        """What a run did that it must not; nothing if all is well."""
        folder = self.folder / str(next(self.numbers))
        folder.mkdir()
        err, run = folder / "err", folder / "run"
        request = {"run": [*arguments, f"hydra.run.dir={run}"], "script": script, "err": str(err), "out": str(folder / "out")}
        code = self.ask({"wait": self.ask(request | LIMITS)})
        self.ended[script, code] += 1
        lines = err.read_text().strip().splitlines()
        said = [line for line in lines if line.startswith(("error: ", "stopped: "))]
        if code == -signal.SIGALRM:
            return f"it still ran after {LIMITS['seconds']} s: {lines[-3:]}"
        if code not in (0, 1, 2) or "Traceback" in err.read_text():
            return f"exit code {code}: " + "\n".join(lines[-25:])
        if code != 0 and (len(said) != 1 or said[0] != lines[-1] or len(said[0]) > 2000):
            return f"exit code {code} and not one line at the end: " + "\n".join(lines[-25:])
        return broken(run)


def broken(folder: Path) -> str:
    """The first file of a run folder that is half written."""
    for path in sorted(folder.rglob("*")):
        try:
            if path.suffix == ".ckpt":
                load_checkpoint(str(path))
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".npy":
                np.load(path)
            elif path.suffix in (".png", ".gif"):
                from PIL import Image

                with Image.open(path) as picture:
                    picture.load()
        except (OSError, ValueError) as error:
            return f"{path}: {error}"
        if path.suffix == ".part":
            return f"{path} is left"
    return ""


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    command = [sys.executable, Path(__file__).with_name("forked.py")]
    environment = os.environ | {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:
        runner = Runner(server, tmp_path_factory.mktemp("runs"))
        yield runner
        server.stdin.close()
    print("\nruns by script and exit code:", dict(sorted(runner.ended.items())))
