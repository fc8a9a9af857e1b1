"""Several processes that share a computation: what each takes, and how all come to have the whole."""

import torch.distributed as dist


def share() -> tuple[int, int]:
    """(rank, number of processes) of this one; (0, 1) if it is alone."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def gathered(part: list) -> list:
    """The lists of all processes, one after the other by rank. Every process must call it; tensors must be on the CPU."""
    _, world = share()
    if world == 1:
        return part
    parts: list[list] = [[] for _ in range(world)]
    dist.all_gather_object(parts, part)
    return [item for items in parts for item in items]
