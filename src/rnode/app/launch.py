"""The processes of a run: how torchrun or srun started them, and what they share."""

import contextlib
import ctypes
import logging
import os
import time
import warnings
from typing import NamedTuple

from omegaconf import DictConfig

from rnode.errors import require

EXPECTED_WARNINGS = (  # of Lightning and torch, about choices that this program makes on purpose
    *("does not have many workers", "directory .* exists and is not empty", "LeafSpec"),
    *("number of training batches .* is smaller", "could not find the monitored key"),
    *("The dirpath has changed", "Using `DistributedSampler` with the dataloaders"),
    *("There is a wandb run already in progress", "The `srun` command is available"),
    *("your dataloader is not resumable", "AccumulateGrad node's stream"),
)


class Launched(NamedTuple):  # this process among those that torchrun or srun started
    by: str
    rank: int
    per_node: int
    nodes: int


def launched() -> Launched | None:
    """Return None if no launcher started this process; then Lightning starts the others."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        world, per_node = int(env["WORLD_SIZE"]), int(env["LOCAL_WORLD_SIZE"])
        return Launched("torchrun", int(env["RANK"]), per_node, world // per_node)
    # srun alone sets SLURM_STEP_…; a shell or notebook in a job has other variables of SLURM.
    if "SLURM_STEP_NUM_TASKS" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        nodes = int(env.get("SLURM_STEP_NUM_NODES", "1"))
        per_node = int(env["SLURM_STEP_NUM_TASKS"]) // nodes
        return Launched("srun", int(env["SLURM_PROCID"]), per_node, nodes)
    return None


def cluster_plugins() -> list:
    """Return plugins that say who starts the processes, where Lightning would guess wrong."""
    from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment

    started = launched()
    if started is None:  # with variables of SLURM Lightning would wait for processes of SLURM
        return [LightningEnvironment()] if SLURMEnvironment.detect() else []
    # Lightning's requeueing writes other files.
    return [SLURMEnvironment(auto_requeue=False)] if started.by == "srun" else []


def is_first_process() -> bool:
    """Return whether this process writes the files of the run."""
    started = launched()
    ranks = (os.environ.get(name, "0") for name in ("NODE_RANK", "LOCAL_RANK"))  # set by Lightning
    return all(rank == "0" for rank in ranks) if started is None else started.rank == 0


def run_name() -> str:
    """Return the default name of a run folder, equal in all processes: the time, or SLURM's job."""
    started = launched()
    if started is not None and started.by == "srun":
        step = os.environ.get("SLURM_STEP_ID", "0")
        return f"slurm-{os.environ['SLURM_JOB_ID']}" + ("" if step in ("0", "") else f".{step}")
    now = time.time()
    name = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(now)) + f"-{int(now % 1 * 1e6):06d}"
    return name if started is None else agree_on(name)


def agree_on(value: str) -> str:
    """Return the `value` of the first process of torchrun; a restarted process gets it again."""
    from torch.distributed import rendezvous  # --help and mistakes do not wait for torch

    store, _, _ = next(rendezvous("env://"))
    while hasattr(store, "underlying_store"):  # each attempt of torchrun has its own prefix
        store = store.underlying_store
    return store.compare_set("rnode/run_name", "", value).decode()


def match_processes(trainer: DictConfig, overrides: list[str]) -> None:
    """Set `devices` and `num_nodes` to the processes that a launcher started, or refuse others."""
    started = launched()
    if started is None:
        return
    given = {override.split("=")[0].lstrip("+") for override in overrides}
    for key, value in (("devices", started.per_node), ("num_nodes", started.nodes)):
        wrong = f"trainer.{key}" in given and trainer[key] != value
        right = f"{value}, as {started.by} has started, or left out"
        require(not wrong, f"trainer.{key}={trainer[key]}: must be {right}")
        trainer[key] = value


def prepare_process() -> None:
    """Silence expected warnings, and let glibc keep the memory that the next step needs again."""
    os.environ["MPLBACKEND"] = "Agg"  # a notebook's may not exist here, and none needs a display
    for library in (
        "lightning_fabric.utilities.distributed",
        "matplotlib.font_manager",
        "pytorch_lightning.accelerators.cuda",
        "pytorch_lightning.utilities.rank_zero",
    ):
        logging.getLogger(library).setLevel(logging.WARNING)
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", f".*{message}.*")
    with contextlib.suppress(AttributeError, OSError, TypeError):  # a system without mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
