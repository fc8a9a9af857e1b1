"""Figures 1 to 5 and Table 1 of the paper: `python src/reproduce.py figure=2 scale=small`. --help lists what can be set.

The runs lie in outputs/reproduce/SCALE/runs: those that are finished are not run again, one that was cut off goes on where
it stopped, and figures share them.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

import cli


@hydra.main(version_base="1.3", config_path=str(cli.CONF), config_name="reproduce")
@cli.job
def main(cfg: DictConfig) -> None:
    """Train what is missing; write a PNG, a CSV and the verdict, and print the last two."""
    from hydra.core.hydra_config import HydraConfig
    from rich.console import Console

    from paper import KNOWN, SCALES
    from rnode.errors import InputError, require

    asked = [f"{name}{cfg[name]}" for name in ("figure", "table") if cfg[name] is not None]
    if len(asked) != 1 or asked[0] not in KNOWN:
        given = f"figure={cfg.figure} table={cfg.table}"
        raise InputError(f"{given}: must be one of {', '.join(f'{name[:-1]}={name[-1]}' for name in KNOWN)}")
    require(cfg.scale in SCALES, "scale", cfg.scale, " or ".join(SCALES))
    require(isinstance(cfg.train, bool), "train", cfg.train, "true or false")

    folder = Path(HydraConfig.get().runtime.output_dir)
    figure = KNOWN[asked[0]]
    wanted = figure.runs(cfg.scale, folder / "runs")
    if cfg.train:
        train([run for run in wanted if not run.over], cfg)
    runs = [run for run in wanted if run.over]
    if not runs:
        raise InputError(f"{folder / 'runs'}: holds no finished run for {asked[0]}; with train=true they are made")
    verdict = figure.draw(runs, folder / asked[0])
    missing = f" ({len(runs)} of {len(wanted)} runs are finished)" if len(runs) < len(wanted) else ""
    (folder / f"{asked[0]}.txt").write_text(verdict + missing + "\n")
    console = Console()
    print_csv(folder / f"{asked[0]}.csv", console)
    console.print(verdict + missing, soft_wrap=True, highlight=False)
    console.print(f"written to {folder / asked[0]}.png, .csv and .txt", soft_wrap=True, highlight=False)


def train(runs: list, cfg: DictConfig) -> None:
    """One sweep of train.py for each set of overrides: seeds in the outer loop, recipes in the inner one."""
    import subprocess
    import sys

    from paper import DATA, DOWNLOADED

    sweeps: dict[tuple, list] = {}
    for run in runs:
        sweeps.setdefault((run.data, *run.overrides), []).append(run)
    for (data, *overrides), members in sweeps.items():
        folder = members[0].folder.parent
        subprocess.run(
            [
                sys.executable,
                str(Path(__file__).with_name("train.py")),
                "-m",
                f"hydra.sweep.dir={folder}",
                f"hydra.sweep.subdir={data}_${{hydra:runtime.choices.recipe}}_${{seed}}",
                f"hydra/launcher={cfg.launcher}",
                "seed=" + ",".join(dict.fromkeys(str(run.seed) for run in members)),
                "recipe=" + ",".join(dict.fromkeys(run.recipe for run in members)),
                *DATA[data],
                *([f"dataset.root={cfg.root}"] if data in DOWNLOADED else []),
                *overrides,
                "ckpt_path=auto",
                "wandb.mode=disabled",
            ],
            check=False,  # a run that diverged is part of the figure
        )


def print_csv(path: Path, console) -> None:
    import csv

    from rich.table import Table

    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    if len(rows) > 30:  # a curve
        return
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    cli.run(main, "reproduce.py", "Reproduce a figure or the table of the paper.")
