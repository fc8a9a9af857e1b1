"""The commands, from the command line to `main(cfg)` of each."""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra._internal import hydra as hydra_commands
from hydra._internal import utils as hydra_utils
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf

import rnode
from rnode.app.banner import banner
from rnode.app.help import help_text, unknown_key
from rnode.app.launch import is_first_process, prepare_process, run_name
from rnode.app.quoting import quote, shell_quote
from rnode.app.report_error import one_line_errors
from rnode.app.schema import CONF
from rnode.app.sweep import in_sweep, run_job
from rnode.app.validation import validate
from rnode.errors import InputError, one_line, require

ABOUT = {
    "train": "Train a continuous normalizing flow by maximum likelihood (RNODE).",
    "evaluate": "Measure a trained flow on its data: rnode evaluate outputs/…/best.ckpt",
    "sample": "Sample from a trained flow: rnode sample outputs/…/best.ckpt",
    "score": "Score new data by a trained flow: rnode score outputs/…/best.ckpt path=FILE",
    "report": "Compare runs in a browser: rnode report outputs/… outputs/…",
    "dashboard": "Add the views of the paper's figures to a W&B project: wandb.entity=NAME",
    "reproduce": "Reproduce a figure or the table of the paper: rnode reproduce figure=2",
}
MODULES = {command: f"rnode.app.{command}" for command in ABOUT}
MODULES["reproduce"] = "rnode.paper.reproduce"  # in benchmarks/paper, installed as rnode.paper


def main() -> None:
    """The command `rnode`."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ABOUT:
        run(command, sys.argv[2:])
        return
    if command == "--version":
        print(f"rnode {rnode.__version__}")
        return
    print("usage: rnode COMMAND [key=value …]; rnode COMMAND --help lists the keys\n")
    print(*(f"  {name:<12}{about}" for name, about in ABOUT.items()), sep="\n")
    if command not in ("-h", "--help"):
        print(f"error: there is no command {command}", file=sys.stderr)
        sys.exit(2)


def run(
    command: str, arguments: list[str] | None = None, errors: Callable = one_line_errors
) -> None:
    """Run a command with the arguments of the command line, or print its help.

    `errors` makes the context in which the command runs: it prints an error in one line and exits.
    """
    typed = list(sys.argv)
    with contextlib.suppress(AttributeError):  # a stream of a notebook
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # letters that the terminal cannot show
    arguments = typed[1:] if arguments is None else arguments
    if command == "report":
        arguments = gather(arguments)
    else:
        arguments = [expand(command, argument) for argument in arguments]
    parsed = hydra_utils.get_args_parser().parse_args(arguments)
    own = parsed.config_dir or any(text.startswith("trust=") for text in parsed.overrides)
    sys.path += [os.getcwd()] if own else []  # for classes of the user's
    asked = (parsed.overrides, parsed.config_dir)
    OmegaConf.register_new_resolver("run_name", run_name, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("power_of_two", lambda n: 2**n, replace=True)
    with errors():
        try:
            if parsed.help:
                print_to_pipe(help_text(command, ABOUT[command], *asked))
                return
            if not is_first_process():  # the first process writes what Hydra writes
                arguments += ["hydra.output_subdir=null"]
            sys.argv = [typed[0], *arguments]
            # Hydra itself prints an error in several lines and exits.
            hydra_commands.run_and_report = hydra_utils.run_and_report = lambda call: call()
            entry = hydra.main(version_base="1.3", config_path=str(CONF), config_name=command)
            entry(job(command, typed, errors))()
        except MissingConfigException as error:
            where, options = error.missing_cfg_file or "", ", ".join(error.options or [])
            extra = "pip install 'rnode[sweep]' brings more; " * where.startswith("hydra/")
            raise InputError(f"there is no {where}; {extra}the options are {options}") from error
        except OverrideParseException as error:
            key, equals, value = error.override.partition("=")
            folder = "; that folder holds no checkpoint of a run" * os.path.isdir(key)
            require(equals == "=", f"{error.override}: must be KEY=VALUE{folder}")
            quoted = shell_quote(f"{key}={quote(value)}")
            reason = "= ~ [ ] ( ) and letters like λ need quotes"
            raise InputError(f"{error.override}: {reason}; write {quoted}") from error
        except ConfigCompositionException as error:
            message = unknown_key(command, *asked) or one_line(error)
            raise InputError(message) from error
        finally:
            sys.argv = typed


def job(command: str, typed: list[str], errors: Callable) -> Any:
    """Return the function that Hydra calls with the configuration of each run."""

    def main(cfg: DictConfig) -> Any:
        validate(command, cfg)
        if command == "train" and is_first_process():
            print(banner(cfg), flush=True)
        prepare_process()
        # torch, Lightning and W&B are imported here: --help and mistakes do not wait for them.
        return importlib.import_module(MODULES[command]).main(cfg)

    def call(cfg: DictConfig) -> Any:
        sys.argv = typed  # Lightning starts other processes by it
        folder = Path(HydraConfig.get().runtime.output_dir)
        with contextlib.nullcontext() if in_sweep() else errors():
            try:
                return run_job(main, cfg, folder)
            finally:
                if folder.resolve() != Path.cwd():
                    with contextlib.suppress(OSError):  # unless it is empty, as after a mistake
                        folder.rmdir()

    return call


def expand(command: str, argument: str) -> str:
    """Let the bare path of a checkpoint, or of the folder of a run, stand for ckpt_path=PATH;
    `context` takes any key."""
    if argument.startswith("context."):
        return f"++{argument}"
    path = "=" not in argument or os.path.exists(argument)  # and not the value of a key
    held = os.path.join(argument, "last.ckpt" if command == "train" else "best.ckpt")
    argument = held if path and os.path.isfile(held) else argument
    bare = path and argument.endswith(".ckpt") and argument[0] not in "-+~"
    return f"ckpt_path={quote(argument)}" if bare else argument


def gather(arguments: list[str]) -> list[str]:
    """Let bare paths of folders stand for folders=[PATHS]."""
    given = hydra_utils.get_args_parser().parse_args(arguments).overrides
    folders = [text for text in given if "=" not in text or os.path.isdir(text)]
    options = [text for text in arguments if text not in folders]
    return [*options, f"folders=[{','.join(map(quote, folders))}]"] if folders else options


def print_to_pipe(text: str) -> None:
    """Print; a reader such as `head` may close the pipe early."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
