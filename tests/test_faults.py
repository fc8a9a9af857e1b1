"""Runs that are interrupted, killed or broken, as real processes: what they leave, and that they go on from there."""

import csv
import errno
import fcntl
import functools
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from rnode.errors import InputError
from rnode.files import claim

SOURCE = str(Path(__file__).resolve().parent.parent / "src")
SMALL = [
    "model.hidden=4",
    "model.pieces=1",
    "dataset.batch_size=16",
    "dataset.eval_batch_size=20",
    "trainer.limit_train_batches=30",
    "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=2",
    "trainer.max_epochs=3",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "warmup_steps=5",
    "pictures.samples=4",
    "wandb.mode=disabled",
]

SLOW = pytest.mark.slow  # of a test whose first case takes as long


class Run:
    """A run of train.py as a process."""

    def __init__(self, server, folder, *overrides, **limits):
        self.server, self.folder = server, folder
        self.err = folder.with_name(f"{folder.name}.err")
        arguments = [*SMALL, f"hydra.run.dir={folder}", *overrides]
        self.pid = self.ask({"run": arguments, "err": str(self.err), **limits})

    def ask(self, request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def finish(self, code=0):
        """What it printed; fails unless it ends with this exit code."""
        ended = self.ask({"wait": self.pid})
        printed = self.err.read_text()
        assert ended == code, printed[-3000:]
        return printed

    def wait_for_step(self, step):
        """Until metrics.csv has a row of this training step."""
        deadline = time.monotonic() + 120
        while logged_step(self.folder) < step:
            assert time.monotonic() < deadline, self.err.read_text()[-3000:]
            time.sleep(0.01)


def logged_step(folder):
    """The training step of the last row of metrics.csv, -1 before there is one; in a moment, however long the file."""
    if not (folder / "metrics.csv").exists():
        return -1
    lines = (folder / "metrics.csv").read_text().splitlines()
    return int(lines[-1].split(",")[lines[0].split(",").index("step")])


@pytest.fixture(scope="module")
def start():
    """start(folder, *overrides) → Run."""
    command = [sys.executable, Path(__file__).with_name("forked.py")]
    environment = os.environ | {
        "PYTHONPATH": SOURCE,
        "OMP_NUM_THREADS": "1",
    }  # the same sums in the same order, however many cores are free
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:
        yield functools.partial(Run, server)
        server.stdin.close()


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def same(a, b, path=""):
    """Whether two values out of checkpoints are equal, to the bit; timings and folders do not count."""
    if isinstance(a, dict):
        ignored = {
            "config",
            "dirpath",
            "best_model_path",
            "last_model_path",
            "kth_best_model_path",
            "best_k_models",
            "seconds",
        }
        assert {str(key) for key in a} == {str(key) for key in b}, path
        for key in a.keys() - ignored:
            same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def curves(folder):
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows(folder)]


def assert_same_run(folder, whole):
    ends = [torch.load(f / "last.ckpt", weights_only=True) for f in (folder, whole)]
    keys = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "callbacks", "loops")
    same(*({key: end[key] for key in keys} for end in ends))
    bests = [torch.load(f / "best.ckpt", weights_only=True)["state_dict"] for f in (folder, whole)]
    same(*bests)
    assert curves(folder) == curves(whole)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    start(folder).finish()
    return folder


@pytest.mark.parametrize(
    ("step", "number"),
    [
        (40, signal.SIGTERM),
        pytest.param(3, signal.SIGINT, marks=SLOW),
        pytest.param(65, signal.SIGUSR1, marks=SLOW),
    ],
)
def test_a_signal_stops_a_run_and_it_goes_on_to_the_same_end(start, tmp_path, whole, step, number):
    folder = tmp_path / "run"
    run = start(folder)
    run.wait_for_step(step)
    os.kill(run.pid, number)
    printed = run.finish(code=128 + number)
    line = printed.strip().splitlines()[-1]
    assert line.startswith(f"stopped: by {number.name} after ")
    assert f"{folder / 'last.ckpt'}; to go on: python src/train.py model.hidden=4" in line
    assert "Traceback" not in printed
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] > step
    start(folder, "ckpt_path=auto").finish()
    assert_same_run(folder, whole)


