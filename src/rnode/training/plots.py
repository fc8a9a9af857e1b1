"""Pictures as files: samples, curves of a run, the most and least likely data, trajectories."""

import math
import shutil
import subprocess
from pathlib import Path

import matplotlib
import numpy as np
import torch
from cycler import cycler
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from rnode.flow import Flow
from rnode.training.results import GAUSSIAN, MEASURES, read_metrics
from rnode.training.run_folder import whole_file
from rnode.transforms import ImageTransform, Transform

matplotlib.use("Agg")  # figures go to files and need no display
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666")
plt.rcParams.update(
    {
        "axes.prop_cycle": cycler(color=COLOURS),  # Okabe and Ito: colour-blind people tell them
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": "medium",
        "font.size": 11,
        "legend.frameon": False,
    }
)

MOST = 10  # columns of a table in a corner plot
PAIR = {"ncols": 2, "figsize": (10, 5.3), "layout": "constrained"}


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write a figure as PNG and close it."""
    with whole_file(path) as file:
        figure.savefig(file, dpi=120, format="png")
    plt.close(figure)


def set_log_scale(ax: plt.Axes) -> None:
    """Make the y-axis logarithmic, with numbers at 1, 1.5, 2, 3, 4, 5 and 7 of each decade."""
    ax.set_yscale("log")
    ticks = {"major_formatter": "{x:g}", "minor_formatter": "{x:g}"}
    ax.yaxis.set(**ticks, minor_locator=LogLocator(subs=(1.5, 2, 3, 4, 5, 7)))


def plot_pair(path: Path, panels: dict[str, Tensor]) -> None:
    """Plot two sets of points or images side by side; `panels` holds them by their titles."""
    figure, axes = plt.subplots(**PAIR)
    first = next(iter(panels.values()))
    for ax, (title, points) in zip(axes, panels.items(), strict=True):
        ax.set_title(title)
        plot_points(ax, points, first)
    save_figure(figure, path)


def plot_curves(metrics: Path, path: Path, title: str) -> None:
    """Plot the columns MEASURES of a metrics.csv against the training step."""
    rows = read_metrics(metrics)
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained", sharex=True)
    for ax, (key, label) in zip(axes.flat, MEASURES.items(), strict=True):
        for stage, style in (("train", "-"), ("val", "o-"), ("test", "s")):
            column = f"{stage}/{key}"
            points = [(int(row["step"]), float(row[column])) for row in rows if column in row]
            if points:
                ax.plot(*zip(*points, strict=True), style, markersize=4, linewidth=1, label=stage)
        gaussian = [float(row[GAUSSIAN]) for row in rows if GAUSSIAN in row]
        if gaussian and key == "bits_per_dim":
            ax.axhline(gaussian[-1], color="0.5", linestyle="--", linewidth=1, label="Gaussian")
        ax.set_ylabel(label)
        if key.startswith("nfe"):
            ax.locator_params("y", integer=True)
    plt.setp(axes[1], xlabel="training step")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, title=title, loc="outside upper center", ncols=4)
    save_figure(figure, path)


def plot_band(ax: plt.Axes, curves: list[tuple[np.ndarray, np.ndarray]], **style: str) -> None:
    """Plot the mean of curves (x, y) where all have values, and a band from least to largest."""
    x, y = curves[0]
    if len(curves) > 1:
        x = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 200)
        values = np.stack([np.interp(x, *curve) for curve in curves])
        y = values.mean(0)
        color = style.get("color")
        ax.fill_between(x, values.min(0), values.max(0), alpha=0.25, color=color, linewidth=0)
    ax.plot(x, y, **style)


def frame(points: Tensor) -> np.ndarray:
    """Limits (2, d) of axes that show 99.8 % of the points (N, d) in each column."""
    low, high = np.quantile(points.numpy(), [0.001, 0.999], axis=0)
    margin = 0.07 * (high - low) + 1e-12
    return np.stack([low - margin, high + margin])


def plot_points(ax: plt.Axes, points: Tensor, like: Tensor | None = None) -> None:
    """Plot images (N, C, H, W) in [0, 1] as a square grid, or vectors (N, d) as points.

    The axes show the vectors `like`, by default the points themselves.
    """
    if points.dim() == 4:
        ax.imshow(image_grid(points), interpolation="nearest")
        ax.axis("off")
        return
    columns, points = points.shape[1], points[:, :2]
    limits = frame(points if like is None else like[:, :2])
    if points.shape[1] == 1:
        ax.hist(points[:, 0].numpy(), bins=80, range=tuple(limits[:, 0]), density=True)
    else:
        ax.scatter(*points.T.numpy(), s=2)
        ax.set(xlim=limits[:, 0], ylim=limits[:, 1], aspect="equal")
    outside = np.logical_or(points.numpy() < limits[0], points.numpy() > limits[1]).any(1).mean()
    notes = [f"columns 1 and 2 of {columns}"] if columns > 2 else []
    notes += [f"{outside:.1%} of the points lie outside"] if outside > 0 else []
    ax.set_xlabel("; ".join(notes))


def image_grid(images: Tensor, columns: int | None = None, size: int = 0) -> np.ndarray:
    """Images (N, C, H, W) → a grid (H', W', 3), square by default, enlarged to about `size`."""
    columns = columns or math.ceil(len(images) ** 0.5)
    grid = make_grid(images, nrow=columns, padding=1, pad_value=0.5).permute(1, 2, 0).numpy()
    scale = max(1, round(size / max(grid.shape[:2])))
    return grid.repeat(scale, 0).repeat(scale, 1)


def plot_corner(path: Path, panels: dict[str, Tensor], names: list[str]) -> None:
    """Plot columns of one or two tables (N, d): histograms, and pairs on each side of them.

    `panels` holds the tables by their titles. The pairs of the first are below the diagonal, and
    the axes show it.
    """
    count, (first, *_) = min(len(names), MOST), panels.values()
    low, high = frame(first[:, :count])
    side = max(4.0, 1.9 * count)
    figure, axes = plt.subplots(
        count, count, figsize=(side, side), layout="constrained", squeeze=False
    )
    for k, (title, points) in enumerate(panels.items()):
        for i, j in np.ndindex(count, count):
            ax, color = axes[i, j], f"C{k}"
            if i == j:
                bins = {"bins": 50, "range": (low[i], high[i]), "density": True}
                ax.hist(points[:, i].numpy(), **bins, histtype="step", color=color, label=title)
            elif (i < j) == bool(k):
                ax.scatter(points[:, j], points[:, i], s=1, color=color, rasterized=True)
                ax.set_ylim(low[i], high[i])
            ax.set_xlim(low[j], high[j])
    for i, name in enumerate(names[:count]):
        axes[-1, i].set_xlabel(name)
        axes[i, 0].set_ylabel(name if i else "")
    plt.setp(axes[:, 1:], yticklabels=[])
    plt.setp(axes[:-1], xticklabels=[])
    for ax in axes.flat:
        ax.tick_params(labelsize=7, labelrotation=30)
    axes[0, 0].set_yticks([])
    if count < len(names):
        figure.suptitle(f"the first {count} of {len(names)} columns")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    save_figure(figure, path)


def save_points(points: Tensor, path: Path) -> None:
    """Write images (N, C, H, W) in [0, 1] as an enlarged grid, or vectors (N, d) as a plot."""
    if points.dim() == 4:
        plt.imsave(path, image_grid(points, size=800))
        return
    figure, ax = plt.subplots(figsize=(5, 5), layout="constrained")
    plot_points(ax, points)
    save_figure(figure, path)


def plot_extremes(rows: Tensor, bits: Tensor, transform: Transform, count: int, path: Path) -> None:
    """Plot the `count` most and least likely of the source's data (N, *shape), by `bits` (N,)."""
    order, panels = bits.argsort(), {}
    scale = transform.levels - 1 if isinstance(transform, ImageTransform) else 1
    for name, chosen in (("most", order[:count]), ("least", order.flip(0)[:count])):
        least, most = bits[chosen].min(), bits[chosen].max()
        panels[f"{name} likely: {least:.2f} to {most:.2f} bits/dim"] = rows[chosen] / scale
    plot_pair(path, panels)


