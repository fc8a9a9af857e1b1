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
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
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
from rnode.data import cifar10, read_idx
from rnode.errors import InputError
from test_data import write_idx
from test_faults import SOURCE
from test_train import TWO_STEPS, cifar10_files

TIMES = int(os.environ.get("TIMES", "1"))
LIMITS = {"memory": 6 * 2**30, "seconds": 60, "network": False}  # a run takes a second and a few hundred MB
TINY = [*TWO_STEPS, "model.pieces=1", "save_every_n_steps=1"]
DATA = {
    "digits": ["dataset.test=12", "dataset.validation=12", "trainer.limit_train_batches=3"],
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
    st.sampled_from(
        ["abc", '""', "''", '"a b"', "x" * 3000, "/", "..", "~", "null", "true", "false", "cpu", "auto", "best"]
    ),
    st.sampled_from(
        ["ü", "λ=1", "a=b", "a:b", "01:00:00:00", "1,2", "a b", "#", "%", "!", "\\", "*", "<x>", "@", "\t", "\n"]
    ),
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
# A larger value of these asks for more work, as it should, and for more than is waited for here; or for other processes.
WORK = {"samples", "n", "trainer.devices", "trainer.num_nodes", "trainer.max_steps", "trainer.max_epochs", "compile"}
WORK |= {"trainer.limit_test_batches", "trainer.limit_val_batches", "trainer.fast_dev_run"}
NO_WORK = ["-1", "1", "0.5", "nan", "inf", "x", "null", "[]", "{}", "[1", "", "${seed}"]


@st.composite
def overrides(draw, script: str, most: int = 3) -> list[str]:
    found = []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, most]))):
        if draw(st.integers(0, 15)) == 0:
            found.append(draw(TEXTS.filter(lambda text: not text.startswith("-"))))  # those are flags of Hydra's
            continue
        key = draw(st.sampled_from(keys(script)))
        value = draw(VALUES)
        if key in WORK:
            value = draw(st.sampled_from(NO_WORK))
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

    def complaint(self, script: str, *arguments: str, keep: bool = False) -> str:
        """What a run did that it must not; nothing if all is well, and then its files are removed unless `keep`."""
        folder = self.folder / str(next(self.numbers))
        folder.mkdir()
        err, run = folder / "err", folder / "run"
        request = {
            "run": [*arguments, f"hydra.run.dir={run}"],
            "script": script,
            "err": str(err),
            "out": str(folder / "out"),
        }
        code = self.ask({"wait": self.ask(request | LIMITS)})
        self.ended[script, code] += 1
        lines = err.read_text().strip().splitlines()
        said = [line for line in lines if line.startswith(("error: ", "stopped: "))]
        self.latest = run
        if code == -signal.SIGALRM:
            return f"it still ran after {LIMITS['seconds']} s: {lines[-3:]}"
        if code not in (0, 1, 2) or "Traceback" in err.read_text():
            return f"exit code {code}: " + "\n".join(lines[-25:])
        if code != 0 and (len(said) != 1 or said[0] != lines[-1] or len(said[0]) > 2000):
            return f"exit code {code} and not one line at the end: " + "\n".join(lines[-25:])
        wrong = broken(run)
        if not wrong and not keep:
            shutil.rmtree(folder)
        return wrong


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


@pytest.fixture(scope="module")
def checkpoint(runner):
    """The file of a run of two steps."""
    assert runner.complaint("train", *TINY, *DATA["digits"], keep=True) == ""
    return runner.latest / "last.ckpt"


@cases(24)
@given(st.sampled_from(sorted(DATA)), overrides("train"))
def test_any_overrides_of_a_training(runner, data, overrides):
    assert runner.complaint("train", *TINY, *DATA[data], *overrides) == ""


@pytest.mark.parametrize("script", ["evaluate", "sample"])
@cases(8)
@given(st.data())
def test_any_overrides_of_what_reads_a_checkpoint(runner, checkpoint, script, data):
    few = ["samples=1", "pictures=2"] if script == "evaluate" else ["n=2"]
    given = data.draw(overrides(script))
    note(given)
    assert runner.complaint(script, f"ckpt_path={checkpoint}", *few, *given) == ""


# What stands in a file


@st.composite
def mutated(draw, content: bytes) -> bytes:
    """Bytes that have nothing to do with `content`, or that are it with something cut, turned over, put in or doubled."""
    for _ in range(draw(st.integers(1, 3))):
        i, j = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
        change = draw(st.sampled_from(["random", "truncate", "flip", "insert", "double", "remove", "overwrite"]))
        if change == "random":
            content = draw(st.binary(max_size=200))
        elif change == "truncate":
            content = content[:i]
        elif change == "flip" and i < len(content):
            content = content[:i] + bytes([content[i] ^ 1 << draw(st.integers(0, 7))]) + content[i + 1 :]
        elif change == "insert":
            content = content[:i] + draw(st.binary(min_size=1, max_size=20)) + content[i:]
        elif change == "double":
            content = content[:j] + content[i:j] + content[j:]
        elif change == "remove":
            content = content[:i] + content[j:]
        elif change == "overwrite":
            new = draw(st.binary(min_size=1, max_size=8))
            content = content[:i] + new + content[i + len(new) :]
    return content


tried = collections.Counter()


