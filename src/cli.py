"""How the scripts meet their user: --help from the files of conf/, and one line for a mistake."""

import functools
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

ONE_LINE = "RNODE_ONE_LINE_ERRORS"  # set where HYDRA_FULL_ERROR=1 is `run`'s own doing, not the user's wish
FULL_ERROR = os.environ.get("HYDRA_FULL_ERROR") == "1" and ONE_LINE not in os.environ
CONF = Path(__file__).resolve().parent.parent / "conf"
FILES = {  # of each script, the files of its default run, in the order in which later ones override earlier ones
    "train.py": [
        "config.yaml",
        "regularizer/rnode.yaml",
        "solver/rk4.yaml",
        "solver/radau.yaml",
        "solver/auto.yaml",
        "model/multiscale.yaml",
        "trainer.yaml",
        "dataset/digits.yaml",
    ],
    "evaluate.py": ["checkpoint.yaml", "evaluate.yaml"],
    "sample.py": ["checkpoint.yaml", "sample.yaml"],
    "reproduce.py": ["reproduce.yaml"],
}
GO_ON = "the same command with its hydra.sweep.dir=… skips what is finished and goes on with the rest"
MEMORY = "can't allocate memory|out of memory|integer multiplication overflow|[Ss]torage size calculation overflow"
LONGEST = 1500  # characters of a message: a value that it repeats may be as long as the command line
TRAINER = "trainer.yaml"  # the one file beside the groups that has a section of its own


def help_text(script: str, purpose: str) -> str:
    """The groups and their options, each with the first comment of its file; the knobs, each with its comment."""
    lines = [
        purpose,
        "",
        f"usage: python src/{script} [group=option …] [key=value …] [-m for a sweep over a=1,2 b=3,4]",
    ]
    for group in groups(script):
        lines += ["", f"{group}="]
        for file in sorted((CONF / group).glob("*.yaml")):
            comments = (line[2:].strip() for line in file.read_text().splitlines() if line.startswith("# "))
            lines.append(f"  {file.stem:<22}{next(c for c in comments if not c.startswith('@package'))}")
    trainer = " (and every option of Lightning's Trainer as trainer.…)" if TRAINER in FILES[script] else ""
    lines += ["", f"knobs, with the default in brackets{trainer}:"]
    lines += [f"  {key:<32}{comment} [{value}]" for key, (value, comment) in knobs(script).items()]
    lines += ["", "--cfg job --resolve shows the whole configuration that a command line makes, without running it."]
    return "\n".join(lines)


def groups(script: str) -> list[str]:
    """The groups whose options the script's defaults choose from."""
    named = (
        re.findall(r"^  - (\w+): ", (CONF / file).read_text(), re.MULTILINE) for file in FILES[script] if "/" not in file
    )
    return sorted(group for groups in named for group in groups)


