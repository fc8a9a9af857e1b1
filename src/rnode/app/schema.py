"""The configuration: a type, a range and a sentence for each key. --help prints the sentences."""

from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from rnode.choices import ADAPTIVE, DIVERGENCES, FIXED_GRID, GRADIENTS, INTEGRALS
from rnode.errors import InputError

PACKAGE = Path(__file__).resolve().parent.parent
CONF = next(  # in the installed wheel, or in a checkout
    folder for folder in (PACKAGE / "conf", PACKAGE.parent.parent / "conf") if folder.is_dir()
)
LARGEST = 2**32 - 1  # torch and NumPy take no larger seed

Whole = Annotated[int, Field(ge=0, le=LARGEST)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Limit = Annotated[int, Field(ge=-1, le=LARGEST)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1)] | None


class Section(BaseModel):
    """A section in which an unknown key is an error. Keys with an underscore are Hydra's."""

    model_config = ConfigDict(extra="forbid", strict=True)


class OpenSection(BaseModel):
    """A section whose class is the user's own, or takes more options than are listed."""

    model_config = ConfigDict(extra="allow", strict=True)


def key(description: str) -> Any:
    return Field(description=description)


class Dataset(Section):
    shape: list[Count] = key("shape of a sample: [channels, height, width] or [dimensions]")
    batch_size: Count = key("samples in a training step (section 6: 200)")
    eval_batch_size: Count = key("samples at a time in validation and test")
    seed: Whole = key("seed of data order and noise")


class Images(Dataset):
    levels: Annotated[int, Field(ge=2, le=65536)] = key("number of grey levels")
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = key("α of the logit transform")


class Digits(Images):
    validation: Count = key("images of the validation set, cut from the training set")
    test: Count = key("images of the test set")


class Patches(Images):
    size: Count = key("side of a patch, in pixels")
    stride: Count = key("pixels from one patch to the next")


class Stored(Images):
    root: str = key("folder of the data, which are downloaded there if missing")
    validation: Count = key("images of the validation set, cut from the training set")
    resize: Count = key("side of the images; a smaller one averages pixels")


class Idx(Stored):
    name: str = key("MNIST or FashionMNIST")


class Cifar10(Stored):
    flip: bool = key("flip training images at random")


class Toy(Dataset):
    name: str = key("density")
    train: Count = key("points of an epoch, sampled afresh for every batch")
    validation: Count = key("points of the validation set")
    test: Count = key("points of the test set")


class OwnDataset(OpenSection, Dataset):
    pass


class Model(Section):
    shape: list[Count] = key("shape of a sample")
    hidden: Annotated[int, Field(ge=1, le=65536)] = key("channels, or units, of an inner layer")
    layers: Annotated[int, Field(ge=2, le=100)] = key("layers of a piece's network")
    pieces: Annotated[int, Field(ge=1, le=100)] = key("pieces before and after each squeeze")


class Method(Section):
    method: Literal[FIXED_GRID + ADAPTIVE] = key("method of torchdiffeq")
    integrals: Literal[INTEGRALS] = key("how l, E and n are computed: with z, or by quadrature")
    step_size: Positive | None = key("step of a fixed grid; divides 1; null if steps is given")
    steps: Annotated[int, Field(ge=1, le=10_000)] | None = key("steps of a fixed grid")
    rtol: Positive = key("relative tolerance of adaptive steps")
    atol: Positive = key("absolute tolerance of adaptive steps")
    first_step: Positive = key("first step that an adaptive method tries")
    max_steps: Annotated[int, Field(ge=1, lt=2**31)] = key("steps of a piece before it diverges")

    @model_validator(mode="after")
    def one_grid(self) -> "Method":
        given, fixed = (self.step_size, self.steps), self.method in FIXED_GRID
        if fixed and given.count(None) != 1:
            both = f"step_size={self.step_size} and steps={self.steps}"
            raise ValueError(f"{both}: give one of the two and set the other to null")
        count = 1 / self.step_size if self.step_size else 1
        if abs(count - round(count)) > 1e-9 * count or not 1 <= round(count) <= 10_000:
            raise ValueError(f"step_size={self.step_size}: must divide 1 into at most 10000 steps")
        return self


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


