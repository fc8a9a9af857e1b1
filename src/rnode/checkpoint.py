"""Reading checkpoints: data alone, never code, and only of the flow that asks for them."""

import pickle
from pathlib import Path

import torch

from rnode.errors import InputError


def check_checkpoint(path: str, config: dict) -> None:
    """Raise InputError unless `path` is a whole checkpoint of a run whose model is that of `config`."""
    theirs, ours = load_checkpoint(path)["config"]["model"], config["model"]
    differ = [
        f"model.{key} is {theirs.get(key)} there and {ours.get(key)} here"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key)
    ]
    if differ:
        raise InputError(f"ckpt_path={path}: was trained with another architecture: {'; '.join(differ)}")


def load_checkpoint(path: str) -> dict:
    """The checkpoint's plain containers and tensors, on the CPU."""
    if not Path(path).is_file():
        raise InputError(f"ckpt_path={path}: there is no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:100]
        raise InputError(f"ckpt_path={path}: is damaged or not a checkpoint of a run of ours ({reason})") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("config"), dict):
        raise InputError(f"ckpt_path={path}: carries no configuration, so it is not a checkpoint of a run of ours")
    return checkpoint