def test_a_run_goes_on_from_the_end_of_an_epoch_to_the_same_end(start, tmp_path, whole):
    start(tmp_path / "run", "trainer.max_epochs=2").finish()
    start(tmp_path / "run", "ckpt_path=auto").finish()
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow  # thirty-one starts
def test_thirty_kills_leave_a_whole_checkpoint_each_and_the_run_comes_to_the_same_end(start, tmp_path):
    folder, random, found = tmp_path / "run", np.random.default_rng(0), [0]
    epochs = "trainer.max_epochs=8"
    for kill in range(30):
        run = start(folder, epochs, "ckpt_path=auto", "save_every_n_steps=1")
        if kill % 6 == 0:
            time.sleep(random.uniform(0, 1))
        else:
            wait_for_writings(folder, random.integers(1, 6))
        if kill % 3 == 0:  # the others are killed while they write
            time.sleep(random.uniform(0, 0.03))
        os.kill(run.pid, signal.SIGKILL)
        run.finish(code=-signal.SIGKILL)
        steps = [torch.load(path, weights_only=True)["global_step"] for path in folder.glob("*.ckpt")]
        found.append(max(steps, default=0))
    assert found == sorted(found)
    assert found[-1] > 25
    start(folder, epochs, "ckpt_path=auto").finish()
    start(tmp_path / "whole", epochs).finish()
    ends = [torch.load(f / "last.ckpt", weights_only=True) for f in (folder, tmp_path / "whole")]
    same(*(end["state_dict"] for end in ends))
    same(*(end["optimizer_states"] for end in ends))


def wait_for_writings(folder, count):
    """Until a checkpoint is being written after `count` others were."""
    before = modified(folder / "last.ckpt")
    written, deadline = set(), time.monotonic() + 60
    while len(written) < count or not (folder / "last.ckpt.part").exists():
        assert time.monotonic() < deadline
        written |= {modified(folder / "last.ckpt")} - {before}


def modified(path):
    return path.stat().st_mtime_ns if path.exists() else 0


