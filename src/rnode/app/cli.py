"""The commands, from the command line to `main(cfg)` of each."""

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import rnode
from rnode.app.banner import banner
from rnode.app.exits import one_line_errors
from rnode.app.help import help_text
from rnode.app.processes import is_first_process, prepare_process, run_name
from rnode.app.quoting import quote
from rnode.app.schema import CONF
from rnode.app.sweep import in_sweep, run_job
from rnode.app.validation import CommandLine, check, compose_config, validate
from rnode.errors import InputError

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


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


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
    OmegaConf.register_new_resolver("run_name", run_name, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("power_of_two", lambda n: 2**n, replace=True)
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-cd", "--config-dir")
    parser.add_argument("-c", "--cfg", choices=["job"])
    parser.add_argument("--resolve", action="store_true")
    with errors():
        flags = parser.parse_intermixed_args(typed[1:] if arguments is None else arguments)
        overrides = expand(command, flags.overrides)
        line = CommandLine(command, overrides, flags.config_dir, flags.multirun)
        if line.config_dir or any(text.startswith("trust=") for text in overrides):
            sys.path.append(os.getcwd())  # for classes of the user's
        if flags.help:
            print_to_pipe(help_text(ABOUT[command], line))
        elif flags.cfg:
            print_to_pipe(OmegaConf.to_yaml(compose_config(line), resolve=flags.resolve))
        else:
            check(line)
            start_hydra(line, typed, errors)


def start_hydra(line: CommandLine, typed: list[str], errors: Callable) -> None:
    """Let Hydra run the command, once or for each job of a sweep."""

    def job(cfg: DictConfig) -> Any:
        sys.argv = typed  # Lightning starts other processes by it
        folder = Path(HydraConfig.get().runtime.output_dir)
        with contextlib.nullcontext() if in_sweep() else errors():
            return run_job(partial(run_command, line.command), cfg, folder)

    flags = ["--multirun"] if line.multirun else []
    flags += ["--config-dir", line.config_dir] if line.config_dir else []
    # The first process writes what Hydra writes.
    flags += [] if is_first_process() else ["hydra.output_subdir=null"]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print its errors in several lines
    sys.argv = [typed[0], *flags, *line.overrides]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=line.command)(job)()
    finally:
        sys.argv = typed


def run_command(command: str, cfg: DictConfig) -> Any:
    """Run `main(cfg)` of a command, after a check: a sampler may have chosen the values."""
    validate(command, cfg)
    if command == "train" and is_first_process():
        runtime = HydraConfig.get().runtime
        print(banner(cfg, runtime.choices, runtime.output_dir), flush=True)
    prepare_process()
    # torch, Lightning and W&B are imported here: --help and mistakes do not wait for them.
    module = MODULES[command]
    return importlib.import_module(module).main(cfg)


def expand(command: str, overrides: list[str]) -> list[str]:
    """Write bare paths as keys: folders=[PATHS] of `report`, ckpt_path=PATH of other commands.

    The folder of a run stands for its best.ckpt, or where training goes on for its last.ckpt.
    """
    expanded, folders = [], []
    for text in overrides:
        checkpoint = os.path.join(text, "last.ckpt" if command == "train" else "best.ckpt")
        if text.startswith("context."):
            expanded.append(f"++{text}")  # conditions have names of the user's
        elif "=" in text and not os.path.exists(text):
            expanded.append(text)
        elif command == "report":
            folders.append(quote(text))
        elif os.path.isfile(checkpoint):
            expanded.append(f"ckpt_path={quote(checkpoint)}")
        else:
            expanded.append(f"ckpt_path={quote(text)}" if text.endswith(".ckpt") else text)
    return [*expanded, f"folders=[{','.join(folders)}]"] if folders else expanded


def print_to_pipe(text: str) -> None:
    """Print; a reader such as `head` may close the pipe early."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
