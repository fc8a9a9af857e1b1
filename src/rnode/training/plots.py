"""Pictures as files: samples, curves of a run, the most and least likely data, trajectories."""

import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from rnode.flow import Flow
from rnode.training.results import read_metrics
from rnode.training.run_folder import whole_file
from rnode.transforms import Transform

matplotlib.use("Agg")  # figures go to files and need no display

CURVES = {
    "bits_per_dim": "bits/dim",
    "nfe_forward": "NFE (forward)",
    "kinetic": "kinetic energy / d",
    "jacobian": "squared Jacobian norm / d",
}
LIMIT = 4.0  # of the axes of 2-D densities


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write a figure as PNG and close it."""
    with whole_file(path) as file:
        figure.savefig(file, dpi=120, format="png")
    plt.close(figure)


def plot_samples(real: Tensor, sampled: Tensor, path: Path) -> None:
    """Plot held-out data beside samples: images (N, C, H, W) in [0, 1], or vectors (N, d)."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 5.3), layout="constrained")
    titles = ("data (held out)", "samples")
    for ax, points, title in zip(axes, (real, sampled), titles, strict=True):
        ax.set_title(title)
        plot_points(ax, points)
    save_figure(figure, path)


def plot_curves(metrics: Path, path: Path) -> None:
    """Plot those columns CURVES that a metrics.csv has against the training step."""
    rows = read_metrics(metrics)
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained", sharex=True)
    for ax, (key, label) in zip(axes.flat, CURVES.items(), strict=True):
        for stage, style in (("train", "-"), ("val", "o-"), ("test", "s")):
            column = f"{stage}/{key}"
            points = [(int(row["step"]), float(row[column])) for row in rows if column in row]
            if points:
                ax.plot(*zip(*points, strict=True), style, markersize=4, linewidth=1, label=stage)
        ax.set(ylabel=label)
        if ax.has_data():
            ax.legend()
    for ax in axes[1]:
        ax.set_xlabel("training step")
    save_figure(figure, path)


def plot_points(ax: plt.Axes, points: Tensor) -> None:
    """Plot images (N, C, H, W) in [0, 1] as a square grid, or vectors (N, d) as points."""
    if points.dim() == 4:
        ax.imshow(image_grid(points), interpolation="nearest")
        ax.axis("off")
    elif points.shape[1] == 1:
        ax.hist(points[:, 0].numpy(), bins=80, range=(-LIMIT, LIMIT), density=True)
    else:
        ax.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=2)
        ax.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal")


def image_grid(images: Tensor, columns: int | None = None) -> np.ndarray:
    """Images (N, C, H, W) in [0, 1] → one (H', W', 3), a square grid unless `columns` is given."""
    columns = columns or math.ceil(len(images) ** 0.5)
    grid = make_grid(images, nrow=columns, padding=1, pad_value=0.5)
    return grid.permute(1, 2, 0).numpy()


def save_points(points: Tensor, path: Path, columns: int | None = None) -> None:
    """Write images (N, C, H, W) in [0, 1] as an enlarged grid, or vectors (N, d) as a plot."""
    if points.dim() == 4:
        plt.imsave(path, enlarged(image_grid(points, columns), 800))
        return
    figure, ax = plt.subplots(figsize=(5, 5), layout="constrained")
    plot_points(ax, points)
    save_figure(figure, path)


def enlarged(image: np.ndarray, size: int) -> np.ndarray:
    """Repeat the pixels of (H, W, 3) so that the longer side has about `size`."""
    scale = max(1, round(size / max(image.shape[:2])))
    return image.repeat(scale, 0).repeat(scale, 1)


def plot_extremes(rows: Tensor, bits: Tensor, transform: Transform, count: int, path: Path) -> None:
    """Plot the `count` most likely beside the `count` least likely of the data.

    Data are given as the source has them, rows (N, *shape), with their bits/dim (N,).
    """
    order = bits.argsort()
    figure, axes = plt.subplots(1, 2, figsize=(10, 5.3), layout="constrained")
    sides = {"most likely": order[:count], "least likely": order.flip(0)[:count]}
    for ax, (title, chosen) in zip(axes, sides.items(), strict=True):
        shown = rows[chosen]
        if transform.dequantize is not None:
            shown = shown / (transform.dequantize.levels - 1)
        plot_points(ax, shown)
        ax.set_title(f"{title}: {bits[chosen].min():.2f} to {bits[chosen].max():.2f} bits/dim")
    save_figure(figure, path)


def plot_trajectory(frames: Tensor, folder: Path) -> None:
    """Write strip.png and trajectory.gif of frames (times, N, C, H, W) in [0, 1]."""
    times = torch.linspace(0, len(frames) - 1, min(len(frames), 12)).round().long()
    strip = frames[times, :8].transpose(0, 1).flatten(0, 1)
    save_points(strip, folder / "strip.png", columns=len(times))
    grids = (255 * enlarged(image_grid(frame), 400) for frame in frames)
    first, *others = (Image.fromarray(grid.round().astype(np.uint8)) for grid in grids)
    durations = [80] * len(others) + [2000]  # milliseconds
    path = folder / "trajectory.gif"
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0)


@torch.no_grad()
def plot_plane(flow: Flow, frames: Tensor, path: Path, side: int = 150) -> None:
    """Plot the density of a 2-D flow, and the paths of points, frames (times, N, 2), to the data.

    The density is computed at `side`² points.
    """
    axis = torch.linspace(-LIMIT, LIMIT, side)
    points = torch.cartesian_prod(axis, axis).to(frames)
    density = flow.log_prob(points).exp().view(side, side).T.float().cpu()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5.3), layout="constrained")
    left.imshow(density, origin="lower", extent=(-LIMIT, LIMIT, -LIMIT, LIMIT))
    left.set_title("density")
    paths = frames[:, :200].cpu().numpy()
    right.plot(paths[..., 0], paths[..., 1], color="0.6", linewidth=0.5)
    right.scatter(*paths[0].T, s=4, label="z, normal")
    right.scatter(*paths[-1].T, s=4, label="x, sample")
    right.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal", title="trajectories")
    right.legend(loc="upper right")
    save_figure(figure, path)
