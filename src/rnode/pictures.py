"""Pictures, as PNG files: samples, the course of a training run, the likeliest images, a flow on its way."""

import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from rnode.data import DataModule
from rnode.files import whole_file
from rnode.flow import Flow
from rnode.metrics import read_metrics

matplotlib.use("Agg")  # pictures go to files; no display is looked for
from matplotlib import pyplot as plt

CURVES = {
    "bits_per_dim": "bits/dim",
    "nfe_forward": "NFE (forward)",
    "kinetic": "kinetic energy / d",
    "jacobian": "squared Jacobian norm / d",
}
LIMIT = 4.0  # of the axes of 2-D densities


def save(figure: plt.Figure, path: Path) -> None:
    with whole_file(path) as file:
        figure.savefig(file, dpi=120, format="png")
    plt.close(figure)


def draw_samples(real: Tensor, drawn: Tensor, path: Path) -> None:
    """Held-out data left, samples right: images (N, C, H, W) in [0, 1] as grids, vectors (N, d) as points."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 5.3), layout="constrained")
    for ax, points, title in zip(axes, (real, drawn), ("data (held out)", "samples"), strict=True):
        ax.set_title(title)
        draw(ax, points)
    save(figure, path)


def draw_curves(metrics: Path, path: Path) -> None:
    """bits/dim, NFE, kinetic energy and Jacobian norm against the training step, as far as `metrics` (CSV) has them."""
    rows = read_metrics(metrics)
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained", sharex=True)
    for ax, (key, label) in zip(axes.flat, CURVES.items(), strict=True):
        for stage, style in (("train", "-"), ("val", "o-"), ("test", "s")):
            points = [(int(row["step"]), float(row[f"{stage}/{key}"])) for row in rows if f"{stage}/{key}" in row]
            if points:
                ax.plot(*zip(*points, strict=True), style, markersize=4, linewidth=1, label=stage)
        ax.set(ylabel=label)
        if ax.has_data():
            ax.legend()
    for ax in axes[1]:
        ax.set_xlabel("training step")
    save(figure, path)


def draw(ax: plt.Axes, points: Tensor, columns: int | None = None) -> None:
    """Images (N, C, H, W) in [0, 1] as a grid, a square one unless `columns` is given; vectors (N, d) as points."""
    if points.dim() == 4:
        ax.imshow(grid(points, columns or math.ceil(len(points) ** 0.5)), interpolation="nearest")
        ax.axis("off")
    elif points.shape[1] == 1:
        ax.hist(points[:, 0].numpy(), bins=80, range=(-LIMIT, LIMIT), density=True)
    else:
        ax.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=2)
        ax.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal")


def grid(images: Tensor, columns: int) -> np.ndarray:
    """Images (N, C, H, W) in [0, 1] → one (H', W', 3)."""
    from torchvision.utils import make_grid

    return make_grid(images, nrow=columns, padding=1, pad_value=0.5).permute(1, 2, 0).numpy()


def save_points(points: Tensor, path: Path, columns: int | None = None) -> None:
    """Images (N, C, H, W) in [0, 1] as one PNG in which each of their pixels is a square; vectors (N, d) as points."""
    if points.dim() == 4:
        whole = enlarged(grid(points, columns or math.ceil(len(points) ** 0.5)), 800)
        plt.imsave(path, whole)
        return
    figure, ax = plt.subplots(figsize=(5, 5), layout="constrained")
    draw(ax, points)
    save(figure, path)


def enlarged(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) repeated a whole number of times in both directions, to about `size` pixels on the longer side."""
    scale = max(1, round(size / max(image.shape[:2])))
    return image.repeat(scale, 0).repeat(scale, 1)


def draw_extremes(rows: Tensor, bits: Tensor, data: DataModule, count: int, path: Path) -> None:
    """The samples of the most and of the least likelihood: rows (N, *shape) as the source gives them, their bits (N,)."""
    order = bits.argsort()
    count = min(count, len(order))
    figure, axes = plt.subplots(1, 2, figsize=(10, 5.3), layout="constrained")
    for ax, chosen, title in zip(axes, (order[:count], order.flip(0)[:count]), ("most likely", "least likely"), strict=True):
        shown = rows[chosen]
        draw(ax, shown if data.dequantize is None else shown / (data.dequantize.levels - 1))
        ax.set_title(f"{title}: {bits[chosen].min():.2f} to {bits[chosen].max():.2f} bits/dim")
    save(figure, path)


def draw_trajectory(frames: Tensor, folder: Path) -> None:
    """strip.png and trajectory.gif of images on their way from noise to data: frames (times, N, C, H, W) in [0, 1]."""
    from PIL import Image

    shown = frames[:, :8]
    rows = torch.linspace(0, len(frames) - 1, min(len(frames), 12)).round().long()
    save_points(shown[rows].transpose(0, 1).flatten(0, 1), folder / "strip.png", columns=len(rows))
    columns = math.ceil(frames.shape[1] ** 0.5)
    pictures = [Image.fromarray((255 * enlarged(grid(frame, columns), 400)).round().astype(np.uint8)) for frame in frames]
    stay = [80] * (len(pictures) - 1) + [2000]  # milliseconds
    pictures[0].save(folder / "trajectory.gif", save_all=True, append_images=pictures[1:], duration=stay, loop=0)


def draw_plane(flow: Flow, frames: Tensor, path: Path, side: int = 150) -> None:
    """A 2-D flow: its density, and the way of points from noise to data, frames (times, N, 2)."""
    axis = torch.linspace(-LIMIT, LIMIT, side)
    points = torch.cartesian_prod(axis, axis).to(frames)
    with torch.no_grad():
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
    save(figure, path)
