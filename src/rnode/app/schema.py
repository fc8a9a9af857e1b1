"""The configuration: a type, a range and a sentence for each key, which --help prints."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rnode.names import ADAPTIVE, DIVERGENCES, FIXED_GRID, GRADIENTS, INTEGRALS

PACKAGE = Path(__file__).resolve().parent.parent
INSTALLED, CHECKOUT = PACKAGE / "conf", PACKAGE.parent.parent / "conf"
CONF = INSTALLED if INSTALLED.is_dir() else CHECKOUT

Whole = Annotated[int, Field(ge=0, le=2**32 - 1)]  # torch and NumPy take no larger seed
Count = Annotated[int, Field(ge=1, le=2**32 - 1)]
Limit = Annotated[int, Field(ge=-1, le=2**32 - 1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bounds = Annotated[list[float], Field(min_length=2, max_length=2)]
Share = Whole | Annotated[float, Field(ge=0, le=1)]  # so many batches, or a share of them
Size = Count | Annotated[float, Field(gt=0, lt=1)]
Some = Count | Annotated[float, Field(gt=0, le=1)]
Strategy = Literal["auto", "ddp", "ddp_find_unused_parameters_true"]
Time = Annotated[str, Field(pattern=r"^(\d\d:)?\d\d:\d\d:\d\d$")]  # [DD:]HH:MM:SS


class Section(BaseModel):
    """The options of a class or function, which refuses those that it does not take."""

    model_config = ConfigDict(strict=True)


class Command(BaseModel):
    """What a command takes."""

    model_config = ConfigDict(strict=True, extra="forbid")


def key(description: str, default: Any = ...) -> Any:
    return Field(default, description=description)


class Dataset(Section):
    batch_size: Count = key("samples in a training step (section 6: 200)")
    eval_batch_size: Count = key("samples at a time in validation and test")
    seed: Whole = key("seed of data order and noise")
    alpha: Annotated[float, Field(gt=0, lt=0.5)] | None = key("α of the logit transform", None)
    flip: bool = key("flip training images at random", False)
    name: str | None = key("which data set of this kind", None)
    root: str | None = key("folder of the data, which are downloaded there if missing", None)
    train: Count | None = key("points of an epoch, sampled afresh for every batch", None)
    validation: Size | None = key("validation samples: a number, or a share", None)
    test: Size | None = key("test samples: a number, or a share of all", None)
    resize: Count | None = key("side of the images; a smaller one averages pixels", None)
    size: Count | list[Count] | None = key("side of images or patches, or [height, width]", None)
    channels: Literal[1, 3] | None = key("1 for grey images, 3 for RGB", None)
    on_error: Literal["stop", "skip"] | None = key("stop at a broken file, or leave it out", None)
    stride: Count | None = key("pixels from one patch to the next", None)
    path: str | None = key("file of a table: CSV, TSV, Parquet, Arrow or .npy", None)
    columns: list[str] | None = key("columns that are modelled; null: all numeric ones", None)
    context: list[str] | Literal["label"] | None = key("conditions: columns, or label", None)
    integer: list[str] | None = key("columns of whole numbers, which are dequantized", None)
    log: list[str] | None = key("positive columns whose logarithm is modelled", None)
    logit: dict[str, Bounds] | None = key("{column: [low, high]} whose logit is modelled", None)
    missing: Literal["stop", "drop"] | None = key("stop at a missing value, or drop its row", None)
    split_column: str | None = key("column that says train, val or test; null: by chance", None)


class Model(Section):
    hidden: Annotated[int, Field(ge=1, le=65536)] = key("channels, or units, of a hidden layer", 64)
    layers: Annotated[int, Field(ge=2, le=100)] = key("layers of a piece's network", 4)
    pieces: Annotated[int, Field(ge=1, le=100)] = key("pieces before and after each squeeze", 1)


class Method(Section):
    method: Literal[FIXED_GRID + ADAPTIVE] = key("method of torchdiffeq")
    integrals: Literal[INTEGRALS] = key("how l, E and n are computed: with z, or by quadrature")
    steps: Annotated[int, Field(ge=1, le=10_000)] = key("steps of a fixed grid")
    rtol: Positive = key("relative tolerance of adaptive steps")
    atol: Positive = key("absolute tolerance of adaptive steps")
    first_step: Positive = key("first step that an adaptive method tries")


class Solver(Section):
    gradient: Literal[GRADIENTS] = key("how gradients are computed")
    dtype: Literal["float32", "float64"] = key("least precise dtype of z, l, E and n")
    train: Method = key("the method that trains")
    test: Method = key("the method of validation, test and sampling")


class Regularizer(Section):
    lambda_k: NonNegative = key("λ_K, weight of the kinetic energy")
    lambda_j: NonNegative = key("λ_J, weight of the Jacobian's squared Frobenius norm")


class Optimizer(Section):
    lr: NonNegative = key("learning rate")
    weight_decay: NonNegative = key("L2 penalty of the weights")


class Trainer(Section):
    max_epochs: Limit | None = key("epochs to train for (section 6: 100)")
    max_steps: Limit = key("training steps after which the run stops; -1: no limit")
    max_time: Time | None = key("time after which the run stops, as [DD:]HH:MM:SS")
    accelerator: str = key("cpu, gpu, mps, … or auto")
    devices: Count | str | list[Whole] = key("number of devices, their indices, or auto")
    num_nodes: Count = key("number of machines")
    strategy: Strategy | dict = key("how devices share the work; ddp for several")
    precision: Literal["32-true", "bf16-mixed", "64-true"] | None = key("bf16-mixed: inside f only")
    gradient_clip_val: NonNegative | None = key("largest norm of the gradient; null: any")
    accumulate_grad_batches: Count = key("batches of a training step")
    log_every_n_steps: Whole = key("training steps from one row of metrics.csv to the next")
    limit_train_batches: Some | None = key("number or share of the training batches of an epoch")
    limit_val_batches: Share | None = key("number or share of the validation batches")
    limit_test_batches: Share | None = key("number or share of the test batches")
    enable_progress_bar: bool = key("print how far the run is")


class Callback(Section):
    every_n_steps: Count | None = key("training steps from one last.ckpt to the next", None)
    every_n_epochs: Count | None = key("epochs from one samples.png to the next", None)
    patience: Count | None = key("validations without a better one that stop a run", None)
    share: Annotated[float, Field(ge=0, le=1)] = key("share of the run by flow matching", 0.0)
    tolerance: NonNegative = key("bits/dim from a finer grid at which the grid is refined", 0.0)


class Logger(Section):
    mode: Literal["offline", "online", "disabled"] = key("offline, online or disabled", "offline")
    project: str | None = key("W&B project", None)
    name: str | None = key("name of the run; null: its folder, or its swept overrides", None)
    group: str | None = key("group of the run; null: its sweep", None)
    tags: list[str] = key("tags of the run, beside its choices of data set, model and solver", [])


class Train(Command):
    """Train a continuous normalizing flow (RNODE); -m sweeps over a=1,2 b=3,4."""

    seed: Whole = key("seed of weights, data order, noise and probes")
    folder: str = key("the run folder, which hydra.run.dir=… sets")
    divergence: Literal[DIVERGENCES] = key("probes of div f and of the Jacobian norm")
    probes: Count = key("random probes of a sample; up to 16 dimensions evaluation is exact")
    dequantization: Literal["uniform", "variational"] = key("noise of images: uniform, or learned")
    warmup_steps: Whole = key("steps over which the learning rate rises linearly")
    decay: bool = key("let the learning rate fall to 0 by max_epochs or max_time (half a cosine)")
    ckpt_path: str | None = key("checkpoint to resume; auto: last.ckpt of the run folder, if any")
    sweep_metrics: list[str] = key("names of result.json that a guided sweep optimizes")
    dataset: Dataset = key("the data")
    model: Model = key("the flow")
    solver: Solver = key("the ODE methods")
    reg: Regularizer = key("the penalties of equation (17)")
    optimizer: Optimizer = key("torch.optim.Adam, or another class by optimizer._target_")
    trainer: Trainer = key("Lightning's Trainer; +trainer.OPTION=… sets any other option of it")
    callbacks: dict[str, Callback | None] = key("Lightning's; +callbacks.NAME._target_=… adds one")
    logger: dict[str, Logger | None] = key("Lightning's; +logger.NAME._target_=… adds one")


class CheckpointData(Section):
    root: str | None = key("folder of the data; null: the run's own")
    path: str | None = key("file of the table; null: the run's own")
    eval_batch_size: Count | None = key("samples at a time; null: the run's own")


class FromCheckpoint(Command):
    folder: str = key("where files are written, which hydra.run.dir=… sets")
    ckpt_path: str = key("checkpoint of a run, such as outputs/…/best.ckpt")
    seed: Whole = key("seed of noise, probes and samples")
    trust: list[str] = key("your own packages, whose classes the checkpoint may name: [mydata]")
    divergence: Literal[DIVERGENCES] | None = key("null: exact up to 16 dimensions, else the run's")
    probes: Count | None = key("random probes of a sample, 4 or more of a table; null: the run's")
    solver: Solver = key("solver.test.…=… and solver.dtype=… replace the run's own")
    device: Literal["auto", "cpu", "cuda", "mps"] = key("auto: an accelerator if there is one")
    dataset: CheckpointData = key("the data")


class Evaluate(FromCheckpoint):
    """Measure a trained flow on its data: rnode evaluate outputs/…/best.ckpt"""

    split: Literal["test", "val"] = key("the split that is evaluated")
    samples: Count = key("dequantizations of each image in the importance-weighted bound")


class Sample(FromCheckpoint):
    """Sample from a trained flow: rnode sample outputs/…/best.ckpt"""

    n: Count = key("number of samples")
    context: dict[str, Any] = key("what a conditional density is given, as context.COLUMN=VALUE")
    temperature: NonNegative = key("standard deviation of z")
    trajectory: bool = key("save the way from noise to images, as a strip and an animation")


class Score(FromCheckpoint):
    """Score new data by a trained flow: rnode score outputs/…/best.ckpt path=FILE"""

    path: str = key("table or folder of new data")
    id: list[str] = key("columns of the table that are copied beside the scores")
    context: dict[str, Any] = key("what a conditional density is given, as context.COLUMN=VALUE")


class Reproduce(Command):
    """Reproduce a figure or the table of the paper: rnode reproduce figure=2"""

    figure: Annotated[int, Field(ge=1, le=5)] | None = key("figure of the paper, 1 to 5")
    table: Annotated[int, Field(ge=1, le=1)] | None = key("table of the paper, 1")
    discussion: Annotated[int, Field(ge=1, le=1)] | None = key("classifiers of section 9, 1")
    scale: Literal["small", "paper"] = key("small: minutes on 2 cores; paper: its data, on a GPU")
    train: bool = key("run what is missing; false: use the runs that have finished")
    root: str = key("folder of FashionMNIST, MNIST and CIFAR10, downloaded there if missing")
    launcher: str = key("Hydra's launcher of the runs")


class Report(Command):
    """Compare runs in a browser: rnode report outputs/… outputs/…"""

    folders: list[str] = key("folders that are or hold runs and sweeps")


class Project(Section):
    entity: str = key("W&B user or team")
    project: str = key("W&B project")


class Dashboard(Command):
    """Add the views of the paper's figures to a W&B project: wandb.entity=NAME"""

    wandb: Project = key("where the runs are")


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
