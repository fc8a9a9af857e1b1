"""The commands, from the command line to `main(cfg)` of each."""

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import to_absolute_path
from omegaconf import DictConfig, OmegaConf

import rnode
from rnode.app.exits import one_line_errors
from rnode.app.processes import is_first_process, prepare_process, run_name
from rnode.app.schema import COMMANDS, CONF, help_text
from rnode.app.sweep import SWEPT_KEYS, in_sweep
from rnode.app.validation import compose_config, quote, validate
from rnode.training.results import DIVERGED, FAILED
from rnode.training.run_folder import checkpoint_of


def main() -> None:
    """The command `rnode`."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in COMMANDS:
        run(command, arguments)
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
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="replace")  # letters that the terminal cannot show
    if not is_first_process():  # which prints what all of them would
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
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
        flags = parser.parse_intermixed_args(arguments)
        overrides = expand(command, flags.overrides)
        if flags.config_dir is not None:
            overrides.append(f"hydra.searchpath=[{quote(os.path.abspath(flags.config_dir))}]")
        fixed = overrides
        if flags.multirun:
            parsed = OverridesParser.create().parse_overrides(overrides)
            swept = [override for override in parsed if override.is_sweep_override()]
            os.environ[SWEPT_KEYS] = " ".join(override.key_or_group for override in swept)
            fixed = [override.input_line for override in parsed if override not in swept]
            overrides.append("hydra.mode=MULTIRUN")
        cfg = compose_config(command, fixed)
        if flags.help:
            print(help_text(command, cfg))
        elif flags.cfg:
            print(OmegaConf.to_yaml(cfg, resolve=flags.resolve))
        else:
            validate(command, cfg)
            start_hydra(command, overrides)


def expand(command: str, overrides: list[str]) -> list[str]:
    """Write bare paths as keys: folders=[PATHS] of `report`, ckpt_path=PATH of other commands.

    The folder of a run stands for its best.ckpt, or where training goes on for its last.ckpt.
    """
    expanded, folders = [], []
    for text in overrides:
        if text.startswith("context={"):  # Hydra could not read the quotes of JSON
            expanded.append(f"context={quote(text[8:])}")
        elif text.startswith("folder="):  # Hydra makes it: of a run, or of a whole sweep
            expanded += [f"hydra.{mode}.dir={text[7:]}" for mode in ("run", "sweep")]
        elif "=" in text and not os.path.exists(text):
            # The conditions of a density have names of the user's.
            expanded.append(f"++{text}" if text.startswith("context.") else text)
        elif command == "report":
            folders.append(quote(text))
        elif os.path.isdir(text):
            expanded.append(f"ckpt_path={quote(str(checkpoint_of(text, command == 'train')))}")
        else:
            expanded.append(f"ckpt_path={quote(text)}" if text.endswith(".ckpt") else text)
    return [*expanded, f"folders=[{','.join(folders)}]"] if folders else expanded


def start_hydra(command: str, arguments: list[str]) -> None:
    """Let Hydra run `main(cfg)` of the command, once or for each job of a sweep."""
    typed = sys.argv

    def job(cfg: DictConfig) -> Any:
        sys.argv = typed  # Lightning starts other processes by it
        folder = Path(HydraConfig.get().runtime.output_dir)
        for name in (DIVERGED, FAILED):  # of an earlier job in this folder
            (folder / name).unlink(missing_ok=True)
        with one_line_errors(folder if in_sweep() else None):
            values = validate(command, cfg)  # again: a sweep has chosen values of its own
            if "context" in cfg:
                cfg.context = values.context  # JSON has become a dictionary
            make_paths_absolute(cfg)
            if command == "train":
                chosen = HydraConfig.get().runtime.choices
                model = cfg.model._target_.rpartition(".")[2]
                print(f"{chosen.dataset} by a {model} flow, solver={chosen.solver}")
                hint = "Ctrl-C stops the run and says how to resume"
                print(f"run folder: {folder} ({hint})", flush=True)
            prepare_process()
            # torch and Lightning are imported here: --help and mistakes do not wait for them.
            package = "rnode.paper" if command == "reproduce" else "rnode.app"  # benchmarks/paper
            return importlib.import_module(f"{package}.{command}").main(cfg)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print its errors in several lines
    sys.argv = [typed[0], *arguments]
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=command)(job)()


def make_paths_absolute(cfg: DictConfig) -> None:
    """Make the user's paths independent of the working folder, which hydra.job.chdir changes."""
    dataset = cfg.get("dataset", {})
    for section, key in ((dataset, "path"), (dataset, "root"), (cfg, "path"), (cfg, "ckpt_path")):
        path = section.get(key)
        if path and path != "auto":
            section[key] = to_absolute_path(os.path.expanduser(path))
