"""Sweeps (`-m`): when a job is finished, what a failed one leaves, and the table and the picture of them all.

A job's folder says what became of it, to whichever process or machine looks: result.json is written at a run's very end,
diverged.txt or failed.txt holds the line with which the last job in this folder ended. Without any of them it was cut off.
"""

import csv
import functools
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from multiprocessing import current_process
from pathlib import Path
from typing import NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

import cli

RESULT, DIVERGED, FAILED = "result.json", "diverged.txt", "failed.txt"
OBJECTIVES = {
    "bits_per_dim": ["val/bits_per_dim"],
    "bits_per_dim_and_nfe": ["val/bits_per_dim", "val/nfe_forward"],
}
TESTED = [f"test/{name}" for name in ("bits_per_dim", "bits_per_dim_se", "nfe_forward", "kinetic", "jacobian")]
# Of a configuration, what is not the run itself. A run whose limits are changed is not another run: it goes on to them.
LIMITS = [f"trainer.{name}" for name in ("max_epochs", "max_steps", "max_time", "min_epochs", "min_steps")]
SURROUNDINGS = ["ckpt_path", "objective", "save_every_n_steps", "compile", "wandb", "pictures", "dataset.root"]
SURROUNDINGS += [f"trainer.{name}" for name in ("accelerator", "strategy", "log_every_n_steps", "on_divergence", "profiler")]
SURROUNDINGS += [f"trainer.{name}" for name in ("enable_progress_bar", "enable_model_summary")]
LAMBDAS = {"reg.lambda_k": "λ_K", "reg.lambda_j": "λ_J"}
COLUMNS = {
    "val/bits_per_dim": ("val bits/dim", "{:.4f}"),
    "test/bits_per_dim": ("test bits/dim", "{:.4f}"),
    "train/nfe_forward": ("NFE train", "{:.0f}"),
    "val/nfe_forward": ("NFE val", "{:.0f}"),
    "train/seconds": ("seconds", "{:.1f}"),
}
PANELS = ("val/bits_per_dim", "val/nfe_forward", "train/seconds")


def write_result(folder: Path, metrics: dict, best: float) -> dict[str, float | None]:
    """Put result.json in the folder of a run that is finished. Returns what it holds, by the names of metrics.csv.

    val/… are those of the best weights (`best` bits/dim), train/nfe_… of the last logged step, train/seconds without
    validation. What was not measured is null.
    """
    from rnode.files import whole_file
    from rnode.metrics import read_metrics

    rows = read_metrics(folder / "metrics.csv")
    seconds = [float(row["train/seconds_per_epoch"]) for row in rows if "train/seconds_per_epoch" in row]
    trained = next((row for row in reversed(rows) if "train/nfe_forward" in row), {})
    validated = [row for row in rows if "val/bits_per_dim" in row]
    chosen = min(validated, key=lambda row: abs(float(row["val/bits_per_dim"]) - best), default={})
    found = {
        "val/bits_per_dim": best,
        "val/nfe_forward": chosen.get("val/nfe_forward", math.nan),
        "train/seconds": sum(seconds) if seconds else math.nan,
        **{name: trained.get(name, math.nan) for name in ("train/nfe_forward", "train/nfe_backward")},
        **{name: metrics.get(name, math.nan) for name in TESTED},
    }
    numbers = {name: float(value) for name, value in found.items()}
    result = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    with whole_file(folder / RESULT, "w") as file:
        json.dump(result, file, indent=2)
    (folder / FAILED).unlink(missing_ok=True)
    return result


def read_result(folder: Path) -> dict[str, float | None] | None:
    """What a finished run came to; None if it is not finished."""
    path = folder / RESULT
    return json.loads(path.read_text()) if path.exists() else None


def objective(cfg: DictConfig, result: dict) -> float | list[float]:
    """What of a result a guided sweep minimizes; nan where it was not measured."""
    values = [math.nan if result.get(name) is None else result[name] for name in OBJECTIVES[cfg.objective]]
    return values if len(values) > 1 else values[0]


def is_job() -> bool:
    return HydraConfig.get().mode == RunMode.MULTIRUN


