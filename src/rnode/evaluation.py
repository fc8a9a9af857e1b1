"""Measures of a trained flow: likelihood with standard errors, cost, trajectories."""

import contextlib
import math
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from rnode.errors import Diverged
from rnode.flow import Flow, Solution
from rnode.loss import bits_per_dim
from rnode.seeding import NOISE, PROBES, sample_generators
from rnode.solver import Method
from rnode.transforms import Batch, Rows, Transform

GRIDS = (1, 2, 3, 4, 6, 8)  # steps of rk4; l, E and n integrated with z err least for their time
MEAN_TOLERANCE = 1e-3  # largest error of a grid in the mean
SAMPLE_TOLERANCE = 5e-3  # largest error of a grid for a sample
GRID_SAMPLES = 64  # samples by which a grid is chosen


class Measures(NamedTuple):
    """Values of each sample, (B,): bits/dim, and E and n per dimension; n may be NaN."""

    bits_per_dim: Tensor
    kinetic: Tensor
    jacobian: Tensor


def measure(flow: Flow, batch: Batch, solution: Solution) -> Measures:
    """The measures of a batch whose y was solved."""
    state = solution.state
    bits = bits_per_dim(solution.log_q + state.l, batch.log_det, flow.d)
    return Measures(bits, state.E / flow.d, state.n / flow.d)


def solve_and_measure(flow: Flow, batch: Batch, seed: int) -> tuple[Solution, Measures]:
    """Solve the flow once for a batch, with the probes that belong to each sample and `seed`."""
    solution = flow.solve(batch.y, batch.c, sample_generators(batch.index, seed, PROBES))
    return solution, measure(flow, batch, solution)


