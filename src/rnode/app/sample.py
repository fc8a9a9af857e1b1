"""`rnode sample`: sample from a trained flow."""

from pathlib import Path

import numpy as np
import polars as pl
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.progress import track

from rnode.app.build import from_checkpoint
from rnode.app.density import Density
from rnode.data.datamodule import DataModule
from rnode.data.tables import read_table
from rnode.distributed import gather_lists, rank_and_world_size
from rnode.errors import require
from rnode.flow import Flow
from rnode.training.plots import plot_corner, plot_plane, plot_trajectory, plot_way, save_points
from rnode.transforms import ImageTransform

MIDPOINT = 0.5  # of a grey level's bin
FRAMES = 36  # of an animation, about


@torch.no_grad()
def main(cfg: DictConfig) -> None:
    """Write samples.png and samples.npy, or samples.csv for a table, and plane.png (2-D flows).

    Where the configuration asks for them: strip.png, trajectory.gif (and .mp4) and
    interpolation.png.
    """
    data, flow, fabric = from_checkpoint(cfg)
    transform, density = data.transform, Density(data, flow, torch.zeros(0))
    count, given = conditions(cfg, density)
    context = density.encode_context(given, count)
    if cfg.interpolate is not None:
        check_interpolation(cfg.interpolate, data)
    folder = Path(HydraConfig.get().runtime.output_dir)
    first, device = fabric.is_global_zero, next(flow.parameters()).device

    torch.manual_seed(cfg.seed)  # z is the same in all processes
    z = cfg.temperature * torch.randn(count, flow.d, dtype=next(flow.parameters()).dtype)
    c = context.to(device)
    rank, processes = rank_and_world_size()
    share = list(enumerate(torch.arange(count).split(data.eval_batch_size)))[rank::processes]
    parts = []
    for i, part in track(share, "samples", disable=not first):
        frames, nfe = flow.solve_inverse(z[part].to(device), c[part])
        y = frames[-1]
        parts.append((i, y.cpu(), nfe))
    _, y, nfe = zip(*sorted(gather_lists(parts), key=lambda part: part[0]), strict=True)
    if not first:
        return
    y, images = torch.cat(y), isinstance(transform, ImageTransform)
    if density.columns is not None:
        conditioned = pl.DataFrame({name: np.broadcast_to(v, count) for name, v in given.items()})
        density.decode(y).with_columns(conditioned).write_csv(folder / "samples.csv")
        plot_corner(folder / "samples.png", {"samples": transform.inverse(y)}, density.columns)
    else:
        save_points(transform.inverse(y).float(), folder / "samples.png")
        np.save(folder / "samples.npy", density.decode(y))
    if not images and flow.d == 2 and density.columns is None:
        frames = flow.trajectory(z[:200].to(device), intervals=32)
        plot_plane(flow, frames, folder / "plane.png")
    if images and cfg.trajectory:
        intervals = max(3, FRAMES // len(flow.pieces))
        frames = flow.trajectory(z[:16].to(device), c[:16], intervals)
        plot_trajectory(transform.inverse(frames).float().cpu(), folder)
    if cfg.interpolate is not None:
        between = interpolate(flow, data, cfg.interpolate).float().cpu()[:, None]
        shares, label = torch.linspace(0, 1, len(between)), "share of the way through z"
        plot_way(between, shares, label, folder / "interpolation.png")

    mean = sum(nfe) / len(nfe)
    print(f"{count} samples, NFE {mean:.1f} a batch by {flow.solver.test.method}")
    print(f"folder: {folder}")


def conditions(cfg: DictConfig, density: Density) -> tuple[int, dict]:
    """Return the number of samples and what they are given, by the names of columns."""
    if cfg.context_file is None:
        return cfg.n, OmegaConf.to_container(cfg.context)
    require(density.data.context is not None, "context_file: this density has no conditions")
    frame, names = read_table(Path(cfg.context_file).expanduser()), density.data.context.columns
    missing = [name for name in names if name not in frame.columns]
    require(not missing, f"context_file={cfg.context_file}: lacks {', '.join(missing)}")
    return len(frame), {name: frame[name].to_numpy() for name in names}


def check_interpolation(pair: list[int], data: DataModule) -> None:
    """Raise InputError unless there are two such test images."""
    given, images = f"interpolate={list(pair)}", isinstance(data.transform, ImageTransform)
    require(images, f"{given}: must be left out; this flow does not model images")
    data.setup()
    count = len(data.splits.test)
    require(max(pair) < count, f"{given}: must be two indices of test images, 0 to {count - 1}")


def interpolate(flow: Flow, data: DataModule, pair: list[int]) -> torch.Tensor:
    """Return images from one test image of the `pair` to the other, (11, C, H, W)."""
    ends, index, context = data.fetch_from("test")(list(pair))
    midpoints = torch.full(ends.shape, MIDPOINT)
    batch = data.transform(ends, index, context, midpoints).to(next(flow.parameters()).device)
    z, c = flow(batch.y, batch.c).z, batch.c
    # Points on this arc are normal as its ends are; those on a straight line are shorter.
    angle = torch.linspace(0, torch.pi / 2, 11).to(z)[:, None]
    c = torch.lerp(c[:1], c[1:], (angle * 2 / torch.pi).to(c))
    return data.transform.inverse(flow.inverse(angle.cos() * z[0] + angle.sin() * z[1], c))
