"""The files of a run: each written whole or not at all, in a folder that one run at a time holds."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pytorch_lightning.utilities import rank_zero_only

from rnode.errors import InputError, WriteError, one_line


@contextlib.contextmanager
def whole_file(path: Path, mode: str = "wb") -> Iterator[IO]:
    """A file to write to that becomes `path` once it is on the disk: that name always holds a whole file.

    What the system refuses (a full disk, a folder that is not ours) is a WriteError.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, mode, newline=None if "b" in mode else "") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        reason = f"[Errno {error.errno}] {error.strerror}" if error.errno else one_line(error)[:100]
        kept = "the one written before is whole" if path.exists() else "there is none from before"
        raise WriteError(f"{path} could not be written ({reason}); {kept}") from error


def claim(folder: Path, ckpt_path: str | None) -> contextlib.ExitStack:
    """Hold a run folder for this process until it closes what is returned, or ends in whatever way.

    InputError if another run holds it, or if a run that does not go on from this folder would write over its checkpoints.
    Of the processes of one run only the first holds the folder. Where the file system knows no locks nobody is kept out.
    """
    held = contextlib.ExitStack()
    if rank_zero_only.rank > 0:
        return held
    file = held.enter_context((folder / ".lock").open("a+"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read() or "another run"
        held.close()
        other = "wait until it has ended, or give this run another hydra.run.dir=…"
        raise InputError(f"{folder}: {holder} is running in this folder; {other}") from None
    except OSError:  # NFS without its lock daemon, for example
        pass
    goes_on = ckpt_path == "auto" or (ckpt_path is not None and Path(ckpt_path).resolve().parent == folder.resolve())
    earlier = [path for path in (folder / "last.ckpt", folder / "best.ckpt") if path.exists()]
    if earlier and not goes_on:
        held.close()
        raise InputError(
            f"{earlier[0]} is there from an earlier run; ckpt_path=auto goes on with it, another hydra.run.dir=… starts anew"
        )
    with contextlib.suppress(OSError):  # on a full disk; what follows will say so, of a file that matters
        file.truncate(0)
        os.write(file.fileno(), f"process {os.getpid()} of {socket.gethostname()}".encode())
    return held
