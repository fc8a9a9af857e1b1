"""The configuration: a type, a range and a sentence for each key, which --help prints."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

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
Time = Annotated[str, BeforeValidator(str), Field(pattern=r"^(\d\d:)?\d\d:\d\d:\d\d$")]


def check_size(value: float) -> float:
    if value <= 0 or (isinstance(value, float) and value >= 1):
        raise ValueError("a whole number from 1 on, or a share between 0 and 1")
    return value


Size = Annotated[int | float, AfterValidator(check_size)]


class Section(BaseModel):
    """A section in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)


class OpenSection(BaseModel):
    """A section of a class that takes more options, and may be the user's own."""

    model_config = ConfigDict(extra="allow", strict=True)


def key(description: str, default: Any = ...) -> Any:
    return Field(default, description=description)


class Dataset(OpenSection):
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


class Model(OpenSection):
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


class Optimizer(OpenSection):
    lr: NonNegative = key("learning rate")
    weight_decay: NonNegative = key("L2 penalty of the weights")


class Devices(Section):
    accelerator: str = key("cpu, gpu, mps, … or auto")
    devices: Count | str | list[Whole] = key("number of devices, their indices, or auto")
    num_nodes: Count = key("number of machines")
    strategy: str | dict = key("how devices share the work; ddp for several")


class Trainer(Devices, OpenSection):
    max_epochs: Limit | None = key("epochs to train for (section 6: 100)")
    max_steps: Limit = key("training steps after which the run stops; -1: no limit")
    max_time: Time | None = key("time after which the run stops, as [DD:]HH:MM:SS")
    precision: Literal["32-true", "bf16-mixed", "64-true"] | None = key(
        "32-true, bf16-mixed (bfloat16 inside f alone) or 64-true"
    )
    gradient_clip_val: NonNegative | None = key("largest norm of the gradient; null: any")
    accumulate_grad_batches: Count = key("batches of a training step")
    log_every_n_steps: Whole = key("training steps from one row of metrics.csv to the next")
    limit_train_batches: Share | None = key("number or share of the training batches of an epoch")
    limit_val_batches: Share | None = key("number or share of the validation batches")
    limit_test_batches: Share | None = key("number or share of the test batches")
    num_sanity_val_steps: Limit = key("validation batches before training")
    enable_progress_bar: bool = key("print how far the run is")
    enable_model_summary: bool = key("print every layer")
    inference_mode: bool = key("evaluate in torch's inference mode")


class Entry(OpenSection):
    """A callback or a logger; without `_target_` it is not made."""

    folder: str | None = key("the run folder", None)


class Save(Entry):
    every_n_steps: Count = key("training steps from one last.ckpt to the next within an epoch")


class Figures(Entry):
    every_n_epochs: Count = key("epochs from one samples.png and curves.png to the next")


class EarlyStopping(Entry):
    patience: Count | None = key("validations without a better one that stop a run; null: never")


class Pretraining(Entry):
    share: Annotated[float, Field(ge=0, le=1)] = key("share of the run by flow matching")


class RefineGrid(Entry):
    tolerance: NonNegative = key("bits/dim from a finer grid at which the grid is refined")


class Entries(OpenSection):
    """Entries by their names; null leaves one out."""

    @model_validator(mode="before")
    @classmethod
    def without_null(cls, entries: Any) -> Any:
        if not isinstance(entries, dict):
            return entries
        return {name: entry for name, entry in entries.items() if entry is not None}


class Callbacks(Entries):
    gaussian: Entry = key("the likelihood of a Gaussian, as a baseline", None)
    cost: Entry = key("times and evaluations of f", None)
    save: Save = key("last.ckpt, from which a stopped run resumes", None)
    best: Entry = key("best.ckpt, of the least validation bits/dim", None)
    figures: Figures = key("figures of the run", None)
    early_stopping: EarlyStopping = key("when a run stops before its last epoch", None)
    tf32: Entry = key("TF32 in the convolutions of training steps on a fixed grid", None)
    progress: Entry = key("the progress bar and the lines of a run", None)
    pretraining: Pretraining = key("flow matching before equation (17)", None)
    refine_grid: RefineGrid = key("a finer grid where it changes the likelihood", None)


class Wandb(Entry):
    mode: Literal["offline", "online", "disabled"] = key("offline, online or disabled")
    project: str | None = key("W&B project")
    name: str | None = key("name of the run; null: its folder, or how it differs in its sweep")
    group: str | None = key("group of the run; null: its sweep")
    tags: list[str] = key("tags of the run, beside its choices of data set, model and solver")


class MLflow(Entry):
    experiment_name: str = key("MLflow's name of the experiment")
    tracking_uri: str = key("where MLflow writes: a server, or a file as sqlite:///FILE")