def plot_way(frames: Tensor, shares: Tensor, label: str, path: Path) -> None:
    """Plot images (times, N, C, H, W) in [0, 1], a column for each time, which `shares` name."""
    columns, rows = frames.shape[:2]
    grid = image_grid(frames.transpose(0, 1).flatten(0, 1), columns)
    size = (columns, rows + 0.7)
    figure, ax = plt.subplots(figsize=size, layout="constrained")
    ax.imshow(grid, interpolation="nearest")
    width = grid.shape[1] / columns
    middles = [width * (k + 0.5) for k in range(columns)]
    ax.set_xticks(middles, [f"{float(share):.2f}" for share in shares])
    ax.set(yticks=[], xlabel=label)
    save_figure(figure, path)


def plot_trajectory(frames: Tensor, folder: Path) -> None:
    """Write frames (times, N, C, H, W) in [0, 1] as strip.png and trajectory.gif.

    Where ffmpeg is installed, trajectory.mp4 is written too.
    """
    times = torch.linspace(0, len(frames) - 1, min(len(frames), 12)).round().long()
    shares = times / (len(frames) - 1)
    plot_way(
        frames[times, :8], shares, "share of the way from noise to image", folder / "strip.png"
    )
    grids = ((255 * image_grid(frame, size=400)).round().astype(np.uint8) for frame in frames)
    first, *others = map(Image.fromarray, grids)
    milliseconds = [80] * len(others) + [2000]
    options = {"append_images": others, "duration": milliseconds, "loop": 0}
    first.save(folder / "trajectory.gif", save_all=True, **options)
    if shutil.which("ffmpeg"):
        # Players need even sides, and the last frame is to rest here too.
        filters = "pad=ceil(iw/2)*2:ceil(ih/2)*2,tpad=stop_mode=clone:stop_duration=2"
        command = ["ffmpeg", "-v", "error", "-y", "-i", folder / "trajectory.gif", "-vf", filters]
        subprocess.run([*command, "-pix_fmt", "yuv420p", folder / "trajectory.mp4"], check=True)


@torch.no_grad()
def plot_plane(flow: Flow, frames: Tensor, path: Path, side: int = 150) -> None:
    """Plot the density of a 2-D flow at `side`² points, and the paths `frames` (times, N, 2)."""
    limits = frame(torch.cat([frames[0], frames[-1]]).cpu()).T  # of noise and samples
    across, up = (torch.linspace(*map(float, pair), side) for pair in limits)
    points = torch.cartesian_prod(across, up).to(frames)
    density = flow.log_prob(points).exp().view(side, side).T.float().cpu()
    figure, (left, right) = plt.subplots(**PAIR)
    left.imshow(density, origin="lower", extent=limits.flatten())
    left.set_title("density")
    paths = frames[:, :200].cpu().numpy()
    right.plot(paths[..., 0], paths[..., 1], color="0.6", linewidth=0.5)
    right.scatter(*paths[0].T, s=4, label="z, normal")
    right.scatter(*paths[-1].T, s=4, label="x, sample")
    right.set(xlim=limits[0], ylim=limits[1], aspect="equal", title="trajectories")
    figure.legend(loc="outside lower right", ncols=2)
    save_figure(figure, path)
