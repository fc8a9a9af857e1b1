"""`rnode sample`: sample from a trained flow."""

from pathlib import Path

import numpy as np
import polars as pl
import torch
from omegaconf import DictConfig, OmegaConf
from rich.progress import track

from rnode.app.density import from_checkpoint
from rnode.distributed import gather_lists, rank_and_world_size
from rnode.training.plots import plot_corner, plot_plane, plot_trajectory, save_points

FRAMES = 36  # of an animation, about


@torch.no_grad()
def main(cfg: DictConfig) -> None:
    """Write samples.png and samples.npy, or samples.csv for a table, and plane.png for 2-D flows.

    Where the configuration asks for them: strip.png and trajectory.gif.
    """
    density, fabric = from_checkpoint(cfg)
    data, flow, device = density.data, density.flow, fabric.device
    context = OmegaConf.to_container(cfg.context)
    c = data.conditions.encode(context, cfg.n).to(device)
    z = density.sample_z(cfg.n, cfg.seed, cfg.temperature).to(device)
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
    print(f"{cfg.n} samples, NFE {np.mean(nfe):.1f} a batch by {flow.solver.test.method}")
    print(f"folder: {folder}")