class Loggers(Entries):
    wandb: Wandb = key("+logger.wandb.OPTION=… sets any other option of WandbLogger", None)
    tensorboard: Entry = key("options of Lightning's TensorBoardLogger", None)
    mlflow: MLflow = key("options of Lightning's MLFlowLogger", None)


class Train(Section):
    """Train a continuous normalizing flow by maximum likelihood (RNODE)."""

    seed: Whole = key("seed of weights, data order, noise and probes")
    folder: str = key("the run folder, which hydra.run.dir=… sets")
    divergence: Literal[DIVERGENCES] = key("probes of div f and of the Jacobian norm")
    probes: Count = key("random probes of a sample; up to 16 dimensions evaluation is exact")
    dequantization: Literal["uniform", "variational"] = key("noise of images: uniform, or learned")
    warmup_steps: Whole = key("steps over which the learning rate rises linearly")
    decay: bool = key("let the learning rate fall to 0 by max_epochs or max_time (half a cosine)")
    ckpt_path: str | None = key("checkpoint to resume; auto: last.ckpt of the run folder, if any")
    sweep_metrics: Annotated[list[str], Field(min_length=1)] = key(
        "names of result.json that a guided sweep optimizes"
    )
    dataset: Dataset = key("the data")
    model: Model = key("the flow")
    solver: Solver = key("the ODE methods")
    reg: Regularizer = key("the penalties of equation (17)")
    optimizer: Optimizer = key("torch.optim.Adam, or another class by optimizer._target_")
    trainer: Trainer = key("Lightning's Trainer; +trainer.OPTION=… sets any other option of it")
    callbacks: Callbacks = key("Lightning callbacks; +callbacks.NAME={_target_: …} adds one")
    logger: Loggers = key(
        "Lightning loggers beside metrics.csv; +logger.NAME={_target_: …} adds one"
    )


class CheckpointData(Section):
    root: str | None = key("folder of the data; null: the run's own")
    path: str | None = key("file of the table; null: the run's own")
    eval_batch_size: Count | None = key("samples at a time; null: the run's own")


class FromCheckpoint(Section):
    folder: str = key("where files are written, which hydra.run.dir=… sets")
    ckpt_path: str = key("checkpoint of a run, such as outputs/…/best.ckpt")
    seed: Whole = key("seed of noise, probes and samples")
    trust: list[str] = key("your own packages, whose classes the checkpoint may name: [mydata]")
    divergence: Literal[DIVERGENCES] | None = key("null: exact up to 16 dimensions, else the run's")
    probes: Count | None = key("random probes of a sample, 4 or more of a table; null: the run's")
    solver: Solver = key("solver=… and solver.test.…=… replace the run's own; nothing trains")
    trainer: Devices = key("the devices")
    dataset: CheckpointData = key("the data")


class Evaluate(FromCheckpoint):
    """Measure a trained flow on its data: rnode evaluate outputs/…/best.ckpt"""

    split: Literal["test", "val", "train"] = key("the split that is evaluated")
    samples: Count = key("dequantizations of each image in the importance-weighted bound")


class Sample(FromCheckpoint):
    """Sample from a trained flow: rnode sample outputs/…/best.ckpt"""

    n: Count = key("number of samples")
    context: dict[str, Any] = key("what a conditional density is given, as context.COLUMN=VALUE")
    temperature: NonNegative = key("standard deviation of z")
    trajectory: bool = key("save the way from noise to images, as a strip and an animation")
    interpolate: Annotated[list[Whole], Field(min_length=2, max_length=2)] | None = key(
        "two test images, such as [0, 1], to interpolate between through z"
    )


class Score(FromCheckpoint):
    """Score new data by a trained flow: rnode score outputs/…/best.ckpt path=FILE"""

    path: str = key("table or folder of new data")
    id: list[str] = key("columns of the table that are copied beside the scores")
    context: dict[str, Any] = key("what a conditional density is given, as context.COLUMN=VALUE")


class Reproduce(Section):
    """Reproduce a figure or the table of the paper: rnode reproduce figure=2"""

    figure: Annotated[int, Field(ge=1, le=5)] | None = key("figure of the paper, 1 to 5")
    table: Annotated[int, Field(ge=1, le=1)] | None = key("table of the paper, 1")
    discussion: Annotated[int, Field(ge=1, le=1)] | None = key("classifiers of section 9, 1")
    scale: Literal["small", "paper"] = key("small: minutes on 2 cores; paper: its data, on a GPU")
    train: bool = key("run what is missing; false: use the runs that have finished")
    root: str = key("folder of FashionMNIST, MNIST and CIFAR10, downloaded there if missing")
    launcher: str = key("Hydra's launcher of the runs")


class Report(Section):
    """Compare runs in a browser: rnode report outputs/… outputs/…"""

    folders: list[str] = key("folders that are or hold runs and sweeps")


class Project(Section):
    entity: str = key("W&B user or team")
    project: str = key("W&B project")


class Dashboard(Section):
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
