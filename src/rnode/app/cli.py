"""The commands, from the command line to `main(cfg)` of rnode.app.COMMAND."""

import contextlib
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import DictConfig, OmegaConf

from rnode.app.help import help_text, wrong_option
from rnode.app.launch import is_first_process, prepare_process, run_name
from rnode.app.report_error import hydra_raises, one_line_errors, wants_traceback
from rnode.app.schema import CONF, validate
from rnode.app.sweep import in_sweep, run_job
from rnode.errors import InputError

COMMANDS = {
    "train": "Train a continuous normalizing flow by maximum likelihood (RNODE).",
    "evaluate": "Measure a trained flow on its data: rnode evaluate outputs/…/best.ckpt",
    "sample": "Sample from a trained flow: rnode sample outputs/…/best.ckpt",
    "reproduce": "Reproduce a figure or the table of the paper: rnode reproduce figure=2",
}


def main() -> None:
    """The command `rnode`."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in COMMANDS:
        run(command, sys.argv[2:])
        return
    print("usage: rnode COMMAND [key=value …]; rnode COMMAND --help lists the keys", "", sep="\n")
    print(*(f"  {name:<12}{about}" for name, about in COMMANDS.items()), sep="\n")
    if command not in ("-h", "--help"):
        print(f"error: there is no command {command}", file=sys.stderr)
        sys.exit(2)


def run(command: str, arguments: list[str] | None = None) -> None:
    """Run a command with the arguments of the command line, or print its help."""
    typed = list(sys.argv)
    arguments = [expand(argument) for argument in (arguments or sys.argv[1:])]
    search = [str(Path(folder).resolve()) for folder in config_dirs(arguments)]
    overrides = [argument for argument in arguments if "=" in argument and argument[0] != "-"]
    OmegaConf.register_new_resolver("run_name", run_name, use_cache=True, replace=True)
    with one_line_errors():
        if {"-h", "--help"} & set(arguments):
            print_to_pipe(help_text(command, COMMANDS[command], overrides, search))
            return
        if not is_first_process():  # the first process writes what Hydra writes
            arguments += ["hydra.output_subdir=null", "hydra/job_logging=none"]
        sys.argv = [typed[0], *arguments]
        entry = hydra.main(version_base="1.3", config_path=str(CONF), config_name=command)
        try:
            with hydra_raises():
                entry(job(command, typed))()
        except MissingConfigException as error:
            raise InputError(missing_option(error)) from error
        except ConfigCompositionException as error:
            raise InputError(wrong_option(command, overrides, search) or str(error)) from error
        finally:
            sys.argv = typed


def job(command: str, typed: list[str]) -> Any:
    """Return the function that Hydra calls with the configuration of each run.

    The package's slow imports (torch, Lightning, W&B) happen here, after the configuration was
    checked, so that --help and a mistake do not wait for them.
    """

    def call(cfg: DictConfig) -> Any:
        sys.argv = typed  # Lightning starts other processes by it
        with user_environment(), contextlib.nullcontext() if in_sweep() else one_line_errors():

            def main(cfg: DictConfig) -> Any:
                validate(command, cfg)
                prepare_process()
                return importlib.import_module(f"rnode.app.{command}").main(cfg)

            return run_job(main, cfg, Path(HydraConfig.get().runtime.output_dir))

    return call


@contextlib.contextmanager
def user_environment() -> Any:
    """Leave out HYDRA_FULL_ERROR unless the user set it: processes that a run starts inherit it."""
    names = [] if wants_traceback() else ["HYDRA_FULL_ERROR"]
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def expand(argument: str) -> str:
    """A bare path of a checkpoint stands for ckpt_path=PATH."""
    if (
        argument.endswith(".ckpt")
        and argument[0] not in "-+~"
        and not argument.startswith("ckpt_path=")
    ):
        quoted = argument.replace("\\", "\\\\").replace("'", "\\'")
        return f"ckpt_path='{quoted}'"
    return argument


def config_dirs(arguments: list[str]) -> list[str]:
    """The folders of --config-dir."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    after = [following for flag, following in pairs if flag in ("--config-dir", "-cd")]
    return after + [a.split("=", 1)[1] for a in arguments if a.startswith("--config-dir=")]


def missing_option(error: MissingConfigException) -> str:
    """Word the choice of an option that a group does not have."""
    extra = (
        "pip install 'rnode[sweep]' brings more; "
        if str(error.missing_cfg_file).startswith("hydra/")
        else ""
    )
    options = ", ".join(error.options or [])
    return f"there is no {error.missing_cfg_file}; {extra}the options are {options}"


def print_to_pipe(text: str) -> None:
    """Print; a reader such as `head` may close the pipe early."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
