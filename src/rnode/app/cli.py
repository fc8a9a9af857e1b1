"""The commands, from the command line to `main(cfg)` of each."""

import argparse
import contextlib
import importlib
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import rnode
from rnode.app.exits import one_line_errors
from rnode.app.help import help_text
from rnode.app.processes import is_first_process, prepare_process, run_name
from rnode.app.schema import COMMANDS, CONF
from rnode.app.sweep import in_sweep, run_job
from rnode.app.validation import check, compose_config, quote, validate
from rnode.errors import require


def main() -> None:
    """The command `rnode`."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in COMMANDS:
        run(command, sys.argv[2:])
    elif command == "--version":
        print(f"rnode {rnode.__version__}")
    elif command in ("-h", "--help"):
        print("usage: rnode COMMAND [key=value …]; rnode COMMAND --help lists the keys\n")
        for name, schema in COMMANDS.items():
            print(f"  {name:<12}{schema.__doc__}")
    else:
        print(f"error: there is no command {command}; rnode --help lists them", file=sys.stderr)
        sys.exit(2)


def run(command: str, arguments: list[str] | None = None) -> None:
    """Run a command with the arguments of the command line, or print its help."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # letters that the terminal cannot show
    OmegaConf.register_new_resolver("run_name", run_name, use_cache=True, replace=True)
    sys.path.append(os.getcwd())  # for classes of the user's
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-cd", "--config-dir")
    parser.add_argument("-c", "--cfg", choices=["job"])
    parser.add_argument("--resolve", action="store_true")
    with one_line_errors():
        flags, unknown = parser.parse_known_intermixed_args(arguments)
        require(not unknown, f"there is no flag {' '.join(unknown)}")
        overrides = expand(command, flags.overrides)
        if flags.config_dir is not None:
            folder = os.path.abspath(flags.config_dir)
            require(os.path.isdir(folder), f"--config-dir {folder}: there is no such folder")
            overrides = [f"hydra.searchpath=[{quote(f'file://{folder}')}]", *overrides]
        if flags.help:
            print(help_text(command, overrides))
        elif flags.cfg:
            print(OmegaConf.to_yaml(compose_config(command, overrides), resolve=flags.resolve))
        else:
            check(command, overrides)
            start_hydra(command, ["--multirun", *overrides] if flags.multirun else overrides)


def start_hydra(command: str, arguments: list[str]) -> None:
    """Let Hydra run the command, once or for each job of a sweep."""
    typed = sys.argv

    def job(cfg: DictConfig) -> Any:
        sys.argv = typed  # Lightning starts other processes by it
        folder = Path(HydraConfig.get().runtime.output_dir)
        with contextlib.nullcontext() if in_sweep() else one_line_errors():
            return run_job(partial(run_command, command), cfg, folder)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print its errors in several lines
    sys.argv = [typed[0], *arguments]
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=command)(job)()


def run_command(command: str, cfg: DictConfig) -> Any:
    """Run `main(cfg)` of a command, after a check: a sampler may have chosen the values."""
    validate(command, cfg)
    if command == "train" and is_first_process():
        chosen = HydraConfig.get().runtime.choices
        print(f"{chosen['dataset']} by a {chosen['model']} flow, solver={chosen['solver']}")
        print(f"run folder: {cfg.folder} (Ctrl-C stops the run and says how to resume)", flush=True)
    prepare_process()
    # torch, Lightning and W&B are imported here: --help and mistakes do not wait for them.
    package = "rnode.paper" if command == "reproduce" else "rnode.app"  # benchmarks/paper
    return importlib.import_module(f"{package}.{command}").main(cfg)


def expand(command: str, overrides: list[str]) -> list[str]:
    """Write bare paths as keys: folders=[PATHS] of `report`, ckpt_path=PATH of other commands.

    The folder of a run stands for its best.ckpt, or where training goes on for its last.ckpt.
    """
    expanded, folders = [], []
    for text in overrides:
        if text.startswith("context."):
            expanded.append(f"++{text}")  # conditions have names of the user's
        elif "=" in text and not os.path.exists(text):
            expanded.append(text)
        elif command == "report":
            folders.append(quote(text))
        elif os.path.isdir(text):
            names = ["last.ckpt"] if command == "train" else ["best.ckpt", "last.ckpt"]
            paths = [os.path.join(text, name) for name in names]
            there = [path for path in paths if os.path.isfile(path)]
            require(bool(there), f"{paths[0]}: there is no such checkpoint")
            if there[0] != paths[0]:
                print(f"{text} has no best.ckpt: last.ckpt is used", file=sys.stderr)
            expanded.append(f"ckpt_path={quote(there[0])}")
        else:
            expanded.append(f"ckpt_path={quote(text)}" if text.endswith(".ckpt") else text)
    return [*expanded, f"folders=[{','.join(folders)}]"] if folders else expanded
