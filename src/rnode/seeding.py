"""Seeds of random numbers, by what the numbers are for and not by what was sampled before.

Results then do not depend on the batch size, the order of the data or the number of devices, and a
resumed run needs no saved random state.
"""

import numpy as np
import torch
from torch import Tensor

NOISE, PROBES = 0, 1  # streams of a sample in evaluation: its dequantization noise, its probes


def sample_generators(index: Tensor, seed: int, stream: int) -> list[torch.Generator]:
    """One CPU generator per sample, seeded by (seed, stream, its position `index` (B,))."""
    seeds = (np.random.SeedSequence((seed, stream, i)).generate_state(1)[0] for i in index.tolist())
    return [torch.Generator().manual_seed(int(s)) for s in seeds]


def step_seed(seed: int, epoch: int, batch_idx: int, rank: int) -> int:
    """The seed of everything that one process samples in one training step."""
    sequence = np.random.SeedSequence((seed, epoch, batch_idx, rank))
    return int(sequence.generate_state(1, np.uint64)[0])