@contextlib.contextmanager
def agreeing_grid(flow: Flow, values: Callable[[], Tensor], count: int) -> Generator[str]:
    """Evaluate by the coarsest grid that agrees with dopri5, if the method is `auto`.

    `values` computes what has to agree, (B, …), of some of the `count` samples that follow. Its
    mean may differ by MEAN_TOLERANCE, and the root mean square of a sample by SAMPLE_TOLERANCE.
    Yields the method in words.
    """
    solver = flow.solver
    words = solver.test.method.replace("auto", "dopri5")

    @torch.no_grad()
    def values_by(method: Method) -> Tensor:
        flow.solver = replace(solver, test=method)
        result = values()
        return result.reshape(len(result), -1)

    try:
        if solver.test.method == "auto" and count > GRID_SAMPLES:
            exact = values_by(Method("dopri5"))
            for steps in GRIDS:
                error = values_by(Method("rk4", steps=steps)) - exact
                mean, worst = float(error.mean()), float(error.square().mean(1).max().sqrt())
                if abs(mean) <= MEAN_TOLERANCE and worst <= SAMPLE_TOLERANCE:
                    size = f"{mean:+.1e} in the mean and {worst:.1e} at most"
                    words = f"rk4 with {steps} step(s), which differs from dopri5 by {size}"
                    break
            else:
                flow.solver = solver
        yield words
    finally:
        flow.solver = solver


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of values (…, N) with weights (N,)."""
    return values @ (weights / weights.sum()).to(values)


def standard_error(values: Tensor, weights: Tensor) -> Tensor:
    """Standard error of the mean of independent values (N,) with weights (N,)."""
    deviations = values - weighted_mean(values, weights)
    return (deviations * (weights / weights.mean()).to(values)).std() / len(values) ** 0.5


def systematic(weights: Tensor, count: int) -> Tensor:
    """Indices (count,), ascending, among which each is as often as its weight (N,) says."""
    ends = weights.cumsum(0)
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.searchsorted(ends, places * ends[-1])


def importance_bound(bits: Tensor, d: int) -> Tensor:
    """Importance-weighted bound on −log₂ P(x) / d (Burda et al., 2016; Ho et al., 2019).

    bits/dim of K noises for each image of dimension d, (K, B) → (K, B): row k − 1 is
    −log₂(1/k Σ_{i ≤ k} p(x + u_i)) / d. In expectation it falls with k, to the discrete code
    length. The noises of an image must share their probes: the mean of exponentials takes an error
    of l that differs between them for likelihood.
    """
    nats = d * math.log(2)
    k = torch.arange(1, len(bits) + 1, device=bits.device, dtype=torch.float64)[:, None]
    return -((-nats * bits.double()).logcumsumexp(0) - k.log()) / nats


@torch.no_grad()
def evaluate(
    flow: Flow,
    transform: Transform,
    batches: Iterable[Rows],
    noises: int,
    seed: int,
    weights: Tensor | None = None,
) -> tuple[dict, dict[str, Tensor]]:
    """Measure everything that is reported about a flow on a split, whatever the batch size.

    Args:
        flow: the flow, in evaluation mode.
        transform: from the data to what the flow models.
        batches: data (B, *shape), indices (B,) and c (B, k).
        noises: number of dequantizations of each image in the importance-weighted bound.
        seed: seed of noise and probes.
        weights: of the samples (N,), in the means; None: all are 1.

    Returns:
        Plain numbers, and columns with a value for each sample, (N,), but `bounds`, (noises, N).
    """
    parts, nfe = [], []
    for rows in batches:
        columns, by_piece = evaluate_batch(flow, transform, rows, noises, seed)
        parts.append({name: column.double().cpu() for name, column in columns.items()})
        nfe.append(by_piece)
    columns = {name: torch.cat([part[name] for part in parts], -1) for name in parts[0]}
    weights = torch.ones_like(columns["bits_per_dim"]) if weights is None else weights
    return summarize(columns, torch.tensor(nfe, dtype=torch.float64), weights), columns


def evaluate_batch(
    flow: Flow, transform: Transform, rows: Rows, noises: int, seed: int
) -> tuple[dict[str, Tensor], list[int]]:
    """Return columns, (B,) each but `bounds` (K, B), and NFE by piece."""
    x, index, c = rows
    device = next(flow.parameters()).device
    noise_generators = sample_generators(index, seed, NOISE)
    probe_generators = sample_generators(index, seed, PROBES)

    def bits_with(noise: Tensor) -> Tensor:
        batch = transform(x, index, c, noise).to(device)
        return solve_and_measure(flow, batch, seed)[1].bits_per_dim

    batch = transform(x, index, c, transform.noise(x, noise_generators)).to(device)
    solution = flow.solve(batch.y, batch.c, probe_generators)
    measures = measure(flow, batch, solution)
    z = solution.state.z
    columns = {
        **measures._asdict(),
        "transport_cost": (flow.as_x(z) - batch.y).square().flatten(1).sum(1) / flow.d,
        "displacement": torch.stack([p.displacement for p in solution.pieces]).sum(0) / flow.d,
        "inverse_error": (flow.inverse(z, batch.c) - batch.y).abs().flatten(1).amax(1),
    }
    if not flow.exact:  # the generators go on: other probes
        other = measure(flow, batch, flow.solve(batch.y, batch.c, probe_generators))
        columns["bits_per_dim_other_probes"] = other.bits_per_dim
    if transform.discrete:
        others = (transform.noise(x, noise_generators) for _ in range(noises - 1))
        bits = [measures.bits_per_dim, *map(bits_with, others)]
        columns["bounds"] = importance_bound(torch.stack(bits), flow.d)
        columns["midpoint"] = bits_with(torch.full(x.shape, 0.5))
    return columns, [piece.nfe_forward for piece in solution.pieces]


def summarize(columns: dict[str, Tensor], nfe: Tensor, weights: Tensor) -> dict:
    """Columns (N,), evaluations `nfe` (batches, pieces), weights (N,) → plain numbers."""
    bits = columns["bits_per_dim"]
    total = nfe.sum(1)
    means = {name: weighted_mean(column, weights) for name, column in columns.items()}
    if count := int((~bits.isfinite()).sum()):
        raise Diverged(f"bits/dim of {count} of {len(bits)} samples are not finite")
    summary = {
        "samples": len(bits),
        "bits_per_dim": float(means["bits_per_dim"]),
        "standard_error_images": float(standard_error(bits, weights)),
        "standard_error_probes": 0.0,  # of an exact divergence
        "nfe": float(total.mean()),
        "nfe_min": int(total.min()),
        "nfe_max": int(total.max()),
        "nfe_by_piece": nfe.mean(0).tolist(),
        "kinetic": float(means["kinetic"]),
        "transport_cost": float(means["transport_cost"]),
        # ∫‖f − (z(T) − z(0))/T‖² = E − ‖z(T) − z(0)‖² in each piece, as T = 1
        "straightness": 1 - float(means["displacement"] / means["kinetic"]),
        "inverse_error": float(columns["inverse_error"].max()),
    }
    if columns["jacobian"].isfinite().all():
        summary["jacobian"] = float(means["jacobian"])
    if (other := columns.get("bits_per_dim_other_probes")) is not None:
        variance = (bits - other).square().mean() / 2  # Var(bits − other) = 2 Var(bits | noise)
        summary["standard_error_probes"] = float((variance / len(bits)).sqrt())
    if (bounds := columns.get("bounds")) is not None:
        summary |= {
            "bound": float(means["bounds"][-1]),
            "bound_standard_error": float(standard_error(bounds[-1], weights)),
            "bound_by_noises": means["bounds"].tolist(),
            "midpoint": float(means["midpoint"]),
        }
    return summary
