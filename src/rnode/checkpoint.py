"""Checkpoints: written whole or not at all; read as data alone, never code, and only for the flow that they fit."""

import pickle
from pathlib import Path

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from rnode.errors import InputError, one_line
from rnode.files import whole_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file, to the disk, then renames: a name such as last.ckpt always holds a whole checkpoint.

    (Lightning's own writes to the temporary folder and moves, which between two disks is a copy that can be cut short.)
    """

    def save_checkpoint(self, checkpoint: dict, path: str, storage_options: object = None) -> None:
        with whole_file(Path(path)) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's for what the system refused
                raise OSError(one_line(error)) from error


def check_checkpoint(path: str, config: dict) -> int:
    """The training step of a checkpoint; InputError unless it is a whole one of a run whose model is that of `config`."""
    checkpoint = load_checkpoint(path)
    theirs, ours = checkpoint["config"]["model"], config["model"]
    differ = [
        f"model.{key} is {theirs.get(key)} there and {ours.get(key)} here"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key)
    ]
    if differ:
        raise InputError(f"ckpt_path={path}: was trained with another architecture: {'; '.join(differ)}")
    return checkpoint["global_step"]


def load_checkpoint(path: str) -> dict:
    """The checkpoint's plain containers and tensors, on the CPU."""
    if not Path(path).is_file():
        raise InputError(f"ckpt_path={path}: there is no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        reason = one_line(error)[:100]
        raise InputError(f"ckpt_path={path}: is damaged or not a checkpoint of a run of ours ({reason})") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("config"), dict):
        raise InputError(f"ckpt_path={path}: carries no configuration, so it is not a checkpoint of a run of ours")
    return checkpoint
