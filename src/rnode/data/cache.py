"""Images that were decoded once, in a file that later runs map into memory."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor


def cached(
    cache: str, name: str, made_from: Any, write: Callable[[Path], dict]
) -> tuple[Tensor, dict]:
    """Return the array that `write` puts into a .npy file, and the notes that it returns.

    The files are named by a hash of `made_from`. The first process writes them, and the others wait
    for it; later runs read them again. An interrupted process leaves no file that is taken for a
    whole one: the notes are written last.
    """
    digest = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
    folder = Path(cache).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    part, rows, notes = (folder / f"{name}-{digest}.{end}" for end in ("part", "npy", "json"))
    with FileLock(part.with_suffix(".lock")):
        if not notes.exists():
            try:
                written = write(part)
                os.replace(part, rows)
            finally:
                part.unlink(missing_ok=True)
            part.write_text(json.dumps(written), encoding="utf-8")
            os.replace(part, notes)
    # Copy on write: pages are read when they are needed, and the file stays as it is.
    array = torch.from_numpy(np.load(rows, mmap_mode="c"))
    return array, json.loads(notes.read_text(encoding="utf-8"))