@contextlib.contextmanager
def works_or_refuses(kind: str):
    """The code inside must end soon, in little memory, well or with one line."""
    tried[kind] += 1
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, before[1]))
    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    try:
        yield
        tried[f"{kind}, taken"] += 1
    except InputError as error:
        if "\n" in str(error) or len(str(error)) > 1000:
            raise AssertionError(f"not one line: {error}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, before)


def no_network(*_, **__):
    raise OSError("there is no network in this test")


def stop(*_):
    raise TimeoutError("it takes too long")


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    print("\nfiles tried:", dict(sorted(tried.items())))


@pytest.mark.parametrize("ending", ["", ".gz"])
@cases(150)
@given(st.data())
def test_any_bytes_as_an_idx_file(tmp_path_factory, ending, data):
    path = tmp_path_factory.getbasetemp() / f"train-images-idx3-ubyte{ending}"
    write_idx(path, np.arange(9 * 28 * 28).reshape(9, 28, 28) % 251)
    content = path.read_bytes()
    if ending and data.draw(st.booleans()):  # a whole archive of something else
        content = gzip.compress(data.draw(mutated(gzip.decompress(content))))
    path.write_bytes(data.draw(mutated(content)))
    with works_or_refuses(f"IDX{ending}"):
        assert read_idx(path).dim() == 3


@cases(40)
@given(st.data())
def test_any_bytes_as_a_batch_of_cifar10(tmp_path_factory, data):
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(urllib.request, "urlopen", no_network)
        cifar10_files(Path(folder), patch)
        path = data.draw(st.sampled_from(sorted((Path(folder) / "cifar-10-batches-py").iterdir())))
        path.write_bytes(data.draw(mutated(path.read_bytes())))
        with works_or_refuses("CIFAR10"):
            cifar10(folder, validation=5)


@cases(150)
@given(st.data())
def test_any_bytes_as_a_checkpoint(checkpoint, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.ckpt"
    if data.draw(st.booleans()):
        content = checkpoint.read_bytes()
    else:  # other formats than the one that is written: torch's old one, and bare pickles
        buffer, whole = io.BytesIO(), load_checkpoint(checkpoint)
        if data.draw(st.booleans()):
            torch.save(whole, buffer, _use_new_zipfile_serialization=False)
        else:
            pickle.dump(whole["config"], buffer, protocol=data.draw(st.integers(0, 5)))
        content = buffer.getvalue()
    path.write_bytes(data.draw(mutated(content)))
    with works_or_refuses("checkpoint, bytes"):
        build.load_flow(str(path))


NONSENSE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from([10**12, 10**30, -1, 0, 2**31, 2**63, 1e300]),
    st.sampled_from(["", "x", "os.system", "rnode.flow.mlp", "rnode.data.toy", "${seed}", "???", "/", "x" * 5000, "a\nb"]),
    st.sampled_from(
        [{"_target_": "os.system", "_args_": ["true"]}, {"_target_": "rnode.solver.Method"}, {1: 2}, (), {}, []]
    ),
    st.lists(st.integers(-2, 100), max_size=4),
    st.sampled_from(
        [torch.zeros(3), torch.tensor(float("nan")), torch.zeros(2, 2).to_sparse(), torch.zeros(1, device="meta")]
    ),
)


@st.composite
def altered(draw, checkpoint: dict) -> tuple[dict, list]:
    """A checkpoint whose containers are as they were but for one to three places, and those places."""
    checkpoint, places = copy.deepcopy(checkpoint), []
    for _ in range(draw(st.integers(1, 3))):
        part, place = checkpoint, []
        while True:
            found = list(part) if isinstance(part, dict) else list(range(len(part)))
            key = draw(st.sampled_from(found)) if found else None
            deeper = key is not None and isinstance(part[key], dict | list) and len(part[key]) and draw(st.integers(0, 9))
            place.append(key)
            if not deeper:
                break
            part = part[key]
        change = draw(st.sampled_from(["replace", "replace", "remove", "add", "scale"]))
        if key is None or change == "add":
            if isinstance(part, dict):
                part[draw(st.sampled_from(["x", "_target_", "_args_", "flow.x", 3]))] = draw(NONSENSE)
            else:
                part.append(draw(NONSENSE))
        elif change == "remove":
            del part[key]
        elif change == "scale" and isinstance(part[key], torch.Tensor | int | float):
            part[key] = part[key] * draw(st.sampled_from([-1, 0, 1e10, 1e30, float("inf"), float("nan")]))
        else:
            part[key] = draw(NONSENSE)
        places.append((change, *place))
    return checkpoint, places


@pytest.mark.slow  # runs of three scripts
@pytest.mark.parametrize("script", ["train", "evaluate", "sample"])
@cases(8)
@given(st.data())
def test_any_content_of_a_checkpoint(runner, checkpoint, script, data):
    path = runner.folder / "altered.ckpt"
    whole = load_checkpoint(checkpoint)
    section = data.draw(st.sampled_from([None, "config"]))
    content, places = data.draw(altered(whole[section] if section else whole))
    note((section, places))
    torch.save(whole | {section: content} if section else content, path)
    few = {"evaluate": ["samples=1", "pictures=2"], "sample": ["n=2"]}
    few["train"] = [*TINY, *DATA["digits"], "trainer.max_steps=4", "trainer.max_epochs=2"]
    assert runner.complaint(script, f"ckpt_path={path}", *few[script]) == ""