class Trainer(OpenSection, Devices):
    max_epochs: Limit | None = key("epochs to train for (section 6: 100)")
    max_steps: Limit = key("training steps after which the run stops; -1: no limit")
    max_time: str | dict | None = key("time after which the run stops, as DD:HH:MM:SS")
    precision: str | int | None = key("32-true, bf16-mixed (bfloat16 inside f alone) or 64-true")
    gradient_clip_val: NonNegative | None = key("largest norm of the gradient")
    accumulate_grad_batches: Count = key("batches of a training step")
    on_divergence: Literal["stop", "rewind"] = key(
        "stop, or rewind to the last checkpoint with half the learning rate, at most 3 times"
    )
    log_every_n_steps: Whole = key("training steps from one row of metrics.csv to the next")
    check_val_every_n_epoch: Count | None = key("epochs from one validation to the next")
    val_check_interval: Share = key("batches, or share of an epoch, between two validations")
    limit_train_batches: Share = key("number or share of the training batches of an epoch")
    limit_val_batches: Share = key("number or share of the validation batches")
    limit_test_batches: Share = key("number or share of the test batches")
    num_sanity_val_steps: Limit = key("validation batches before training")
    enable_progress_bar: bool = key("show the progress bar")
    enable_checkpointing: bool = key("write best.ckpt and last.ckpt")
    enable_model_summary: bool = key("print every layer")
    inference_mode: bool = key("evaluate in torch's inference mode")
    fast_dev_run: bool | Count = key("run one batch, or so many, of everything, to find mistakes")
    deterministic: bool | Literal["warn"] | None = key("use deterministic algorithms only")


class Pictures(Section):
    samples: Count = key("images, or points, in samples.png")
    every_n_epochs: Count = key("epochs from one samples.png and curves.png to the next")


class Wandb(OpenSection):
    mode: Literal["offline", "online", "disabled"] = key("offline, online or disabled")
    project: str | None = key("W&B project")
    name: str | None = key("W&B name of the run")


class Train(Section):
    seed: Whole = key("seed of weights, data order, noise and probes")
    divergence: Literal[DIVERGENCES] = key("probes of div f and of the Jacobian norm")
    probes: Count = key("random probes of a sample")
    warmup_steps: Whole = key("steps over which the learning rate rises linearly")
    decay: bool = key("let the learning rate fall to 0 over the run, as half a cosine")
    refine: NonNegative | None = key("bits/dim between a grid and a finer one that refine the grid")
    compile: bool = key("compile f by torch.compile; the first step takes a minute or more")
    save_every_n_steps: Count = key("training steps from one last.ckpt to the next within an epoch")
    ckpt_path: str | None = key("checkpoint to resume; auto: last.ckpt of the run folder, if any")
    sweep_metric: Literal["bits_per_dim", "bits_per_dim_and_nfe"] = key(
        "what a guided sweep minimizes on the validation set"
    )
    dataset: Dataset = key("the data")
    model: Model = key("the flow")
    solver: Solver = key("the ODE methods")
    reg: Regularizer = key("the penalties of equation (17)")
    optimizer: Optimizer = key("torch.optim.Adam, or another class by optimizer._target_")
    trainer: Trainer = key("Lightning's Trainer; +trainer.OPTION=… sets any other option of it")
    pictures: Pictures = key("pictures of the run")
    wandb: Wandb = key("the W&B run; +wandb.OPTION=… sets any other option of WandbLogger")


class CheckpointData(Section):
    root: str | None = key("folder of the data; null: the run's own")
    eval_batch_size: Count | None = key("samples at a time; null: the run's own")


class FromCheckpoint(Section):
    ckpt_path: str = key("checkpoint of a run, such as outputs/…/best.ckpt")
    seed: Whole = key("seed of noise, probes and samples")
    divergence: Literal[DIVERGENCES] | None = key("null: exact up to 16 dimensions, else the run's")
    probes: Count | None = key("random probes of a sample; null: the run's own")
    solver: Solver = key("solver=… or solver.test.…=… replace the run's own")
    trainer: Devices = key("the devices")
    dataset: CheckpointData = key("the data")


