"""The processes of a run: how torchrun or srun started them, and what they share."""

import logging
import os
import time
import warnings
from typing import NamedTuple

from omegaconf import DictConfig

from rnode.errors import require

MISLEADING_WARNINGS = (
    "Checkpoint directory .* exists and is not empty",  # train.log of this very run lies there
    "your dataloader is not resumable",  # a run resumes at the batch at which it stopped
    "Using `DistributedSampler` with the dataloaders",  # no sample is evaluated twice
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # in code of Lightning
    "AccumulateGrad node's stream",  # CUDA graphs are recorded on a stream of their own
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
    for key, value in (("devices", started.per_node), ("num_nodes", started.nodes)):
        overridden = any(text.lstrip("+").startswith(f"trainer.{key}=") for text in overrides)
        right = f"{value}, as {started.by} has started, or left out"
        require(
            not overridden or trainer[key] == value,
            f"trainer.{key}={trainer[key]}: must be {right}",
        )
        trainer[key] = value


def prepare_process() -> None:
    """Set what holds for a whole process. Must be called before Lightning and matplotlib load."""
    os.environ["MPLBACKEND"] = "Agg"  # a notebook's may not exist here, and none needs a display
    for library in (  # their lines repeat what the run prints, or advertise another logger
        "lightning_fabric.utilities.distributed",
        "pytorch_lightning.accelerators.cuda",
        "pytorch_lightning.utilities.rank_zero",
    ):
        logging.getLogger(library).setLevel(logging.WARNING)
    for message in MISLEADING_WARNINGS:
        warnings.filterwarnings("ignore", f".*{message}")
