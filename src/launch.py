"""Processes that torchrun or srun has started: how many they are, and the name of the run that they share."""

import os
import time
from typing import NamedTuple


class Launched(NamedTuple):
    """This process among those of a run."""

    by: str
    rank: int
    per_node: int
    nodes: int


def launched() -> Launched | None:
    """None where nobody but the user has started the process: then Lightning starts the others."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        world, per_node = int(env["WORLD_SIZE"]), int(env["LOCAL_WORLD_SIZE"])
        return Launched("torchrun", int(env["RANK"]), per_node, world // per_node)
    if "SLURM_PROCID" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):  # as Lightning sees it
        per_node = int(env.get("SLURM_NTASKS_PER_NODE", env.get("SLURM_NTASKS", "1")).split("(")[0])
        return Launched("srun", int(env["SLURM_PROCID"]), per_node, int(env.get("SLURM_NNODES", "1")))
    return None


def run_name() -> str:
    """What a run's folder is called unless the user says: the time, the same in every process of the run.

    Under SLURM it is the job's number, which a job keeps when it is requeued, with the step's where a job has several.
    """
    started = launched()
    if started is not None and started.by == "srun":
        step = os.environ.get("SLURM_STEP_ID", "0")
        return f"slurm-{os.environ['SLURM_JOB_ID']}" + (f".{step}" if step not in ("0", "") else "")
    now = time.time()
    name = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(now)) + f"-{int(now % 1 * 1e6):06d}"
    return name if started is None else agreed(name)


def agreed(value: str) -> str:
    """The `value` of whichever process of torchrun comes first; one that is started again later is told the same."""
    from torch.distributed import rendezvous

    store, _, _ = next(rendezvous("env://"))
    while hasattr(store, "underlying_store"):  # each attempt of torchrun has a part of its own
        store = store.underlying_store
    return store.compare_set("rnode/run_name", "", value).decode()


def settle(trainer, given: list[str]) -> None:
    """Set devices and num_nodes of the config `trainer` to the processes that are there.

    InputError if `given`, the overrides of the command line, ask for another number.
    """
    from rnode.errors import require

    started = launched()
    if started is None:
        return
    named = {override.split("=")[0].lstrip("+") for override in given}
    for key, value in (("devices", started.per_node), ("num_nodes", started.nodes)):
        name, asked = f"trainer.{key}", trainer[key]
        require(name not in named or asked == value, name, asked, f"{value}, as {started.by} has started, or left out")
        trainer[key] = value


def plugins() -> list:
    """For Lightning under srun: without its own requeueing, which writes a checkpoint beside last.ckpt."""
    from pytorch_lightning.plugins.environments import SLURMEnvironment

    started = launched()
    return [SLURMEnvironment(auto_requeue=False)] if started is not None and started.by == "srun" else []