def earlier_result(cfg: DictConfig, folder: Path) -> dict[str, float | None] | None:
    """The result that the job `cfg` already has in its folder; InputError if the run there is of another configuration."""
    from rnode.errors import InputError

    if not any((folder / name).exists() for name in ("last.ckpt", "best.ckpt", RESULT)):
        return None
    theirs, ours = (flat(config) for config in (OmegaConf.load(folder / "config.yaml"), cfg))
    changed = {key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)}
    changed = {key for key in changed if not any(f"{key}.".startswith(f"{name}.") for name in SURROUNDINGS)}
    if other := sorted(changed - set(LIMITS)):
        words = [f"{key} is {theirs.get(key)} there and {ours.get(key)} here" for key in other[:3]]
        more = [f"{len(other) - 3} more"] if len(other) > 3 else []
        raise InputError(f"{folder}: holds a run of another configuration ({'; '.join(words + more)}); take another folder")
    return None if changed else read_result(folder)


def refuse_own_processes(trainer) -> None:
    """Lightning would start them with the command line of the sweep, and each would run the whole of it."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if is_job() and trainer.world_size > 1 and environment is not None and not environment.creates_processes_externally:
        right = "1 in a sweep, unless a cluster starts the processes (hydra.launcher.tasks_per_node=… of submitit_slurm)"
        refuse("trainer.devices", trainer.num_devices, right)


def flat(config: DictConfig) -> dict[str, object]:
    """Dotted key: value, as YAML gives it back."""
    found: dict[str, object] = {}

    def visit(value: object, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, child in value.items():
                visit(child, f"{path}.{key}" if path else str(key))
        else:
            found[path] = value

    visit(OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(config, resolve=True))), "")
    return found


def job(function: Callable) -> Callable:
    """In a sweep, a run that fails leaves its line in its folder and None to the sweeper, and the other jobs go on.

    (Hydra's way, an error that is kept until all jobs have ended, would leave out the table, and whether an error can be
    sent from one process to another is up to its class.) A signal ends the whole sweep.
    """

    @functools.wraps(function)
    def wrapped(cfg: DictConfig) -> float | list[float] | None:
        if not is_job():
            return function(cfg)
        from rnode.errors import Stopped

        folder = Path(HydraConfig.get().runtime.output_dir)
        parallel = current_process().name != "MainProcess"
        if parallel:
            stop_with_parent()
        for name in (DIVERGED, FAILED):
            (folder / name).unlink(missing_ok=True)
        try:
            return function(cfg)
        except Stopped as stopped:
            go_on = f"to go on with the sweep, give its command hydra.sweep.dir={HydraConfig.get().sweep.dir}"
            print(f"stopped: {stopped}; {go_on}", file=sys.stderr, flush=True)
            code = 128 + stopped.signal
            if parallel:
                os._exit(code)  # an exception would be sent to the parent, and the next job begun
            sys.exit(code)
        except Exception as error:
            note(error, folder)
            return None

    return wrapped


def stop_with_parent() -> None:
    """Joblib's workers would otherwise go on with what is in their queue when the sweep has been ended by a signal."""
    if sys.platform == "linux":
        import ctypes

        set_signal_of_parents_death = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_signal_of_parents_death, signal.SIGTERM)


def note(error: Exception, folder: Path) -> None:
    """Say why a job failed, now and in its folder."""
    from pytorch_lightning.utilities import rank_zero_only

    line, _ = cli.explain(error)
    if line is None or cli.FULL_ERROR:  # a bug of ours, or asked for
        import traceback

        traceback.print_exception(error)
    line = line or f"{type(error).__name__}: {cli.one_line(error)}"
    if rank_zero_only.rank > 0:
        return
    print(f"error: job {folder.name}: {line}", file=sys.stderr, flush=True)
    try:
        if not (folder / DIVERGED).exists():
            (folder / FAILED).write_text(f"{line}\n")
    except OSError:  # a full disk: the sweep's end says that the job has no result
        pass


class Job(NamedTuple):
    """What became of a job, as its folder has it."""

    name: str
    swept: dict[str, str]
    status: str
    result: dict[str, float | None]
    line: str = ""

    @property
    def told(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.swept.items())])


def read_jobs(folder: Path, hydra_folder: str) -> list[Job]:
    """The jobs of a sweep, `swept` holding the overrides in which they differ."""
    found = {path.parent.parent: OmegaConf.load(path) for path in folder.rglob(f"{hydra_folder}/overrides.yaml")}
    overrides = {path: dict(str(text).lstrip("+").split("=", 1) for text in o if "=" in text) for path, o in found.items()}
    keys = list(dict.fromkeys(key for given in overrides.values() for key in given))
    keys = [key for key in keys if len({given.get(key) for given in overrides.values()}) > 1]
    names = sorted((str(path.relative_to(folder)) for path in overrides), key=by_number)
    return [read_job(folder / name, name, {key: overrides[folder / name].get(key, "") for key in keys}) for name in names]


