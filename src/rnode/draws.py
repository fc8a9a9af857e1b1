"""Random draws that belong to a sample, not to the batch it happens to be in."""

import numpy as np
import torch


def sample_generators(index: torch.Tensor, seed: int, stream: int) -> list[torch.Generator]:
    """One CPU generator for each sample, seeded by (seed, stream, index (B,) of the sample in its data set).

    What is drawn from them does not depend on the batch size, on the order of the data or on the number of devices.
    `stream` keeps uses apart: the dequantization noise of a sample from its probes.
    """
    seeds = (np.random.SeedSequence((seed, stream, i)).generate_state(1)[0] for i in index.tolist())
    return [torch.Generator().manual_seed(int(s)) for s in seeds]
