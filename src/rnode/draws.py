"""Random draws that belong to a sample or to a training step, whatever was drawn before."""

import numpy as np
import torch


def sample_generators(index: torch.Tensor, seed: int, stream: int) -> list[torch.Generator]:
    """One CPU generator for each sample, seeded by (seed, stream, index (B,) of the sample in its data set).

    What is drawn from them does not depend on the batch size, on the order of the data or on the number of devices.
    `stream` keeps uses apart: the dequantization noise of a sample from its probes.
    """
    seeds = (np.random.SeedSequence((seed, stream, i)).generate_state(1)[0] for i in index.tolist())
    return [torch.Generator().manual_seed(int(s)) for s in seeds]


def step_seed(seed: int, epoch: int, batch_idx: int, rank: int) -> int:
    """The seed of all that a process draws in a training step: a run that is gone on with needs no random state kept."""
    return int(np.random.SeedSequence((seed, epoch, batch_idx, rank)).generate_state(1, np.uint64)[0])