def read_job(folder: Path, name: str, swept: dict[str, str]) -> Job:
    for status, file in (("failed", FAILED), ("diverged", DIVERGED)):
        if (folder / file).exists() and not (status == "diverged" and (folder / RESULT).exists()):
            return Job(name, swept, status, {}, (folder / file).read_text().strip())
    result = read_result(folder)
    if result is None:
        return Job(name, swept, "unfinished", {}, "was cut off, or is still running")
    return Job(name, swept, "finished", result)


def by_number(name: str) -> list:
    """For sorting: 10 after 9."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name) if part]


class Sweep(Callback):
    """What is done before and after the jobs of a sweep, in the process that the user started."""

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        cli.one_line_errors(prepare)(config)  # Hydra makes a warning of any other exception of a callback

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        cli.one_line_errors(conclude)(config)


def prepare(config: DictConfig) -> None:
    """Settle what follows from the choice of sweeper and launcher."""
    if config.objective not in OBJECTIVES:
        refuse("objective", config.objective, " or ".join(OBJECTIVES))
    sweeper, launcher = config.hydra.sweeper, config.hydra.launcher
    if "max_failure_rate" in sweeper:  # optuna's
        directions = ["minimize"] * len(OBJECTIVES[config.objective])
        given = sweeper.direction if OmegaConf.is_list(sweeper.direction) else [sweeper.direction]
        if [getattr(direction, "name", direction) for direction in given] not in (["minimize"], directions):
            refuse("hydra.sweeper.direction", sweeper.direction, f"left out: objective={config.objective} sets it")
        if sweeper.max_failure_rate not in (0, 1):
            name, rate = "hydra.sweeper.max_failure_rate", sweeper.max_failure_rate
            refuse(name, rate, "left out: a failed job never ends the sweep")
        sweeper.direction, sweeper.max_failure_rate = directions, 1.0
        if "seed" in sweeper.sampler and sweeper.sampler.seed is None:
            sweeper.sampler.seed = config.seed  # started again, it asks for the same jobs and finds them in their folders
    if launcher._target_.endswith("JoblibLauncher"):
        import joblib

        jobs, cores = joblib.effective_n_jobs(launcher.n_jobs), joblib.cpu_count()
        threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, cores // jobs)
        print(f"{cores} cores; jobs at a time (hydra.launcher.n_jobs): {jobs}, threads of each (OMP_NUM_THREADS): {threads}")
    if not launcher._target_.endswith("BasicLauncher"):
        source = str(Path(__file__).parent)
        os.environ["PYTHONPATH"] = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches joblib's workers too: they end by themselves


def refuse(name: str, value: object, right: str) -> None:
    from rnode.errors import InputError  # brings torch, for which a sweep that is as it must be need not wait here

    raise InputError(f"{name}={value}: must be {right}")


def conclude(config: DictConfig) -> None:
    """Table, sweep.csv and sweep.png; a line for each job that is not finished, and then exit code 1."""
    from rich.console import Console

    folder = Path(config.hydra.sweep.dir)
    jobs = read_jobs(folder, config.hydra.output_subdir) if config.hydra.output_subdir else []
    console = Console(highlight=False)
    if any(job.status == "finished" for job in jobs):
        write_table(jobs, folder / "sweep.csv")
        console.print(table(jobs))
        drawn = draw(jobs, folder / "sweep.png")
        console.print(f"written to {folder / 'sweep.csv'}{' and sweep.png' if drawn else ''}", soft_wrap=True)
    else:
        console.print(f"no job of {folder} is finished", soft_wrap=True)
    for job in (job for job in jobs if job.status != "finished"):
        print(f"{job.status}: {job.told}: {job.line}", file=sys.stderr)
    if any(job.status != "finished" for job in jobs):
        sys.exit(1)


def write_table(jobs: list[Job], path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        names = next(list(job.result) for job in jobs if job.result)
        writer.writerow(["job", *jobs[0].swept, "status", *names])
        for job in jobs:
            writer.writerow([job.name, *job.swept.values(), job.status, *(job.result.get(name) for name in names)])


def table(jobs: list[Job]):
    """The jobs as a rich.table.Table, the one of the least validation bits/dim in bold."""
    from rich.table import Table

    shown = Table("job", *(LAMBDAS.get(key, key) for key in jobs[0].swept), *(label for label, _ in COLUMNS.values()))
    finished = [job for job in jobs if job.result.get("val/bits_per_dim") is not None]
    best = min(finished, key=lambda job: job.result["val/bits_per_dim"], default=None)
    for job in jobs:
        values = [job.result.get(name) for name in COLUMNS]
        cells = ["" if v is None else form.format(v) for v, (_, form) in zip(values, COLUMNS.values(), strict=True)]
        cells = cells if job.status == "finished" else [job.status, *cells[1:]]
        shown.add_row(job.name, *job.swept.values(), *cells, style="bold" if job is best else None)
    return shown


def draw(jobs: list[Job], path: Path) -> bool:
    """bits/dim, NFE and time against λ_K and λ_J, as a map, or a curve if one of the two is swept. False if neither is.

    A row of panels for each choice of whatever else is swept; over seeds, the mean.
    """
    swept = [name for name in LAMBDAS if name in jobs[0].swept]
    jobs = [job for job in jobs if all(is_number(job.swept[name]) for name in swept)]
    if not swept or not jobs:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups: dict[str, list[Job]] = {}
    for job in jobs:
        others = [f"{key}={value}" for key, value in job.swept.items() if key not in (*LAMBDAS, "seed")]
        groups.setdefault(" ".join(others), []).append(job)
    size = (15, 4.2 * len(groups))
    figure, axes = plt.subplots(len(groups), len(PANELS), figsize=size, layout="constrained", squeeze=False)
    for row, (title, members) in zip(axes, groups.items(), strict=True):
        for ax, name in zip(row, PANELS, strict=True):
            draw_panel(ax, members, swept, name)
            ax.set_title(" – ".join(filter(None, [COLUMNS[name][0], title])))
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return True


def draw_panel(ax, jobs: list[Job], swept: list[str], name: str) -> None:
    """One quantity against one λ, or against both: as a map if the jobs lie on a grid, otherwise as coloured points."""
    places: dict[tuple[float, ...], list[float]] = {}
    for job in jobs:
        value = job.result.get(name)
        members = places.setdefault(tuple(float(job.swept[key]) for key in swept), [])
        members += [] if value is None else [value]
    means = {place: sum(values) / len(values) for place, values in places.items() if values}
    ax.set(**dict(zip(("xlabel", "ylabel"), (LAMBDAS[key] for key in reversed(swept)), strict=False)))
    axes = [sorted({place[i] for place in places}) for i in range(len(swept))]
    if len(swept) == 1:
        curve = sorted((place[0], mean) for place, mean in means.items())
        ax.plot([x for x, _ in curve], [y for _, y in curve], "o-")
    elif 2 * len(places) < len(axes[0]) * len(axes[1]):  # drawn at random, as a guided sweep does
        failed = [place for place in places if place not in means]
        ax.plot([j for _, j in failed], [k for k, _ in failed], "x", color="0.5")
        points = ax.scatter([j for _, j in means], [k for k, _ in means], c=list(means.values()))
        ax.figure.colorbar(points, ax=ax)
    else:
        draw_map(ax, axes, means, [place for place in places if place not in means], COLUMNS[name][1])


def draw_map(ax, axes: list[list[float]], means: dict, failed: list, form: str) -> None:
    """λ_K upwards, λ_J to the right, the value in each cell; a cross where no job of a cell is finished."""
    grid = [[means.get((k, j), math.nan) for j in axes[1]] for k in axes[0]]
    image = ax.imshow(grid, origin="lower", aspect="auto")
    ax.figure.colorbar(image, ax=ax)
    for number, (ticks, labels) in enumerate(((ax.set_yticks, axes[0]), (ax.set_xticks, axes[1]))):
        ticks(range(len(axes[number])), [f"{value:g}" for value in labels])
    box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1.5}
    for place in [*means, *failed]:
        text = form.format(means[place]) if place in means else "×"
        ax.text(axes[1].index(place[1]), axes[0].index(place[0]), text, ha="center", va="center", bbox=box)


def is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