def test_a_file_size_limit_gets_one_line_and_leaves_the_last_good_checkpoint(start, tmp_path):
    folder = tmp_path / "run"
    start(folder, "trainer.max_epochs=1").finish()
    before = (folder / "last.ckpt").read_bytes()
    printed = start(folder, "ckpt_path=auto", largest_file=len(before) // 2).finish(code=1)
    assert re.match(r"error: .*/(best|last).ckpt could not be written", printed.strip().splitlines()[-1])
    assert "Traceback" not in printed
    assert (folder / "last.ckpt").read_bytes() == before
    assert not list(folder.glob("*.part"))


def test_a_full_disk_gets_one_line_and_leaves_the_last_good_checkpoint(start, tmp_path):
    folder = tmp_path / "run"
    start(folder, "trainer.max_epochs=1").finish()
    before = (folder / "last.ckpt").read_bytes()
    (folder / "last.ckpt.part").symlink_to("/dev/full")
    printed = start(folder, "ckpt_path=auto").finish(code=1)
    line = printed.strip().splitlines()[-1]
    assert f"error: {folder / 'last.ckpt'} could not be written" in line
    assert "the one written before is whole" in line
    assert "Traceback" not in printed
    assert (folder / "last.ckpt").read_bytes() == before


def test_a_folder_that_cannot_be_made_gets_one_line(start, tmp_path):
    (tmp_path / "file").write_text("")
    run = start(tmp_path / "name", f"hydra.run.dir={tmp_path}/file/run")
    (line,) = run.finish(code=1).strip().splitlines()
    assert line.startswith("error: ")
    assert f"{tmp_path}/file" in line


FULL = [
    "metrics.csv",
    *(pytest.param(name, marks=SLOW) for name in ("config.yaml", "best.ckpt", "samples.png", "curves.png")),
]


@pytest.mark.parametrize("file", FULL)
def test_a_full_disk_gets_one_line_whatever_is_written(start, tmp_path, file):
    folder = tmp_path / "run"
    start(folder, "trainer.max_epochs=1").finish()
    before = (folder / file).read_bytes()
    (folder / f"{file}.part").symlink_to("/dev/full")
    printed = start(folder, "ckpt_path=auto", "pictures.every_n_epochs=1").finish(code=1)
    (line,) = printed.strip().splitlines()
    assert line.startswith(f"error: {folder / file} could not be written ([Errno 28] No space left on device)")
    assert "the one written before is whole" in line
    assert (folder / file).read_bytes() == before
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 30
    assert not list(folder.glob("*.part"))


@pytest.mark.slow  # three runs
def test_a_curve_that_cannot_grow_stops_the_run_and_is_gone_on_with(start, tmp_path, whole):
    """metrics.csv alone meets its limit, as nothing else is written."""
    folder = tmp_path / "run"
    start(folder, "trainer.max_epochs=1").finish()
    before = (folder / "last.ckpt").read_bytes()
    size = (folder / "metrics.csv").stat().st_size
    nothing_else = ["trainer.enable_checkpointing=false", "trainer.limit_val_batches=0"]
    printed = start(folder, "ckpt_path=auto", *nothing_else, largest_file=size + 500).finish(code=1)
    assert "Traceback" not in printed
    assert (
        printed.strip().splitlines()[-1]
        == f"error: {folder / 'metrics.csv'} could not be written ([Errno 27] File too large)"
    )
    assert (folder / "last.ckpt").read_bytes() == before
    start(folder, "ckpt_path=auto").finish()  # its last row is cut short
    assert curves(folder) == curves(whole)


def test_a_folder_that_becomes_read_only_gets_one_line_and_leaves_the_last_good_checkpoint(start, tmp_path):
    folder, epochs = tmp_path / "run", "trainer.max_epochs=100"
    run = start(folder, epochs, "save_every_n_steps=7", unprivileged=True)
    run.wait_for_step(31)
    folder.chmod(0o555)
    (line,) = run.finish(code=1).strip().splitlines()
    assert re.match(rf"error: {folder}/(best|last).ckpt could not be written \(.*Permission denied.*\); the one", line)
    step = torch.load(folder / "last.ckpt", weights_only=True)["global_step"]
    assert step >= 30
    (line,) = start(folder, epochs, "ckpt_path=auto", unprivileged=True).finish(code=1).strip().splitlines()
    assert re.match(rf"error: {folder}/.*Permission denied", line)
    folder.chmod(0o755)
    start(folder, f"trainer.max_steps={step + 2}", epochs, "ckpt_path=auto", unprivileged=True).finish()
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == step + 2


def logged_by_wandb(folder):
    """Of each offline run: its id, the training steps of its training rows, whether it was closed."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        records = [Record.FromString(data) for data in leveldb_records(path.read_bytes())]
        histories = [
            {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.HasField("history")
        ]
        steps = [history["trainer/global_step"] for history in histories if "train/loss" in history]
        yield path.stem.removeprefix("run-"), steps, any(record.HasField("exit") for record in records)


def leveldb_records(data):
    """The records of a .wandb file: LevelDB's log format, with 7 bytes of header."""
    position, record = 7, b""
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:  # a block's end is padded
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


@pytest.mark.slow  # two runs with W&B
def test_wandb_is_closed_by_a_signal_and_a_resumed_run_goes_on_with_the_same_curves(start, tmp_path, whole):
    folder = tmp_path / "run"
    run = start(folder, "wandb.mode=offline")
    run.wait_for_step(40)
    os.kill(run.pid, signal.SIGTERM)
    run.finish(code=128 + signal.SIGTERM)
    stopped_at = torch.load(folder / "last.ckpt", weights_only=True)["global_step"]
    ((name, steps, closed),) = logged_by_wandb(folder)
    assert steps == list(range(stopped_at))
    assert closed
    assert [int(row["step"]) for row in rows(folder) if "train/loss" in row] == steps
    start(folder, "wandb.mode=offline", "ckpt_path=auto").finish()
    first, second = logged_by_wandb(folder)
    assert first == (name, steps, True)
    assert second == (name, list(range(stopped_at, 90)), True)
    assert_same_run(folder, whole)


def test_what_wandb_cannot_write_is_said_in_one_line(start, tmp_path, whole):
    folder, small = tmp_path / "run", ["trainer.enable_checkpointing=false", "wandb.mode=offline"]
    run = start(folder, *small, largest_file=30_000)
    run.wait_for_step(60)
    os.kill(run.pid, signal.SIGTERM)  # it would draw larger files at its end
    printed = run.finish(code=128 + signal.SIGTERM)
    assert "Traceback" not in printed
    assert printed.count("W&B could not write all that was logged (file too large); metrics.csv has it") == 1
    assert curves(folder) == curves(whole)[: len(curves(folder))]


def test_two_runs_of_the_same_second_have_folders_of_their_own(start, tmp_path):
    pattern = f"hydra.run.dir={tmp_path}/${{run_name:}}"
    runs = [start(tmp_path / name, "trainer.max_epochs=1", pattern) for name in "ab"]
    for run in runs:
        run.finish()
    assert len([path for path in tmp_path.iterdir() if (path / "last.ckpt").exists()]) == 2


@pytest.mark.slow  # 550 steps
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_memory_and_open_files_stay_as_they_are_over_500_steps(start, tmp_path, gradient):
    """With validations, checkpoints and pictures every 50 steps, and W&B."""
    run = start(
        tmp_path / "run",
        "dataset=toy",
        "model=mlp",
        f"solver.gradient={gradient}",
        "trainer.limit_train_batches=50",
        "trainer.max_epochs=12",
        "pictures.every_n_epochs=1",
        "wandb.mode=offline",
    )
    resident, files = [], []
    for step in (52, 552):
        run.wait_for_step(step)
        status = Path(f"/proc/{run.pid}/status").read_text()
        resident.append(int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]))
        files.append(len(list(Path(f"/proc/{run.pid}/fd").iterdir())))
    run.finish()
    assert resident[1] < 1.02 * resident[0], resident
    assert files[0] == files[1]


