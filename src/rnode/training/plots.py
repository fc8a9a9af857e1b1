"""Figures as files: samples of images and of tables."""

import math
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from cycler import cycler
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from rnode.training.run_folder import whole_file

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666")
FRAMES, WIDTH = 48, 720  # of an animation; its width in pixels, about
STYLE = {
    "axes.prop_cycle": cycler(color=COLOURS),  # Okabe and Ito: colour-blind people tell them
    "axes.spines.top": False,
    "axes.spines.right": False,
}


class Picture(Figure):
    """A figure that a notebook shows, whether or not pyplot has been used there."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def subplots(
    width: float, height: float, rows: int = 1, columns: int = 1
) -> tuple[Figure, np.ndarray]:
    """Make a figure of (rows, columns) axes, without pyplot: its settings stay the caller's."""
    with rc_context(STYLE):
        figure = Picture((width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    with whole_file(path) as file:
        figure.savefig(file, dpi=120, format="png")


def plot_grids(panels: dict[str, Tensor]) -> Figure:
    """Plot images (N, C, H, W) in [0, 1] as square grids; `panels` holds them by their titles."""
    figure, axes = subplots(5 * len(panels), 5.3, columns=len(panels))
    for ax, (title, images) in zip(axes.flat, panels.items(), strict=True):
        ax.set_title(title)
        ax.imshow(image_grid(images), interpolation="nearest")
        ax.axis("off")
    return figure


def plot_band(ax: Axes, curves: list[tuple[np.ndarray, np.ndarray]], **style: str) -> None:
    """Plot the mean of curves (x, y) where all have values, and a band from least to largest."""
    curves = [curve for curve in curves if len(curve[0])]
    x, y = curves[0] if curves else ([], [])
    if len(curves) > 1:
        x = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 200)
        values = np.stack([np.interp(x, *curve) for curve in curves])
        y = values.mean(0)
        color = style.get("color")
        ax.fill_between(x, values.min(0), values.max(0), alpha=0.25, color=color, linewidth=0)
    ax.plot(x, y, marker="." if len(x) == 1 else None, **style)


def image_grid(images: Tensor, columns: int | None = None) -> np.ndarray:
    """Images (N, C, H, W) → a grid (H', W', 3) of some columns, by default a square one."""
    columns = columns or math.ceil(len(images) ** 0.5)
    return make_grid(images, nrow=columns, padding=1, pad_value=0.5).permute(1, 2, 0).numpy()


def plot_corner(panels: dict[str, Tensor], names: list[str]) -> Figure:
    """Plot the first ten columns of one or two tables (N, d): histograms, and pairs beside them.

    `panels` holds the tables by their titles. The pairs of the first are below the diagonal, and
    the axes show 99.8 % of it in each column.
    """
    names = [name.replace("$", r"\$") for name in names[:10]]  # no formulas
    count = len(names)
    first = next(iter(panels.values()))
    points = first[:, :count].numpy().astype(np.float64)
    points[~np.isfinite(points)] = np.nan
    low, high = np.nan_to_num(np.nanquantile(points, [0.001, 0.999], axis=0))
    margin = 0.07 * (high - low) + 1e-6 * np.abs(low) + 1e-12
    low, high = low - margin, high + margin
    edges = min(50, math.ceil(len(first) ** 0.5)) + 1  # of the bins
    figure, axes = subplots(2 * count + 2, 2 * count + 2, count, count)
    for k, (title, points) in enumerate(panels.items()):
        for i, j in np.ndindex(count, count):
            ax = axes[i, j]
            color = COLOURS[k]
            if i == j:
                bins = np.linspace(low[i], high[i], edges)
                values = points[:, i].numpy()
                ax.hist(values, bins, density=True, histtype="step", color=color, label=title)
            elif (i < j) == bool(k):
                ax.scatter(points[:, j], points[:, i], s=1 + 200 / len(points), color=color)
                ax.set_ylim(low[i], high[i])
            ax.set_xlim(low[j], high[j])
            ax.tick_params(labelsize=7, labelleft=j == 0, labelbottom=i == count - 1)
    for i, name in enumerate(names):
        axes[-1, i].set_xlabel(name)
        axes[i, 0].set_ylabel(name)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def plot_trajectory(frames: Tensor, folder: Path) -> None:
    """Write frames (times, N, C, H, W) in [0, 1] as trajectory.gif, eight images to a row.

    The animation has a steady speed: its frames lie at equal distances on the path, by the mean
    change of a pixel.
    """
    changes = (frames[1:] - frames[:-1]).abs().flatten(1).mean(1)
    distances = np.concatenate([[0], changes.cumsum(0).numpy()])
    steady = np.linspace(0, distances[-1], FRAMES)
    positions = np.interp(steady, distances, np.arange(len(frames)))
    grids = []
    for position in positions:
        before = min(int(position), len(frames) - 2)
        frame = torch.lerp(frames[before], frames[before + 1], position - before)
        grids.append((255 * image_grid(frame, columns=8)).round().astype(np.uint8))
    # One palette for all frames, without dithering: a pixel that stands still does not flicker.
    together = Image.fromarray(np.concatenate(grids)).quantize(256, Image.Quantize.MEDIANCUT)
    scale = max(1, round(WIDTH / together.width))
    pictures = []
    for colours in np.split(np.asarray(together), FRAMES):
        picture = Image.fromarray(colours.repeat(scale, 0).repeat(scale, 1), "P")
        picture.putpalette(together.getpalette())
        pictures.append(picture)
    durations = [60] * (FRAMES - 1) + [2000]  # milliseconds
    options = {"append_images": pictures[1:], "duration": durations, "loop": 0}
    pictures[0].save(folder / "trajectory.gif", save_all=True, **options)
