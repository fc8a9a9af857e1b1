"""`rnode sample`: sample from a trained flow."""

from pathlib import Path

import numpy as np
import polars as pl
import torch
from omegaconf import DictConfig, OmegaConf
from rich.progress import track

from rnode.app.density import from_checkpoint
from rnode.data.datamodule import DataModule
from rnode.distributed import gather_lists, rank_and_world_size
from rnode.errors import require
from rnode.flow import Flow
from rnode.training.plots import plot_corner, plot_plane, plot_strip, plot_trajectory, save_points
from rnode.transforms import ImageTransform

FRAMES = 36  # of an animation, about


@torch.no_grad()
def main(cfg: DictConfig) -> None:
    """Write samples.png and samples.npy, or samples.csv for a table, and plane.png for 2-D flows.

    Where the configuration asks for them: strip.png, trajectory.gif and interpolation.png.
    """
    density, fabric = from_checkpoint(cfg)
    data, flow, device = density.data, density.flow, fabric.device
    context = OmegaConf.to_container(cfg.context)
    c = data.conditions.encode(context, cfg.n).to(device)
    z = density.sample_z(cfg.n, cfg.seed, cfg.temperature).to(device)
    path = interpolate(flow, data, cfg.interpolate) if cfg.interpolate else None
    rank, processes = rank_and_world_size()
    batches = torch.arange(cfg.n).split(data.eval_batch_size)[rank::processes]
    parts = []
    for index in track(batches, "samples", disable=not fabric.is_global_zero):
        frames, nfe = flow.solve_inverse(z[index], c[index])
        parts.append((index, frames[-1].cpu(), nfe))
    index, y, nfe = zip(*gather_lists(parts), strict=True)
    if not fabric.is_global_zero:
        return
    y = torch.cat(y)[torch.cat(index).argsort()]
    folder, x = Path(cfg.folder), data.transform.inverse(y)
    if density.columns is None:
        save_points(x.float(), folder / "samples.png")
        np.save(folder / "samples.npy", density.decode(y))
    else:
        plot_corner(folder / "samples.png", {"samples": x}, density.columns)
        conditions = [pl.Series(k, np.broadcast_to(v, cfg.n)) for k, v in context.items()]
        density.decode(y).with_columns(conditions).write_csv(folder / "samples.csv")
    if flow.d == 2 and flow.k == 0:
        plot_plane(flow, flow.trajectory(z[:200], intervals=32), folder / "plane.png")
    if cfg.trajectory and density.columns is None:
        frames = flow.trajectory(z[:16], c[:16], max(3, FRAMES // len(flow.pieces)))
        plot_trajectory(data.transform.inverse(frames).float().cpu(), folder)
    if path is not None:
        shares = torch.linspace(0, 1, len(path))
        plot_strip(path[:, None], shares, "share of the path in z", folder / "interpolation.png")
    print(f"{cfg.n} samples, NFE {np.mean(nfe):.1f} a batch by {flow.solver.test.method}")
    print(f"folder: {folder}")


def interpolate(flow: Flow, data: DataModule, pair: list[int]) -> torch.Tensor:
    """Return images from one test image of the `pair` to the other, (11, C, H, W)."""
    images = isinstance(data.transform, ImageTransform)
    require(images, f"interpolate={pair}: needs a flow of images")
    data.setup()
    last = len(data.splits.test) - 1
    message = f"interpolate={pair}: must be two indices of test images, 0 to {last}"
    require(max(pair) <= last, message)
    x, index, c = data.fetch("test", list(pair))
    bin_centre = torch.full(x.shape, 0.5)
    batch = data.transform(x, index, c, bin_centre).to(next(flow.parameters()).device)
    first, second = flow(batch.y, batch.c).z
    # Points on this arc are normal as its ends are; those on a straight line are shorter.
    angle = torch.linspace(0, torch.pi / 2, 11).to(first)[:, None]
    c = torch.lerp(batch.c[:1], batch.c[1:], (angle * 2 / torch.pi).to(batch.c))
    y = flow.inverse(angle.cos() * first + angle.sin() * second, c)
    return data.transform.inverse(y).float().cpu()
