"""`rnode sample`: sample from a trained flow."""

from pathlib import Path

import numpy as np
import polars as pl
import torch
from omegaconf import DictConfig, OmegaConf

from rnode.app.density import from_checkpoint
from rnode.training.plots import FRAMES, plot_trajectory, save_figure

ANIMATION_SAMPLES = 32  # images of an animation


@torch.no_grad()
def main(cfg: DictConfig) -> None:
    """Write samples.png, and samples.npy of images or samples.csv of a table.

    With trajectory=true, also trajectory.gif of images.
    """
    density = from_checkpoint(cfg)
    folder = Path(cfg.folder)
    context = OmegaConf.to_container(cfg.context)
    samples = density.sample(cfg.n, context, cfg.seed, cfg.temperature)
    save_figure(density.draw({"samples": samples}), folder / "samples.png")
    if density.columns_ is None:
        np.save(folder / "samples.npy", samples)
    else:
        conditions = [pl.Series(k, np.broadcast_to(v, cfg.n)) for k, v in context.items()]
        samples.with_columns(conditions).write_csv(folder / "samples.csv")
    if cfg.trajectory and density.columns_ is None:
        c = density.encode_context(context, cfg.n).to(density.device)
        z = density.sample_z(c, cfg.seed, cfg.temperature)[:ANIMATION_SAMPLES]
        intervals = max(3, FRAMES // len(density.flow_.pieces))
        frames = density.flow_.trajectory(z, c[:ANIMATION_SAMPLES], intervals)
        plot_trajectory(density.data_.transform.inverse(frames).float().cpu(), folder)
    print(f"{cfg.n} samples by {density.agreement_} in {folder}")