def knobs(script: str) -> dict[str, tuple[str, str]]:
    """Dotted key: (value, comment) for each `key: value # comment` of the files that make the script's default run."""
    found: dict[str, tuple[str, str]] = {}
    for file in FILES[script]:
        text = (CONF / file).read_text()
        text = re.sub(r"^defaults:\n(?:  .*\n)+", "", text, flags=re.MULTILINE)
        package = re.search(r"^# @package (\w+)$", text, re.MULTILINE)
        folder = file.split("/")[0] if "/" in file else "_global_"
        section = package[1] if package else "trainer" if file == TRAINER else folder
        path = [] if section == "_global_" else [section]
        root = len(path)
        for line in text.splitlines():
            if match := re.match(r"( *)(\w+):(?: (.*?))??(?:\s+# (.+))?$", line):
                indent, key, value, comment = match.groups()
                path[root + len(indent) // 2 :] = [key]
                dotted = ".".join(path)
                if comment or dotted in found:
                    found[dotted] = (value, comment or found[dotted][1])
    return found


def run(main: Callable[[], None], script: str, purpose: str) -> None:
    """Call a Hydra main, or print the help. HYDRA_FULL_ERROR=1 shows a mistake's whole traceback instead of one line."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text(script, purpose))
        return
    from omegaconf import OmegaConf

    from launch import launched, run_name

    OmegaConf.register_new_resolver("run_name", run_name, use_cache=True, replace=True)
    if (started := launched()) is not None and started.rank > 0:  # the first process writes what Hydra writes
        sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=none"]
    if FULL_ERROR:
        main()
    else:
        os.environ |= {"HYDRA_FULL_ERROR": "1", ONE_LINE: "1"}  # or Hydra prints errors its own way, in several lines
        try:
            one_line_errors(main)()
        finally:
            for name in ("HYDRA_FULL_ERROR", ONE_LINE):
                os.environ.pop(name, None)


def one_line_errors(function: Callable) -> Callable:
    """Print one line and exit: 2 for a user's mistake, 1 for a run that failed, 128 + n for one that signal n stopped.

    Other errors are bugs of ours.
    """

    @functools.wraps(function)
    def wrapped(*args):
        try:
            return function(*args)
        except Exception as error:
            message, code = explain(error)
            if message is None or FULL_ERROR:
                raise
            if code > 128 and is_follower():  # all stop together: the first process says it, and has the exit code
                sys.exit(0)
            message = message if len(message) <= LONGEST else f"{message[:LONGEST]}…"
            print(f"{'stopped' if code > 128 else 'error'}: {message}{where()}", file=sys.stderr)
            sys.exit(code)

    return wrapped


def is_follower() -> bool:
    """Whether this is another process of a run than its first."""
    from pytorch_lightning.utilities import rank_zero_only

    return rank_zero_only.rank > 0


def where() -> str:
    """Which process of several tells its error: each does, for one may have reasons of its own."""
    from launch import launched

    started = launched()
    return f" (process {started.rank})" if started is not None and started.per_node * started.nodes > 1 else ""


def job(function: Callable) -> Callable:
    """`one_line_errors` for one run; in a sweep the error passes, so that Hydra goes on to the other jobs and says which."""

    @functools.wraps(function)
    def wrapped(*args):
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        full_error = os.environ.pop("HYDRA_FULL_ERROR", None) if not FULL_ERROR else None  # set by run, below
        try:  # without it, which the processes that a run starts would take for the user's wish
            return function(*args) if sweep else one_line_errors(function)(*args)
        finally:
            if full_error is not None:
                os.environ["HYDRA_FULL_ERROR"] = full_error

    return wrapped


def quiet() -> None:
    """Silence what Lightning and torch say about choices that are made on purpose here."""
    import logging
    import warnings

    for library in ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.distributed"):
        logging.getLogger(library).setLevel(logging.WARNING)
    for message in (
        r".*does not have many workers.*",  # the data are in memory: a worker would only copy them
        r".*(Checkpoint|Experiment logs) directory .* exists and is not empty.*",  # it holds Hydra's and our config
        r".*number of training batches .* is smaller than the logging interval.*",
        r".*could not find the monitored key.*",  # a run stopped before its first validation is validated at its end
        r".*The dirpath has changed.*",  # a resumed run has a folder of its own
        r".*Using `DistributedSampler` with the dataloaders.*",  # the metrics count each image once all the same
        r".*There is a wandb run already in progress.*",  # of this run, before it was rewound
        r".*The `srun` command is available on your system but is not used.*",  # a cluster's login node serves too
        r".*LeafSpec.*",  # Lightning's own use of torch
        r".*your dataloader is not resumable.*",  # it goes on where the checkpoint's epoch was cut off
    ):
        warnings.filterwarnings("ignore", message)


def explain(error: Exception) -> tuple[str | None, int]:
    """One line for what went wrong and the exit code; no line for what is a bug of ours."""
    from hydra.errors import HydraException, InstantiationException
    from omegaconf.errors import OmegaConfBaseException

    composed = isinstance(error, HydraException | OmegaConfBaseException) and not isinstance(error, InstantiationException)
    if composed:  # before the imports below, which bring torch: a misspelt key does not wait for it
        return explain_hydra(error), 2
    if raised_in(error) in ("hydra", "omegaconf") and not isinstance(error, InstantiationException):
        return explain_value(error), 2
    from rnode.errors import DivergenceError, InputError, Stopped

    if isinstance(error, Stopped):
        return one_line(error), 128 + error.signal
    if isinstance(error, DivergenceError):
        return one_line(error), 1
    if isinstance(error, InputError):
        return one_line(error), 2
    refused = next((e for e in (error, error.__cause__) if isinstance(e, OSError)), None)
    if refused is not None:  # a full disk; a folder that is not ours to write to, for Hydra's log too
        return one_line(refused), 1
    if isinstance(error, InstantiationException):  # a constructor refused its arguments
        key = re.search(r"full_key: (\S+)", str(error))
        message = one_line(error.__cause__ or error)
        ours = isinstance(error.__cause__, InputError)
        if key is None or (ours and "." in message.split("=")[0]):  # the message names the whole key itself
            return message, 2
        return f"{key[1]}{'.' if ours else ': '}{message}", 2
    if isinstance(error, RuntimeError) and re.search(
        r"gloo|nccl|connection (closed|reset) by peer", str(error), re.IGNORECASE
    ):
        return f"another process of this run has ended ({one_line(error)[:100]}); ckpt_path=…/last.ckpt goes on", 1
    if type(error).__name__ == "TerminatedWorkerError":  # joblib's
        return "a process of the sweep has been killed, for want of memory perhaps; " + GO_ON, 1
    if type(error).__module__.startswith("submitit."):
        return f"a job of the sweep has ended without a result ({one_line(error)[:300]}); " + GO_ON, 1
    if str(error) == "No trials are completed yet.":  # optuna's
        return "no job of the sweep is finished; what each has met stands above", 1
    if isinstance(error, MemoryError) or re.search(MEMORY, str(error)):
        return f"not enough memory ({one_line(error)[:200]}); try a smaller dataset.batch_size or model.hidden", 1
    frames = [(frame.f_globals.get("__name__"), frame.f_code.co_name) for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = any(name.startswith("rnode.") for name, _ in frames)
    unfit = type(error).__name__ == "MisconfigurationException" and not ours  # options that do not go together
    if unfit or frames[-1:] == [("pytorch_lightning.loops.fit_loop", "setup_data")]:  # or that do not suit the data
        return f"trainer: {one_line(error)}", 2
    if ("pytorch_lightning.loggers.wandb", "experiment") in frames and not type(error).__module__.startswith("wandb."):
        return f"wandb: {one_line(error)}", 2  # an option of the wrong type, or one that it does not know
    if type(error).__module__.startswith("wandb."):  # no account or no network for wandb.mode=online
        return f"W&B: {one_line(error)}; wandb.mode=offline needs neither account nor network", 2
    return None, 1


def explain_hydra(error: Exception) -> str:
    text = str(error)
    if match := re.match(r"Could not override '(\S+?)'", text):
        known = re.search(r"full_key: (\S*)", text)
        where = known[1] if known else match[1]
        return f"there is no option {where}; {similar(where)}python src/{script()} --help lists them"
    if match := re.match(r"(?:In '.*': )?Could not find '(\S+)'", text):
        options = ", ".join(re.findall(r"^\t(\S+)$", text, re.MULTILINE))
        extra = "pip install -e '.[sweep]' brings more; " if match[1].startswith("hydra/") else ""
        return f"there is no {match[1]}; {extra}" + (f"the options are {options}" if options else "--help lists the groups")
    return one_line(error)


def explain_value(error: Exception) -> str:
    """Of an override whose value is of a type that Hydra does not expect and has no exception of its own for."""
    names = "|".join(groups(script()))
    chosen = [override for override in sys.argv[1:] if re.match(rf"[+~]*({names})(@\S*)?=", override)]
    return f"{' '.join(chosen)}: {one_line(error)}" if chosen else one_line(error)


def raised_in(error: BaseException) -> str:
    """The package whose code raised it."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return frames[-1][0].f_globals.get("__name__", "").split(".")[0] if frames else ""


def require_sections(cfg, *names: str) -> None:
    """InputError unless these of `cfg` have been left the sections that they are."""
    from omegaconf import DictConfig

    from rnode.errors import require

    for name in names:
        require(isinstance(cfg.get(name), DictConfig), name, cfg.get(name), f"a section: what is in it is set as {name}.…=…")


def similar(key: str) -> str:
    import difflib

    close = difflib.get_close_matches(key, knobs(script()), n=1)
    return f"did you mean {close[0]}? " if close else ""


def script() -> str:
    """The name of the script that runs."""
    name = Path(sys.argv[0]).name
    return name if name in FILES else "train.py"


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split("\nException raised from ")[0].split())  # what follows is torch's own call stack
