"""Checkpoints: written atomically, checked by CRC, and read as data, not code."""

import zipfile
from pathlib import Path

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from rnode.errors import InputError, one_line, require
from rnode.training.run_folder import whole_file

FORMAT = 5  # of a checkpoint's contents; format 4 had no bases


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, as Lightning does not between two disks, and checks them."""

    def save_checkpoint(self, checkpoint: dict, path: str, storage_options: object = None) -> None:
        with whole_file(Path(path)) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str, *args: object, **kwargs: object) -> dict:
        return load_checkpoint(path)


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint of this program's format onto the CPU; another file is an InputError."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # compares every CRC
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong CRC of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"ckpt_path={path}: there is no such file") from None
    except Exception as error:  # any error that the bytes of a file can cause
        reason = one_line(error)[:100]
        raise InputError(f"ckpt_path={path}: is damaged or not a checkpoint ({reason})") from None
    number = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    reads = f"this version of rnode reads format {FORMAT}; use the version that wrote it"
    require(number == FORMAT, f"ckpt_path={path}: has format {number or 'none'}, and {reads}")
    return checkpoint


def load_to_resume(path: str | Path, config: dict) -> dict:
    """Read the checkpoint of a run with the model and the optimizer of `config`."""
    checkpoint = load_checkpoint(path)
    for section, keys in (("model", config["model"]), ("optimizer", ["_target_"])):
        for key in keys:
            there, here = (part[section].get(key) for part in (checkpoint["config"], config))
            differs = f"{section}.{key} is {there} there and {here} here"
            same = f"a run resumes with the same {section}"
            require(there == here, f"ckpt_path={path}: {differs}; {same}")
    return checkpoint
