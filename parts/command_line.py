"""What comes after ``python train.py``, and how it ends: open it to add a flag that is not a setting in config.py."""

import argparse
import builtins
import inspect
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar, get_args, get_origin, get_type_hints

from torch import distributed as dist

from config import Config, UsageError, check, config
from parts.distributed import of_first, process_group
from parts.run import describe_progress, resumed_config
from parts.speed import keep_freed_memory
from utils import new_run_dir

T = TypeVar("T")
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def to_bool(text: str) -> bool:
    """Return the value of the word "true" or "false"; raise ArgumentTypeError for any other."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return text.lower() == "true"


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Give the parser a flag for each field of Config, with the comment beside it as help."""
    try:
        comments = dict(re.findall(r"^ +(\w+): .*? # *(.*)", inspect.getsource(Config), re.MULTILINE))
    except OSError:  # only config.pyc is there
        comments = {}
    settings = parser.add_argument_group("settings")
    for name, kind in get_type_hints(Config).items():
        if get_origin(kind) is Literal:
            options = {"choices": get_args(kind), "type": type(get_args(kind)[0])}
        elif kind is bool:
            options = {"type": to_bool, "metavar": "true|false", "nargs": "?", "const": True}
        else:
            options = {"type": kind, "metavar": kind.__name__.upper()}
        text = f"{comments.get(name, '')} (default: {getattr(config, name)!r})".replace("%", "%%")
        settings.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **options)


def read_settings(path: str) -> dict:
    """Return the settings in a JSON file, such as a run's config.json. Raises UsageError if it is none."""
    try:
        settings = json.loads(Path(path).expanduser().read_text())
        unknown = settings.keys() - get_type_hints(Config).keys()
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} cannot be read as a JSON object of settings ({error})") from None
    if unknown:
        raise UsageError(f"{path}: there is no setting {min(unknown)}")
    return {name: value for name, value in settings.items() if name != "run_dir"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. The result has `config`; `resume` (bool); `report`: whether to draw pictures at the end.

    A flag goes before the file given with --config, and the file before config.py. Raises UsageError.
    """
    parser = argparse.ArgumentParser(
        prog="train.py",
        usage="python train.py [--resume RUN_DIR | --config FILE] [--no-report] [--SETTING VALUE ...]",
        description="Train the 138,666-parameter network on CIFAR-10.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=42),
        allow_abbrev=False,
    )
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--resume", metavar="RUN_DIR", help="continue the run in this folder")
    begin.add_argument("--config", metavar="FILE", help="take settings from a JSON file, such as a run's config.json")
    parser.add_argument("--no-report", action="store_false", dest="report", help="draw no pictures, write no report.md")
    try:
        check(config)
        add_settings(parser)
    except (UsageError, argparse.ArgumentError) as error:
        raise UsageError(f"config.py: {error}") from None
    arguments = parser.parse_args(argv)
    given = {name: value for name, value in vars(arguments).items() if name in get_type_hints(Config)}
    if arguments.resume is not None:
        folder = Path(arguments.resume).expanduser()
        arguments.config = resumed_config(str(folder.parent if folder.is_file() else folder), given)
    else:
        arguments.config = replace(config, **(read_settings(arguments.config) if arguments.config else {}), **given)
        if not arguments.config.run_dir:
            arguments.config = replace(arguments.config, run_dir=new_run_dir())
    arguments.resume = arguments.resume is not None
    return arguments


def stop(signum: int, frame: object) -> None:
    """Raise KeyboardInterrupt with the signal's number: what Ctrl-C, SIGTERM and SIGHUP do."""
    raise KeyboardInterrupt(signum)


def last_line(error: Exception) -> str:
    """Return an error's message; what a worker raised has the worker's traceback in front of it."""
    return str(error).strip().rpartition("\n")[2].removeprefix("config.UsageError: ")


def in_one_line(program: str, function: Callable[[], T], progress: Callable[[bool], str] | None = None) -> T:
    """Return what the function returns; if it fails, end the program with one line on stderr and an exit code.

    2: a mistake of the user's; 1: an error of the system, in its own words, or a loss that is not finite; 128 and the
    signal's number: Ctrl-C, SIGTERM, SIGHUP. Anything else is Python's traceback, and 1. Except after a mistake, the
    line goes on with `progress(resumable)`: what is saved of a run.
    """
    for number in STOPS:
        signal.signal(number, stop)
    resumable = True
    try:
        return function()
    except UsageError as error:
        code, message = 2, f"error: {last_line(error)}"
    except FloatingPointError as error:
        code, message, resumable = 1, f"stopped: {error}", False
    except OSError as error:
        code, message = 1, f"stopped: {last_line(error)}"
    except KeyboardInterrupt as error:
        code = 128 + (error.args or [signal.SIGINT])[0]
        message = f"stopped by {signal.Signals(code - 128).name}"
    except Exception as error:
        code, message = 1, f"stopped by {type(error).__name__}"
        print(traceback.format_exc(), file=sys.__stderr__, flush=True)
    for number in STOPS:  # the program is ending already
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "SIGCHLD"):  # torch's alarm at the end of a worker; not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if progress is not None and code != 2:
        message += f"; {progress(resumable)}"
    print(f"{program}: {message}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        os._exit(code)  # nccl's own shutdown would wait for the other processes
    sys.exit(code)


def run(main: Callable[..., None], report: Callable[[str], None]) -> None:
    """Train as the command line asks, by main(config, resume); then, for decoration only, call report(run_dir)."""
    if hasattr(builtins, "__IPYTHON__"):
        sys.exit("train.py: in a notebook, start it in a process of its own: !python train.py")
    os.environ.pop("MPLBACKEND", None)  # of a notebook that started this: it may be missing here
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # no print ends a run, whatever the terminal's encoding
    launcher = "python"
    if dist.is_torchelastic_launched():
        one_machine = os.environ["GROUP_WORLD_SIZE"] == "1"
        launcher = f"torchrun --nproc-per-node {os.environ['WORLD_SIZE']}" if one_machine else "torchrun ..."
        if os.environ["RANK"] != "0":  # one process speaks for all
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    arguments = in_one_line("train.py", parse_args)
    run_dir = arguments.config.run_dir

    def train() -> None:
        keep_freed_memory()
        with process_group(arguments.config.device):
            main(replace(arguments.config, run_dir=of_first(run_dir)), resume=arguments.resume)  # clocks may differ
        if arguments.report and os.environ.get("RANK", "0") == "0":
            try:
                report(run_dir)
            except Exception as error:
                print(f"train.py: the run is finished, but not its report ({error})", file=sys.stderr)

    in_one_line("train.py", train, lambda resumable: describe_progress(run_dir, launcher, resumable))
