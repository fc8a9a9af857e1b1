"""The configuration: a type, a range and a sentence for each key, and --help, which prints them."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from pydantic import (
    BaseModel,
    Field,
    Json,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from rnode.names import ADAPTIVE_METHODS, DIVERGENCES, FIXED_GRID, GRADIENTS, INTEGRALS, NORMS
from rnode.training.results import RESULTS

PACKAGE = Path(__file__).resolve().parent.parent
CHECKOUT = PACKAGE.parent.parent
CONF = next(path / "conf" for path in (PACKAGE, CHECKOUT) if (path / "conf").is_dir())

Context = Json[dict[str, Any]] | dict[str, Any]  # JSON takes every name
Bounds = Annotated[list[float], Field(min_length=2, max_length=2)]
Name = str | int | float | bool | None  # of a column, as YAML reads it: 2019, true and null too
Strategy = Literal["auto", "ddp", "ddp_find_unused_parameters_true"]
Time = Annotated[str, Field(pattern=r"^(\d\d:)?\d\d:\d\d:\d\d$")]  # [DD:]HH:MM:SS


class Section(BaseModel, strict=True, allow_inf_nan=False):
    """The options of a class or function, which refuses those that it does not take."""


def key(description: str, default: Any = ...) -> Any:
    return Field(default, description=description)


class Dataset(Section):
    batch_size: PositiveInt | None = key("samples in a step; null: follows their number", None)
    eval_batch_size: PositiveInt | None = key("samples at a time in validation and test")
    seed: NonNegativeInt = key("seed of data order and noise", 0)
    alpha: Annotated[float, Field(gt=0, lt=0.5)] | None = key("α of the logit transform", None)
    flip: bool = key("flip training images at random", False)
    name: str | None = key("which data set of this kind", None)
    root: str | None = key("folder of the data, which are downloaded there if missing", None)
    train: PositiveInt | None = key("points of an epoch, sampled afresh for every batch", None)
    validation: PositiveFloat | None = key("validation samples: a number, or a share", None)
    test: PositiveFloat | None = key("test samples: a number, or a share of all", None)
    resize: PositiveInt | None = key("side of the images; a smaller one averages pixels", None)
    size: PositiveInt | list[PositiveInt] | None = key("side of images, or [height, width]", None)
    channels: Literal[1, 3] | None = key("1 for grey images, 3 for RGB", None)
    on_error: Literal["stop", "skip"] | None = key("stop at a broken file, or leave it out", None)
    stride: PositiveInt | None = key("pixels from one patch to the next", None)
    path: str | None = key("file of a table: CSV, TSV, Parquet, Arrow or .npy", None)
    columns: list[Name] | None = key("columns that are modelled; null: all numeric ones", None)
    context: list[Name] | Literal["label"] | None = key("conditions: columns, or label", None)
    integer: list[Name] | None = key("columns of whole numbers, which are dequantized", None)
    log: list[Name] | None = key("positive columns whose logarithm is modelled", None)
    logit: dict[Name, Bounds] | None = key("{column: [low, high]} whose logit is modelled", None)
    weight: Name = key("column of the rows' weights; null: all are 1", None)
    missing: Literal["stop", "drop"] | None = key("stop at a missing value, or drop its row", None)
    split_column: Name = key("column that says train, val or test; null: by chance", None)


class Model(Section):
    hidden: PositiveInt = key("channels, or units, of a hidden layer", 64)
    layers: Annotated[int, Field(ge=2)] = key("layers of a piece's network", 4)
    pieces: PositiveInt = key("pieces before and after each squeeze", 1)


class Method(Section):
    method: Literal[FIXED_GRID + ADAPTIVE_METHODS] | None = key("method of torchdiffeq")
    integrals: Literal[INTEGRALS] | None = key("how l, E, n are computed: with z, or by quadrature")
    steps: PositiveInt | None = key("steps of a fixed grid")
    rtol: PositiveFloat | None = key("relative tolerance of adaptive steps")
    atol: PositiveFloat | None = key("absolute tolerance of adaptive steps")
    first_step: PositiveFloat | None = key("first step that an adaptive method tries")
    norm: Literal[NORMS] | None = key("adaptive steps bound the error of all rows, or their mean")


class Solver(Section):
    gradient: Literal[GRADIENTS] = key("how gradients are computed", "backprop")
    dtype: Literal["float32", "float64"] | None = key("least precise dtype of z, l, E and n")
    train: Method = key("the method that trains", None)
    test: Method = key("the method of validation, test and sampling")


class Regularizer(Section):
    lambda_k: NonNegativeFloat = key("λ_K, weight of the kinetic energy")
    lambda_j: NonNegativeFloat = key("λ_J, weight of the Jacobian's squared Frobenius norm")


class Optimizer(Section):
    lr: NonNegativeFloat = key("learning rate")
    weight_decay: NonNegativeFloat = key("L2 penalty of the weights")


class Trainer(Section):
    max_epochs: int | None = key("epochs to train for (section 6: 100)")
    max_steps: int = key("training steps after which the run stops; -1: no limit")
    max_time: Time | None = key("time after which the run stops, as [DD:]HH:MM:SS")
    accelerator: str = key("cpu, gpu, mps, … or auto")
    devices: Any = key("number of devices, their indices, or auto")
    num_nodes: PositiveInt = key("number of machines")
    strategy: Strategy | dict = key("how devices share the work; ddp for several")
    precision: Literal["32-true", "bf16-mixed", "64-true"] | None = key("bf16-mixed: inside f only")
    gradient_clip_val: NonNegativeFloat | None = key("largest norm of the gradient; null: any")
    accumulate_grad_batches: PositiveInt = key("batches of a training step")
    log_every_n_steps: NonNegativeInt = key("training steps between two rows of metrics.csv")
    limit_train_batches: PositiveFloat | None = key("number or share of the training batches")
    limit_val_batches: NonNegativeFloat | None = key("number or share of the validation batches")
    limit_test_batches: NonNegativeFloat | None = key("number or share of the test batches")
    enable_progress_bar: bool = key("print how far the run is")


class Entry(Section):
    """A callback or a logger."""

    every_n_steps: PositiveInt | None = key("steps between checkpoints, or validations", None)
    every_n_epochs: PositiveInt | None = key("epochs from one samples.png to the next", None)
    patience: PositiveInt = key("validations without a better one that stop a run", 3)
    tolerance: NonNegativeFloat = key("bits/dim by which a finer grid has to differ", 0.0)

    mode: Literal["offline", "online", "disabled"] = key("offline, online or disabled", "offline")
    project: str | None = key("W&B project", None)
    name: str | None = key("name of the run; null: its folder, or its swept overrides", None)
    group: str | None = key("group of the run; null: its sweep", None)
    tags: list[str] = key("tags of the run, beside its choices of data set, model and solver", [])


class Train(Section, extra="forbid"):
    """Train a continuous normalizing flow (RNODE); -m sweeps over a=1,2 b=3,4."""

    seed: NonNegativeInt = key("seed of weights, data order, noise and probes")
    folder: str = key("the run folder, or that of a whole sweep")
    divergence: Literal[DIVERGENCES] = key("probes of div f and of the Jacobian norm")
    probes: PositiveInt = key("random probes of a sample")
    base: Literal["normal", "gaussian", "mixture", "auto"] = key(
        "distribution of z; auto: a Gaussian in training, and then a mixture that is fitted to z"
    )
    dequantization: Literal["uniform", "variational"] = key("noise of images: uniform, or learned")
    warmup_steps: NonNegativeInt | None = key("steps of a linear warm-up; null: 50, or two epochs")
    decay: bool = key("let the learning rate fall to 0 by max_epochs or max_time (half a cosine)")
    threads: PositiveInt | None = key("of a CPU; null: OMP_NUM_THREADS, or the fastest number")
    ckpt_path: str | None = key("checkpoint to resume; auto: last.ckpt of the run folder, if any")
    sweep_metrics: list[Literal[RESULTS]] = key("results that a guided sweep optimizes")
    dataset: Dataset = key("the data")
    model: Model = key("the flow")
    solver: Solver = key("the ODE methods")
    reg: Regularizer = key("the penalties of equation (17)")
    optimizer: Optimizer = key("torch.optim.Adam, or another class by optimizer._target_")
    trainer: Trainer = key("Lightning's Trainer; +trainer.OPTION=… sets any other option of it")
    callbacks: dict[str, Entry | None] = key("Lightning's; +callbacks.NAME._target_=… adds one")
    logger: dict[str, Entry | None] = key("Lightning's; +logger.NAME._target_=… adds one")


class FromCheckpoint(Section, extra="forbid"):
    folder: str = key("where files are written")
    ckpt_path: str = key("checkpoint of a run, such as outputs/…/best.ckpt")
    seed: NonNegativeInt = key("seed of noise, probes and samples")
    trust: list[str] = key("your own packages, whose classes the checkpoint may name: [mydata]")
    divergence: Literal[DIVERGENCES] | None = key("probes of images; null: the run's; tables: none")
    probes: PositiveInt | None = key("random probes of a sample; null: the run's")
    solver: Solver = key("the ODE method; null: the run's own")
    device: Literal["auto", "cpu", "cuda", "mps"] = key("auto: an accelerator if there is one")
    dataset: Dataset = key("the data; null: the run's own")


class Evaluate(FromCheckpoint):
    """Measure a trained flow on its data: rnode evaluate outputs/…/best.ckpt"""

    split: Literal["test", "val"] = key("the split that is evaluated")
    samples: PositiveInt = key("dequantizations of each image in the importance-weighted bound")


class Sample(FromCheckpoint):
    """Sample from a trained flow: rnode sample outputs/…/best.ckpt"""

    n: PositiveInt = key("number of samples")
    context: Context = key('conditions: context.COLUMN=VALUE, or context={"COLUMN": VALUE}')
    temperature: NonNegativeFloat = key("standard deviation of z")
    trajectory: bool = key("save the way from noise to images as an animation")


class Score(FromCheckpoint):
    """Score new data by a trained flow: rnode score outputs/…/best.ckpt path=FILE"""

    path: str = key("table or folder of new data")
    id: list[Name] = key("columns of the table that are copied beside the scores")
    contributions: bool = key("add the gradient of log p by each column of a table")
    context: Context = key('conditions: context.COLUMN=VALUE, or context={"COLUMN": VALUE}')


class Reproduce(Section, extra="forbid"):
    """Reproduce a figure or the table of the paper: rnode reproduce figure=2"""

    figure: Literal[1, 2, 3, 4, 5] | None = key("figure of the paper, 1 to 5")
    table: Literal[1] | None = key("table of the paper, 1")
    discussion: Literal[1] | None = key("classifiers of section 9, 1")
    scale: Literal["small", "paper"] = key("small: minutes on 2 cores; paper: its data, on a GPU")
    train: bool = key("run what is missing; false: use the runs that have finished")
    root: str = key("folder of FashionMNIST, MNIST and CIFAR10, downloaded there if missing")
    launcher: str = key("Hydra's launcher of the runs")


class Report(Section, extra="forbid"):
    """Compare runs in a browser: rnode report outputs/… outputs/…"""

    folders: list[str] = key("folders that are or hold runs and sweeps")


class Dashboard(Section, extra="forbid"):
    """Add the views of the paper's figures to a W&B project: rnode dashboard entity=NAME"""

    entity: str = key("W&B user or team")
    project: str = key("W&B project")


