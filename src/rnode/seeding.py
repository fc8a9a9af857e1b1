"""Seeds of random numbers, by what the numbers are for and not by what was sampled before.

Results then do not depend on the batch size, the order of the data or the number of devices, and a
resumed run needs no saved random state.
"""

import numpy as np
import torch
from torch import Tensor

NOISE, PROBES = 0, 1  # streams: flips and dequantization noise, and probes


def sample_generators(index: Tensor, seed: int, stream: int) -> list[torch.Generator]:
    """One CPU generator per sample, seeded by (seed, stream, its position `index` (B,))."""
    seeds = (np.random.SeedSequence((seed, stream, i)).generate_state(1)[0] for i in index.tolist())
    return [torch.Generator().manual_seed(int(s)) for s in seeds]


def step_generator(
    device: torch.device, seed: int, epoch: int, batch_idx: int, rank: int, stream: int
) -> torch.Generator:
    """The generator of a stream in one training step of one process."""
    sequence = np.random.SeedSequence((seed, epoch, batch_idx, rank, stream))
    return torch.Generator(device).manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
