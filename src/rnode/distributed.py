"""Processes that share a computation through torch.distributed."""

import torch.distributed as dist


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank of this process and the number of processes: (0, 1) for a process alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_lists(part: list) -> list:
    """Concatenate the lists of all processes; every process must call this. Tensors: on the CPU."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return part
    parts: list[list] = [[] for _ in range(world_size)]
    dist.all_gather_object(parts, part)
    return [item for items in parts for item in items]
