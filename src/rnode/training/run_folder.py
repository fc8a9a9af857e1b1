"""The folder of a run: atomic files, its lock, and what its result depends on."""

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

import rnode
from rnode.errors import InputError, one_line, require

ENVIRONMENT = "environment.yaml"
PACKAGES = ("torch", "torchvision", "pytorch-lightning", "torchdiffeq", "numpy")


@contextlib.contextmanager
def whole_file(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file that replaces `path` once it is complete and on the disk; else `path` stays."""
    part = path.with_name(f"{path.name}.part")
    text = {"encoding": "utf-8", "newline": ""} if mode == "w" else {}
    try:
        with open(part, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise OSError(f"{path} could not be written ({one_line(error)})") from error


@contextlib.contextmanager
def lock(folder: Path, resumes: bool) -> Iterator[None]:
    """Lock a run folder until this process ends; only a run that `resumes` may find checkpoints."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            for path in (folder / "last.ckpt", folder / "best.ckpt"):
                require(
                    resumes or not path.exists(),
                    f"{path} is from an earlier run: ckpt_path=auto resumes that run, another "
                    "folder=… starts a new one",
                )
            yield
    except Timeout:
        raise InputError(
            f"{folder}: another run is using this folder; wait until it has ended, or give this "
            "run another folder=…"
        ) from None


def checkpoint_of(folder: str | Path, resumes: bool = False) -> Path:
    """Return the best.ckpt of a run folder, or else its last.ckpt, from which a run resumes."""
    best, last = (Path(folder) / name for name in ("best.ckpt", "last.ckpt"))
    if best.is_file() and not resumes:
        return best
    require(last.is_file(), f"{last if resumes else best}: there is no such checkpoint")
    if not resumes:
        print(f"{folder} has no best.ckpt: last.ckpt is used", file=sys.stderr)
    return last


def environment() -> dict[str, str]:
    """Return the machine, the versions and, of a checkout, the commit."""
    import torch  # --help and invalid arguments do not wait for it

    facts = {"python": platform.python_version(), "rnode": rnode.__version__}
    facts |= {name: version(name) for name in PACKAGES}
    facts["system"] = platform.platform()
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
    checkout = Path(__file__).parents[3]
    if (checkout / ".git").exists():
        command = ["git", "-C", checkout, "describe", "--always", "--dirty", "--abbrev=12"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # git is not installed
            facts["commit"] = subprocess.check_output(command, text=True).strip()
    return facts