class Evaluate(FromCheckpoint):
    split: Literal["test", "val", "train"] = key("the split that is evaluated")
    samples: Count = key("dequantizations of each image in the importance-weighted bound")
    pictures: Count = key("images in each half of extremes.png")


class Sample(FromCheckpoint):
    n: Count = key("number of samples")
    temperature: NonNegative = key("standard deviation of z")
    trajectory: bool = key("save the way from noise to images, as a strip and an animation")
    interpolate: Annotated[list[Whole], Field(min_length=2, max_length=2)] | None = key(
        "two test images, such as [0, 1], to interpolate between through z"
    )


class Reproduce(Section):
    figure: Annotated[int, Field(ge=1, le=5)] | None = key("figure of the paper, 1 to 5")
    table: Annotated[int, Field(ge=1, le=1)] | None = key("table of the paper, 1")
    scale: Literal["small", "paper"] = key("small: minutes on 2 cores; paper: its data, on a GPU")
    train: bool = key("run what is missing; false: use the runs that have finished")
    root: str = key("folder of FashionMNIST, MNIST and CIFAR10, downloaded there if missing")
    launcher: str = key("Hydra's launcher of the runs")

    @model_validator(mode="after")
    def one_picture(self) -> "Reproduce":
        if (self.figure is None) == (self.table is None):
            raise ValueError("give one of figure=1 to figure=5 and table=1")
        return self


COMMANDS = {"train": Train, "evaluate": Evaluate, "sample": Sample, "reproduce": Reproduce}
SOURCES = {"digits": Digits, "patches": Patches, "idx_images": Idx, "cifar10": Cifar10, "toy": Toy}


def schema_of(command: str, config: dict) -> type[BaseModel]:
    """Return the schema of a command; that of `train` depends on the classes that are configured."""
    if command != "train":
        return COMMANDS[command]
    fields: dict[str, Any] = {}
    dataset, model = config.get("dataset"), config.get("model")
    if isinstance(dataset, dict) and isinstance(dataset.get("source"), dict):
        module, _, name = str(dataset["source"].get("_target_")).rpartition(".")
        chosen = SOURCES.get(name) if module.startswith("rnode.data") else None
        fields["dataset"] = (chosen or OwnDataset, Train.model_fields["dataset"])
    if isinstance(model, dict) and not str(model.get("_target_")).startswith("rnode.models."):
        fields["model"] = (OpenSection, Train.model_fields["model"])
    return create_model("Train", __base__=Train, **fields)


def without_targets(value: Any) -> Any:
    """Leave out `source` and what Hydra interprets: _target_, _partial_ and the like."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not str(k).startswith("_") and k != "source"}
        return {k: without_targets(v) for k, v in kept.items()}
    return value


def validate(command: str, cfg: DictConfig) -> None:
    """Check a composed configuration.

    Raises:
        InputError: one line with the first wrong key, its value and what would be right.
    """
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    try:
        schema_of(command, config).model_validate(without_targets(config))
    except ValidationError as error:
        raise InputError(describe(error, config)) from None


def describe(error: ValidationError, config: dict) -> str:
    """Word the first wrong key of a validation; alternatives of its type are joined by "or"."""
    first, rights = error.errors()[0], []
    names = [str(part) for part in first["loc"]]
    value: Any = config
    for depth, name in enumerate(names):  # the rest of a location names alternatives of a type
        if not isinstance(value, dict) or name not in value:
            names = names[:depth] if first["type"] != "missing" else names
            break
        value = value[name]
    dotted = ".".join(names)
    for other in error.errors():
        if [str(part) for part in other["loc"]][: len(names)] == names:
            rights.append(other["msg"].removeprefix("Input should be "))
    if first["type"] == "extra_forbidden":
        return f"there is no option {dotted}"
    if first["type"] == "missing":
        return f"{dotted} is missing"
    if first["type"] == "value_error":
        where = f"{dotted}: " if dotted else ""
        return where + first["msg"].removeprefix("Value error, ")
    if first["type"] in ("model_type", "dict_type"):
        return f"{dotted}={value}: must be a section, whose keys are set as {dotted}.KEY=…"
    shown = "null" if value is None else " ".join(str(value).split())[:200]
    return f"{dotted}={shown}: must be {' or '.join(dict.fromkeys(rights))}"
