"""Samples of a trained flow: `python src/sample.py ckpt_path=outputs/…/best.ckpt`. --help lists what can be set."""

import hydra
from omegaconf import DictConfig

import cli


@hydra.main(version_base="1.3", config_path=str(cli.CONF), config_name="sample")
@cli.job
def main(cfg: DictConfig) -> None:
    """Write samples.png and samples.npy; for 2-D flows plane.png; strip.png, trajectory.gif, interpolation.png if wanted."""
    from pathlib import Path

    import numpy as np
    import torch
    from hydra.core.hydra_config import HydraConfig
    from rich.console import Console
    from rich.progress import track

    from build import from_checkpoint
    from rnode.allocator import keep_freed_memory
    from rnode.errors import is_int, is_number, require
    from rnode.pictures import draw_plane, draw_trajectory, save_points
    from rnode.processes import gathered, share

    cli.quiet()
    keep_freed_memory()
    require(is_int(cfg.n, at_least=1), "n", cfg.n, "a whole number of samples, 1 or more")
    require(is_number(cfg.temperature, at_least=0), "temperature", cfg.temperature, "a number, 0 or more")
    require(isinstance(cfg.trajectory, bool), "trajectory", cfg.trajectory, "true or false")
    data, flow, fabric = from_checkpoint(cfg)
    ends = interpolation_ends(cfg, data) if cfg.interpolate is not None else None
    folder = Path(HydraConfig.get().runtime.output_dir)
    images = data.dequantize is not None

    torch.manual_seed(cfg.seed)
    parameter = next(flow.parameters())
    z = cfg.temperature * torch.randn(cfg.n, flow.d, dtype=parameter.dtype)
    rank, processes = share()
    parts = list(enumerate(z.split(data.eval_batch_size)))[rank::processes]  # z is the same in all of them
    with torch.no_grad():
        drawn = [
            (i, flow.inverse(part.to(parameter.device)).cpu(), flow.nfe_inverse)
            for i, part in track(parts, "samples", disable=not fabric.is_global_zero)
        ]
        _, y, nfe = zip(*sorted(gathered(drawn), key=lambda part: part[0]), strict=True)
        if not fabric.is_global_zero:
            return
        y = torch.cat(y)
        save_points(data.inverse(y).float(), folder / "samples.png")
        np.save(folder / "samples.npy", (data.dequantize.inverse(data.inverse(y)) if images else y).numpy())
        if (images and cfg.trajectory) or flow.shape == (2,):
            intervals = 3 if images else 32  # an image's flow has several pieces
            frames = flow.trajectory(z[: 16 if images else 200].to(parameter.device), intervals)
            if images:
                draw_trajectory(data.inverse(frames.flatten(0, 1)).view(frames.shape).float().cpu(), folder)
            else:
                draw_plane(flow, frames, folder / "plane.png")
        if ends is not None:
            index = torch.tensor(list(cfg.interpolate))
            z_ends = flow(data.transform(ends.to(parameter.device), index, torch.full(ends.shape, 0.5)).y).z
            # Along this arc z stays a draw of the normal; half-way along a straight line it would be too short.
            angle = torch.linspace(0, torch.pi / 2, 11).to(z_ends)[:, None]
            between = flow.inverse(angle.cos() * z_ends[0] + angle.sin() * z_ends[1])
            save_points(data.inverse(between).float().cpu(), folder / "interpolation.png", columns=len(between))

    console = Console()
    console.print(f"{cfg.n} samples, NFE {sum(nfe) / len(nfe):.1f} a batch by {flow.solver.test.method}")
    console.print(f"folder: {folder}", soft_wrap=True)


def interpolation_ends(cfg: DictConfig, data):
    """The two test images that cfg.interpolate names."""
    from omegaconf import ListConfig

    from rnode.errors import InputError, is_int, require

    if data.dequantize is None:
        raise InputError(f"interpolate={cfg.interpolate}: must be left out, for this flow is not of images")
    data.setup()
    rows = data.splits.test
    pair = cfg.interpolate if isinstance(cfg.interpolate, ListConfig) else []
    right = f"two numbers of test images, from 0 to {len(rows) - 1}, such as [0,1]"
    valid = len(pair) == 2 and all(is_int(i, at_least=0) and i < len(rows) for i in pair)
    require(valid, "interpolate", cfg.interpolate, right)
    return rows[list(pair)]


if __name__ == "__main__":
    cli.run(main, "sample.py", "Draw samples of a trained flow.")
