"""`rnode sample`: sample from a trained flow."""

from pathlib import Path

import numpy as np
import polars as pl
import torch
from omegaconf import DictConfig, OmegaConf
from rich.progress import track

from rnode.app.density import from_checkpoint
from rnode.training.plots import plot_corner, plot_grids, plot_plane, plot_trajectory

FRAMES = 36  # of an animation, about


@torch.no_grad()
def main(cfg: DictConfig) -> None:
    """Write samples.png and samples.npy, or samples.csv for a table, and plane.png for 2-D flows.

    With trajectory=true, also strip.png and trajectory.gif for images.
    """
    density = from_checkpoint(cfg)
    data, flow, folder = density.data, density.flow, Path(cfg.folder)
    context = OmegaConf.to_container(cfg.context)
    c = data.conditions.encode(context, cfg.n).to(density.device)
    z = density.sample_z(c, cfg.seed, cfg.temperature)
    parts, nfe = [], []
    for index in track(torch.arange(cfg.n).split(data.eval_batch_size), "samples"):
        frames, evaluations = flow.solve_inverse(z[index], c[index])
        parts.append(frames[-1].cpu())
        nfe.append(evaluations)
    y = torch.cat(parts)
    x = data.transform.inverse(y)
    if density.columns is None:
        plot_grids(folder / "samples.png", {"samples": x.float()})
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
