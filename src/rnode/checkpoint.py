"""Checkpoints: written whole or not at all; read as data alone, never code, and only for the flow that they fit."""

import contextlib
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from torch import Tensor

from rnode.errors import InputError, is_int, one_line
from rnode.files import whole_file

MOST_VALUES, DEEPEST = 10_000, 20  # of a configuration; a run's has some two hundred values, three levels deep
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CONTAINERS = (dict, list, tuple)
COUNTS = ("ready", "started", "processed", "completed", "_batches_that_stepped", "is_last_batch")  # of Lightning's loops
DATA = ("source", "name", "shape", "levels", "alpha")  # of a configuration's dataset, what says which data these are
STATE = {  # what a run goes on from
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "callbacks": dict,
    "epoch": int,
    "global_step": int,
}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file, to the disk, then renames: a name such as last.ckpt always holds a whole checkpoint.

    (Lightning's own writes to the temporary folder and moves, which between two disks is a copy that can be cut short.)
    Reads as `load_checkpoint` does, whatever Lightning asks for.
    """

    def save_checkpoint(self, checkpoint: dict, path: str, storage_options: object = None) -> None:
        with whole_file(Path(path)) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's for what the system refused
                raise OSError(one_line(error)) from error

    def load_checkpoint(self, path: str, map_location: object = None, weights_only: object = None) -> dict:
        return load_checkpoint(path)

    def remove_checkpoint(self, path: str) -> None:
        # A run writes over its own files. What it is to remove can only come out of a checkpoint that it goes on from.
        raise InputError(f"the checkpoint that this run goes on from would have it remove {path}")


def check_checkpoint(path: str, config: dict) -> int:
    """The training step of a checkpoint; InputError unless it is a whole one of a run with `config`'s model and data."""
    checkpoint = load_checkpoint(path)
    for section, what in (("model", "with another architecture"), ("dataset", "on another data set")):
        theirs, ours = checkpoint["config"].get(section), config[section]
        if not isinstance(theirs, dict):
            raise InputError(f"ckpt_path={path}: its configuration has no {section}")
        keys = DATA if section == "dataset" else theirs.keys() | ours.keys()
        differ = [
            f"{section}.{key} is {str(theirs.get(key))[:80]} there and {ours.get(key)} here"
            for key in sorted(keys, key=str)
            if theirs.get(key) != ours.get(key)
        ]
        if differ:
            raise InputError(f"ckpt_path={path}: was trained {what}: {'; '.join(differ)[:800]}")
    if wrong := unfit_state(checkpoint):
        raise InputError(f"ckpt_path={path}: cannot be gone on from: its {wrong}")
    return checkpoint["global_step"]


def load_checkpoint(path: str) -> dict:
    """The checkpoint's plain containers and tensors, on the CPU. Its configuration is nested plain values."""
    if not isinstance(path, str | Path) or not Path(path).is_file():
        raise InputError(f"ckpt_path={path}: there is no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes of a file lead a reader to
        reason = one_line(error)[:100]
        raise InputError(f"ckpt_path={path}: is damaged or not a checkpoint of a run of ours ({reason})") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("config"), dict):
        raise InputError(f"ckpt_path={path}: carries no configuration, so it is not a checkpoint of a run of ours")
    if not is_plain(checkpoint["config"]):
        raise InputError(f"ckpt_path={path}: its configuration is not text, numbers, lists and sections, as ours are")
    return checkpoint


def is_plain(value: object) -> bool:
    """Whether it is text, a number, true, false, null, or lists and dicts of those, neither too many nor too deep."""
    left, todo = MOST_VALUES, [(value, 0)]
    while todo:
        value, depth = todo.pop()
        left -= 1
        if left < 0 or depth > DEEPEST:
            return False
        if type(value) is dict:
            todo += [(part, depth + 1) for pair in value.items() for part in pair]
        elif type(value) is list:
            todo += [(part, depth + 1) for part in value]
        elif value is not None and type(value) not in (str, int, float, bool):
            return False
    return True


def flow_weights(checkpoint: dict, path: str) -> dict[str, Tensor]:
    """The flow's weights by name; InputError unless they are whole, finite tensors of one floating-point type."""
    found, prefix = checkpoint.get("state_dict"), "flow."
    found = found if isinstance(found, dict) else {}
    weights = {key.removeprefix(prefix): w for key, w in found.items() if str(key).startswith(prefix)}
    dtypes = {w.dtype for w in weights.values() if is_whole(w)}
    if len(dtypes) != 1 or not all(map(is_whole, weights.values())) or not dtypes <= set(FLOATS):
        raise InputError(f"ckpt_path={path}: its weights are not tensors of one floating-point type")
    if not all(w.isfinite().all() for w in weights.values()):
        raise InputError(f"ckpt_path={path}: its weights are not finite numbers")
    return weights


def is_whole(value: object) -> bool:
    """Whether it is a tensor whose numbers are all in memory, as none of a view that repeats itself are."""
    if type(value) is not Tensor or value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        return False
    return value.untyped_storage().nbytes() >= value.numel() * value.element_size()


def unfit_state(checkpoint: dict) -> str:
    """What of a checkpoint no run can go on from; nothing if all is well.

    Lightning looks at names and shapes of weights, RNODE at the optimizer's state.
    """
    for key, kind in STATE.items():
        value = checkpoint.get(key)
        if not isinstance(value, kind) or (kind is int and not is_int(value, at_least=0)):
            return f"{key} is missing or not what a run of ours writes"
    weights = list(checkpoint["state_dict"].values())
    if not all(is_whole(w) and w.isfinite().all() for w in weights):
        return "weights are not tensors of finite numbers"
    for key, value in entries(checkpoint["loops"]):
        container = isinstance(value, CONTAINERS) and key not in COUNTS
        if not container and not isinstance(value, bool) and not is_int(value, at_least=0):
            return "loops are not counts"
    if len(checkpoint["optimizer_states"]) != 1:
        return "optimizer_states are not those of one optimizer"
    for name, state in checkpoint["callbacks"].items():
        if str(name).startswith("ModelCheckpoint") and not fits_model_checkpoint(state):
            return "callbacks are not what a run of ours writes"
    return ""


def fits_model_checkpoint(state: object) -> bool:
    """Whether Lightning's ModelCheckpoint can go on from it: paths, and scores that it will compare."""

    def is_score(value: object) -> bool:
        return isinstance(value, Tensor) and is_whole(value) and value.dim() == 0 and value.is_floating_point()

    if not isinstance(state, dict) or not isinstance(state.get("best_k_models"), dict):
        return False
    paths = [state.get(f"{name}_path") for name in ("best_model", "kth_best_model", "last_model")]
    scores = [state.get("kth_value"), *state["best_k_models"].values()]
    best = state.get("best_model_score", "none")
    return (
        all(isinstance(path, str) for path in [*paths, *state["best_k_models"], state.get("dirpath")])
        and all(map(is_score, scores))
        and (best is None or is_score(best))
    )


def entries(value: dict | list | tuple) -> Iterator[tuple[object, object]]:
    """(key, part) of all in nested dicts, lists and tuples, each looked into once: they may hold one another."""
    todo, seen = [value], set()
    while todo:
        value = todo.pop()
        if id(value) not in seen:
            seen.add(id(value))
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                yield key, part
                if isinstance(part, CONTAINERS):
                    todo.append(part)


def leaves(value: dict | list | tuple) -> Iterator[object]:
    return (part for _, part in entries(value) if not isinstance(part, CONTAINERS))


@contextlib.contextmanager
def restoring(path: str | None) -> Iterator[None]:
    """Turn what Lightning says while it puts the state of the checkpoint `path` back into an InputError."""
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [frame.name for frame in frames if frame.filename.endswith("checkpoint_connector.py")]
        if not any(name.lstrip("_").startswith(("restore", "resume")) for name in theirs) or "ckpt_path=" in str(error):
            raise
        raise InputError(f"ckpt_path={path}: does not fit this run ({one_line(error)[:200]})") from error
