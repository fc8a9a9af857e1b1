"""The processes of a run: how torchrun or srun started them, and what they share."""

import logging
import os
import warnings
from datetime import datetime

from omegaconf import DictConfig

MISLEADING_WARNINGS = (
    "Checkpoint directory .* exists and is not empty",  # the run's own files are there
    "The number of training batches .* is smaller than the logging interval",  # of small data
    "your dataloader is not resumable",  # a run resumes at the batch at which it stopped
    "Using `DistributedSampler` with the dataloaders",  # no sample is evaluated twice
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # in code of Lightning
    "AccumulateGrad node's stream",  # CUDA graphs are recorded on a stream of their own
)
QUIET_LOGGERS = (  # their lines repeat what the run prints, or advertise another logger
    "lightning_fabric.utilities.distributed",
    "pytorch_lightning.accelerators.cuda",
    "pytorch_lightning.utilities.rank_zero",
)


def launched() -> str | None:
    """Return torchrun or srun if it started this process; else Lightning starts the others."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    # srun alone sets SLURM_STEP_…; a shell or notebook in a job has other variables of SLURM.
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return "srun" if "SLURM_STEP_NUM_TASKS" in os.environ and not interactive else None


def match_processes(trainer: DictConfig) -> None:
    """Set `devices` and `num_nodes` to the processes that a launcher started."""
    if launched() == "torchrun":
        trainer.devices = int(os.environ["LOCAL_WORLD_SIZE"])
        trainer.num_nodes = int(os.environ["WORLD_SIZE"]) // trainer.devices
    elif launched() == "srun":
        trainer.num_nodes = int(os.environ["SLURM_STEP_NUM_NODES"])
        trainer.devices = int(os.environ["SLURM_STEP_NUM_TASKS"]) // trainer.num_nodes


def cluster_plugins() -> list:
    """Return plugins that say who starts the processes, where Lightning would guess wrong."""
    from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment

    if launched() == "srun":
        return [SLURMEnvironment(auto_requeue=False)]  # Lightning's requeueing writes other files
    return [LightningEnvironment()] if not launched() and SLURMEnvironment.detect() else []


def is_first_process() -> bool:
    """Return whether this process writes the files of the run."""
    ranks = ("RANK", "NODE_RANK", "LOCAL_RANK", "SLURM_PROCID")  # of torchrun, Lightning and srun
    return all(os.environ.get(name, "0") == "0" for name in ranks)


def run_name() -> str:
    """Return the default name of a run folder, equal in all processes: the time, or SLURM's job."""
    if launched() == "srun":
        step = os.environ["SLURM_STEP_ID"]
        return f"slurm-{os.environ['SLURM_JOB_ID']}" + ("" if step == "0" else f".{step}")
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    if launched() == "torchrun":  # the first process's; a restarted one gets it again
        from torch.distributed import TCPStore  # --help and mistakes do not wait for torch

        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        name = store.compare_set("rnode/run_name", "", name).decode()
    return name


def prepare_process() -> None:
    """Set what holds for a whole process. Must be called before Lightning and matplotlib load."""
    os.environ["MPLBACKEND"] = "Agg"  # a notebook's may not exist here, and none needs a display
    for library in QUIET_LOGGERS:
        logging.getLogger(library).setLevel(logging.WARNING)
    for message in MISLEADING_WARNINGS:
        warnings.filterwarnings("ignore", f".*{message}")
