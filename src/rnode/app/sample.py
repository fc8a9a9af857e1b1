"""`rnode sample`: sample from a trained flow."""

from pathlib import Path

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.progress import track

from rnode.app.build import from_checkpoint
from rnode.data.datamodule import DataModule
from rnode.distributed import gather_lists, rank_and_world_size
from rnode.errors import require
from rnode.flow import Flow
from rnode.training.plots import plot_plane, plot_trajectory, save_points

MIDPOINT = 0.5  # of a grey level's bin


@torch.no_grad()
def main(cfg: DictConfig) -> None:
    """Write samples.png, samples.npy and plane.png (2-D flows).

    Where the configuration asks for them: strip.png, trajectory.gif and interpolation.png.
    """
    data, flow, fabric = from_checkpoint(cfg)
    transform = data.transform
    ends = None if cfg.interpolate is None else interpolation_ends(cfg.interpolate, data)
    folder = Path(HydraConfig.get().runtime.output_dir)
    first, device = fabric.is_global_zero, next(flow.parameters()).device

    torch.manual_seed(cfg.seed)  # z is the same in all processes
    z = cfg.temperature * torch.randn(cfg.n, flow.d, dtype=next(flow.parameters()).dtype)
    rank, processes = rank_and_world_size()
    share = list(enumerate(z.split(data.eval_batch_size)))[rank::processes]
    parts = []
    for i, part in track(share, "samples", disable=not first):
        y, nfe = flow.solve_inverse(part.to(device))
        parts.append((i, y.cpu(), nfe))
    _, y, nfe = zip(*sorted(gather_lists(parts), key=lambda part: part[0]), strict=True)
    if not first:
        return
    x = transform.inverse(torch.cat(y))
    save_points(x.float(), folder / "samples.png")
    grey = transform.dequantize
    np.save(folder / "samples.npy", (x if grey is None else grey.inverse(x)).numpy())
    if grey is None and flow.d == 2:
        frames = flow.trajectory(z[:200].to(device), intervals=32)
        plot_plane(flow, frames, folder / "plane.png")
    if grey is not None and cfg.trajectory:
        frames = flow.trajectory(z[:16].to(device), intervals=3)
        plot_trajectory(transform.inverse(frames).float().cpu(), folder)
    if ends is not None:
        between = interpolate(flow, data, ends, cfg.interpolate)
        save_points(between.float().cpu(), folder / "interpolation.png", columns=len(between))

    mean = sum(nfe) / len(nfe)
    print(f"{cfg.n} samples, NFE {mean:.1f} a batch by {flow.solver.test.method}")
    print(f"folder: {folder}")


def interpolation_ends(pair: list[int], data: DataModule) -> torch.Tensor:
    """Return two test images, (2, C, H, W)."""
    given = f"interpolate={list(pair)}"
    require(data.transform.discrete, f"{given}: must be left out; this flow does not model images")
    data.setup()
    count = len(data.splits.test)
    require(max(pair) < count, f"{given}: must be two indices of test images, 0 to {count - 1}")
    return data.splits.test[list(pair)]


def interpolate(flow: Flow, data: DataModule, ends: torch.Tensor, pair: list[int]) -> torch.Tensor:
    """Return images from the first of `ends` (2, C, H, W) to the second, (11, C, H, W)."""
    ends = ends.to(next(flow.parameters()).device)
    midpoints = torch.full(ends.shape, MIDPOINT)
    z = flow(data.transform(ends, torch.tensor(list(pair)), midpoints).y).z
    # Points on this arc are normal as its ends are; those on a straight line are shorter.
    angle = torch.linspace(0, torch.pi / 2, 11).to(z)[:, None]
    return data.transform.inverse(flow.inverse(angle.cos() * z[0] + angle.sin() * z[1]))