def contents(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overrides", [[], pytest.param(["ckpt_path=auto"], marks=SLOW)], ids=["anew", "auto"])
def test_a_second_run_in_a_folder_is_refused_and_touches_nothing(start, tmp_path, whole, overrides):
    folder = tmp_path / "run"
    first = start(folder)
    first.wait_for_step(35)
    os.kill(first.pid, signal.SIGSTOP)
    before = contents(folder)
    second = start(tmp_path / "second", f"hydra.run.dir={folder}", "seed=1", *overrides)
    (line,) = second.finish(code=2).strip().splitlines()
    assert line.startswith(f"error: {folder}: process {first.pid} of ")
    assert line.endswith("is running in this folder; wait until it has ended, or give this run another hydra.run.dir=…")
    assert contents(folder) == before
    os.kill(first.pid, signal.SIGCONT)
    first.finish()
    assert_same_run(folder, whole)


@pytest.mark.slow  # three runs
def test_of_two_runs_started_at_once_in_one_folder_one_is_refused(start, tmp_path, whole):
    folder = tmp_path / "run"
    runs = [start(tmp_path / name, f"hydra.run.dir={folder}") for name in "ab"]
    assert sorted(run.ask({"wait": run.pid}) for run in runs) == [0, 2]
    assert_same_run(folder, whole)


@pytest.mark.slow  # three runs
def test_a_killed_run_leaves_its_folder_to_the_next(start, tmp_path, whole):
    run = start(tmp_path / "run", "save_every_n_steps=7")
    run.wait_for_step(40)
    os.kill(run.pid, signal.SIGKILL)
    run.finish(code=-signal.SIGKILL)
    start(tmp_path / "run", "ckpt_path=auto").finish()
    assert_same_run(tmp_path / "run", whole)


def test_a_new_run_does_not_write_over_an_earlier_ones_checkpoints(start, tmp_path, whole):
    before = contents(whole)
    elsewhere = tmp_path / "elsewhere.ckpt"
    elsewhere.write_bytes((whole / "last.ckpt").read_bytes())
    for overrides in ([], [f"ckpt_path={elsewhere}"]):
        (line,) = start(tmp_path / "run", f"hydra.run.dir={whole}", *overrides).finish(code=2).strip().splitlines()
        assert line.startswith(
            f"error: {whole / 'last.ckpt'} is there from an earlier run; ckpt_path=auto goes on with it, "
        )
        assert contents(whole) == before


def test_a_folder_is_held_by_one_alone_but_where_the_file_system_has_no_locks(tmp_path, monkeypatch):
    claimed = claim(tmp_path, None)
    with pytest.raises(InputError, match=f"process {os.getpid()} of .* is running in this folder"):
        claim(tmp_path, "auto")
    claimed.close()
    claim(tmp_path, None).close()

    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with claim(tmp_path, None), claim(tmp_path, None):
        assert (tmp_path / ".lock").exists()


@pytest.mark.slow  # two processes that import everything
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_of_two_dies_the_other_stops_with_one_line(tmp_path, victim):
    folder = tmp_path / "run"
    command = [sys.executable, f"{SOURCE}/train.py", *SMALL, f"hydra.run.dir={folder}", "trainer.devices=2"]
    command += ["trainer.strategy=ddp", "trainer.max_epochs=100", "save_every_n_steps=5"]
    with open(tmp_path / "err", "w") as err:
        main = subprocess.Popen(command, stdout=err, stderr=err)
    while not (folder / "last.ckpt").exists():
        assert main.poll() is None, (tmp_path / "err").read_text()[-3000:]
        time.sleep(0.1)
    (child,) = map(int, Path(f"/proc/{main.pid}/task/{main.pid}/children").read_text().split())
    os.kill((main.pid, child)[victim], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while main.poll() is None or alive(child):
        assert time.monotonic() < deadline, "the other process goes on"
        time.sleep(0.1)
    printed = (tmp_path / "err").read_text()
    assert "error: another process of this run has ended" in printed
    assert "Traceback" not in printed
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] > 0


def two_processes(folder, sick, *overrides):
    """Exit code and standard error of a run in two processes, the second of which is sick."""
    command = [sys.executable, Path(__file__).with_name("sick.py"), *SMALL, f"hydra.run.dir={folder}", "trainer.devices=2"]
    command += ["trainer.strategy=ddp", "trainer.max_epochs=2", "trainer.limit_train_batches=10", *overrides]
    environment = os.environ | {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1", "SICK": sick}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.returncode, done.stderr


@pytest.mark.slow  # two processes that import everything
def test_what_one_process_of_two_meets_stops_both_with_one_line(tmp_path):
    folder = tmp_path / "run"
    code, printed = two_processes(folder, "nan")
    (line,) = [line for line in printed.splitlines() if "error" in line]
    assert line.startswith("error: z of piece 1 became NaN or infinite at training step 12; try a smaller optimizer.lr")
    assert line.endswith(f"last good checkpoint: {folder / 'last.ckpt'}")
    assert code == 1
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 10


@pytest.mark.slow  # a run of two processes that starts four times
def test_what_one_process_of_two_meets_takes_both_back_and_on(tmp_path):
    """A NaN, a solver that gives up and one that does so in the gradient, one after the other."""
    rewind = ["trainer.on_divergence=rewind", "solver.gradient=checkpoint", "optimizer.lr=0.008"]
    code, printed = two_processes(tmp_path / "run", "nan forward backward", *rewind)
    assert code == 0, printed[-3000:]
    lines = [line for line in printed.splitlines() if "going back to step 10 with half the learning rate" in line]
    expected = (
        r"z of piece 1 became NaN or infinite at training step 12",
        r"more than max_steps .*in piece 1 at training step 12",
        r"step size underflowed .*in the gradient of piece 2 at training step 12",
    )
    for line, words in zip(lines, expected, strict=True):
        assert re.search(words, line)
    end = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert end["global_step"] == 20
    assert end["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.001)
    assert all(weight.isfinite().all() for weight in end["state_dict"].values())
    assert [int(row["step"]) for row in rows(tmp_path / "run") if "train/loss" in row] == list(range(20))


def alive(pid):
    """Whether it runs: not ended, nor waiting for its parent to notice that it has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
