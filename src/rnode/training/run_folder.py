"""The folder of a run: atomic files, its lock, its log, and what its result depends on."""

import contextlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, TextIO

from filelock import FileLock, Timeout

import rnode
from rnode.errors import InputError, WriteError, one_line, require

ENVIRONMENT = "environment.yaml"
PACKAGES = ("torch", "torchvision", "pytorch-lightning", "torchdiffeq", "numpy")


@contextlib.contextmanager
def whole_file(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file that replaces `path` once it is complete and on the disk, or raise WriteError."""
    part = path.with_name(f"{path.name}.part")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        kept = "the earlier file is intact" if path.exists() else "there is no earlier file"
        raise WriteError(f"{path} could not be written ({one_line(error)}); {kept}") from error


class Copy:
    """A stream whose lines also go to a file, without what draws a progress bar."""

    CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

    def __init__(self, stream: TextIO, file: TextIO):
        self.stream, self.file, self.line = stream, file, ""

    def write(self, text: str) -> int:
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            last = self.CONTROL.sub("", line).rstrip("\r").rsplit("\r", 1)[-1]
            if last.strip():
                print(last.rstrip(), file=self.file, flush=True)
        # A bar ends its line once an epoch; only its last state is kept until then.
        self.line = self.line[self.line.rstrip("\r").rfind("\r") + 1 :]
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def transcript(path: Path) -> Iterator[None]:
    """Append all further output and a final exception to the log file `path`."""
    with (
        open(path, "a", encoding="utf-8") as file,
        contextlib.redirect_stdout(Copy(sys.stdout, file)),
        contextlib.redirect_stderr(Copy(sys.stderr, file)),
    ):
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(OSError):  # the exception may be about a full disk
                print(f"{type(error).__name__}: {one_line(error)}", file=file, flush=True)
            raise


@contextlib.contextmanager
def lock(folder: Path, resumes: bool) -> Iterator[None]:
    """Lock a run folder until this process ends; only a run that `resumes` may find checkpoints."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            for path in (folder / "last.ckpt", folder / "best.ckpt"):
                require(
                    resumes or not path.exists(),
                    f"{path} is from an earlier run: ckpt_path=auto resumes that run, another "
                    "hydra.run.dir=… starts a new one",
                )
            yield
    except Timeout:
        raise InputError(
            f"{folder}: another run is using this folder; wait until it has ended, or give this "
            "run another hydra.run.dir=…"
        ) from None


def environment() -> dict[str, str]:
    """Return the machine, the versions and, of a checkout, the commit."""
    import torch  # --help and invalid arguments do not wait for it

    found = {"python": platform.python_version(), "rnode": rnode.__version__}
    found |= {name: version(name) for name in PACKAGES}
    found |= {"system": platform.platform(), "threads": str(torch.get_num_threads())}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    checkout = Path(__file__).parents[3]
    if (checkout / ".git").exists():
        command = ["git", "-C", checkout, "describe", "--always", "--dirty", "--abbrev=12"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # git is not installed
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found["commit"] = done.stdout.strip()
    return found
