"""What a trained flow is worth: its likelihood and how sure that is, what solving it costs, how its trajectories run."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rnode.data import NOISE, Batch, DataModule
from rnode.draws import sample_generators
from rnode.dynamics import State
from rnode.errors import DivergenceError
from rnode.flow import Flow
from rnode.objective import bits_per_dim, log_normal
from rnode.processes import gathered, share

PROBES = 1  # stream of the probes in evaluation (see sample_generators)
BIN_CENTRE = 0.5


class Measures(NamedTuple):
    """Of each sample, (B,): bits/dim; E and n per dimension."""

    bits: Tensor
    kinetic: Tensor
    jacobian: Tensor


def measure(flow: Flow, batch: Batch, probes: Sequence[torch.Generator]) -> tuple[State, Measures]:
    """Solve the flow once for a batch, the probes drawn by one generator a sample."""
    state = flow(batch.y, probes)
    bits = bits_per_dim(log_normal(state.z) + state.l, batch.log_det, flow.d)
    return state, Measures(bits, state.E / flow.d, state.n / flow.d)


def standard_error(values: Tensor) -> Tensor:
    """Of the mean of independent values (N,)."""
    return values.std() / len(values) ** 0.5


def probe_error(first: Tensor, second: Tensor) -> Tensor:
    """Standard error of the mean of `first` (N,) that comes of the probes alone; `second` has the same noise, other probes.

    The two differ by twice the probes' variance: Var(first − second) = 2 Var(first | image, noise).
    """
    return ((first - second).square().mean() / 2 / len(first)).sqrt()


def importance_bound(bits: Tensor, d: int) -> Tensor:
    """Bound on the discrete −log₂ P(x) / d from more and more dequantizations (Burda et al., 2016; Ho et al., 2019).

    bits (K, B): bits/dim of K noises for each image → (K, B): row k − 1 is −log₂(1/k Σ_{i ≤ k} p(x + u_i)) / d. In
    expectation it falls with k, from the uniform bound to the discrete code length. An image's K noises must share their
    probes: an error of l that differs between them is taken for likelihood by the mean of exponentials.
    """
    nats = d * math.log(2)
    k = torch.arange(1, len(bits) + 1, device=bits.device, dtype=torch.float64)[:, None]
    return -((-nats * bits.double()).logcumsumexp(0) - k.log()) / nats


@contextlib.contextmanager
def displacements(flow: Flow) -> Iterator[list[Tensor]]:
    """Collect ‖z(T) − z(0)‖² (B,) of every piece that is solved meanwhile."""
    squares = []

    def note(piece: torch.nn.Module, arguments: tuple, state: State) -> None:
        squares.append((state.z - arguments[0]).square().flatten(1).sum(1))

    hooks = [piece.register_forward_hook(note) for piece in flow.pieces]
    try:
        yield squares
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def evaluate(
    flow: Flow, data: DataModule, split: str, noises: int, seed: int, progress: Callable = iter
) -> tuple[dict, dict[str, Tensor]]:
    """Everything that is reported about a flow on a split: (summary, columns with a value for each sample, (N,)).

    Every draw belongs to a sample, so batches of another size change nothing beyond the solver's tolerance. `noises`
    dequantizations of each image make the importance-weighted bound; vectors, which are continuous, have none.
    `progress` wraps the loader's iteration. Where torch.distributed is initialized each process solves its share of the
    samples, and all return the whole.
    """
    parts = []
    for x, index in progress(data.eval_dataloader(getattr(data.splits, split), *share())):
        columns, by_piece = evaluate_batch(flow, data, x, index, noises, seed)
        parts.append(({name: values.double().cpu() for name, values in columns.items()}, by_piece))
    parts, nfe = zip(*gathered(parts), strict=True)
    order = torch.cat([part["index"] for part in parts]).argsort()
    columns = {name: torch.cat([part[name] for part in parts], dim=-1)[..., order] for name in parts[0]}
    return summarize(columns, torch.tensor(nfe, dtype=torch.float64)), columns


def evaluate_batch(
    flow: Flow, data: DataModule, x: Tensor, index: Tensor, noises: int, seed: int
) -> tuple[dict[str, Tensor], list[int]]:
    """x (B, *shape) as the source gives it → columns, each (B,) but `bounds` (K, B), and NFE by piece."""
    x = x.to(next(flow.parameters()).device)
    noise_generators = sample_generators(index, seed, NOISE)
    discrete = data.dequantize is not None

    def solve(noise: Tensor | None, probes: list[torch.Generator] | None = None) -> tuple[Batch, State, Measures]:
        """Once, with the probes that belong to the images unless others are given."""
        batch = data.transform(x, index, noise)
        return batch, *measure(flow, batch, probes or sample_generators(index, seed, PROBES))

    def next_noise() -> Tensor | None:
        return data.noise(noise_generators) if discrete else None

    noise, probes = next_noise(), sample_generators(index, seed, PROBES)
    with displacements(flow) as squares:
        batch, state, measures = solve(noise, probes)
    by_piece = [piece.nfe_forward for piece in flow.pieces]
    columns = {
        "index": index,
        "bits_per_dim": measures.bits,
        "kinetic": measures.kinetic,
        "jacobian": measures.jacobian,
        "transport_cost": (flow.as_x(state.z) - batch.y).square().flatten(1).sum(1) / flow.d,
        "displacement": sum(squares) / flow.d,
        "inverse_error": (flow.inverse(state.z) - batch.y).abs().flatten(1).amax(1),
    }
    if flow.probes.divergence != "exact":
        columns["bits_per_dim_other_probes"] = solve(noise, probes)[2].bits  # what the generators give next
    if discrete:
        bits = [measures.bits, *(solve(next_noise())[2].bits for _ in range(noises - 1))]
        columns["bounds"] = importance_bound(torch.stack(bits), flow.d)
        columns["midpoint"] = solve(torch.full(x.shape, BIN_CENTRE))[2].bits
    return columns, by_piece


def summarize(columns: dict[str, Tensor], nfe: Tensor) -> dict:
    """Plain numbers of the columns and of the evaluations `nfe` (batches, pieces)."""
    bits, total = columns["bits_per_dim"], nfe.sum(1)
    if not bits.isfinite().all():
        raise DivergenceError(f"bits/dim of {int((~bits.isfinite()).sum())} of {len(bits)} samples are not finite")
    summary = {
        "samples": len(bits),
        "bits_per_dim": float(bits.mean()),
        "standard_error_images": float(standard_error(bits)),
        "standard_error_probes": 0.0,  # of an exact divergence
        "nfe": float(total.mean()),
        "nfe_min": int(total.min()),
        "nfe_max": int(total.max()),
        "nfe_by_piece": nfe.mean(0).tolist(),
        **{name: float(columns[name].mean()) for name in ("kinetic", "jacobian", "transport_cost")},
        # ∫‖f − (z(T) − z(0))/T‖² = E − ‖z(T) − z(0)‖² in each piece, as T = 1
        "straightness": 1 - float(columns["displacement"].sum() / columns["kinetic"].sum()),
        "inverse_error": float(columns["inverse_error"].max()),
    }
    if "bits_per_dim_other_probes" in columns:
        summary["standard_error_probes"] = float(probe_error(bits, columns["bits_per_dim_other_probes"]))
    if "bounds" in columns:
        bounds = columns["bounds"]
        summary |= {
            "bound": float(bounds[-1].mean()),
            "bound_standard_error": float(standard_error(bounds[-1])),
            "bound_by_noises": bounds.mean(1).tolist(),
            "midpoint": float(columns["midpoint"].mean()),
        }
    return summary