COMMANDS = {
    "train": Train,
    "evaluate": Evaluate,
    "sample": Sample,
    "score": Score,
    "report": Report,
    "dashboard": Dashboard,
    "reproduce": Reproduce,
}


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries and lists by dotted keys."""
    if isinstance(value, list) and any(isinstance(part, dict | list) for part in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        return {path: value}
    parts = (flatten(child, f"{path}.{key}".removeprefix(".")) for key, child in value.items())
    return {key: leaf for part in parts for key, leaf in part.items()}


def help_text(command: str, cfg: DictConfig) -> str:
    """Describe a command, its groups, and its keys with their values in `cfg`."""
    lines = [COMMANDS[command].__doc__, f"\nusage: rnode {command} [group=option …] [key=value …]"]
    for group, choice in HydraConfig.get().runtime.choices.items():
        if "/" in group or "@" in group:
            continue
        lines += ["", f"{group}={choice or ''}"]
        for file in sorted((CONF / group).glob("*.yaml")):
            comments = file.read_text("utf-8").splitlines()
            about = next(line for line in comments if not line.startswith("# @package"))
            lines.append(f"  {file.stem:<20}{about[2:]}")
    lines += ["", "keys, with their values in brackets; --cfg job --resolve prints them as YAML:"]
    config = OmegaConf.to_container(cfg, resolve=True)
    return "\n".join([*lines, *describe_keys(COMMANDS[command], config)])


def describe_keys(schema: type, config: dict, path: str = "") -> list[str]:
    """One line for each key of a section: its name, its sentence and its value."""
    lines = []
    for name, value in config.items():
        if name.startswith("_") or name == "source":  # for Hydra
            continue
        field = getattr(schema, "model_fields", {}).get(name)
        about = field.description if field else "an option of the class"
        if isinstance(value, dict):
            lines.append(f"{path}{name}: {value.get('_target_', about)}")
            section = field.annotation if field else Entry
            lines += describe_keys(section, value, f"{path}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            lines.append(f"  {path + name:<33} {about} [{text}]")
    return lines
