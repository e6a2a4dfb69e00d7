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
from typing import Literal, get_args, get_origin, get_type_hints

from torch import distributed as dist

from config import Config, UsageError, check, config
from parts.distributed import of_first, process_group
from parts.run import describe_progress, resumed_config
from utils import new_run_dir, rank_and_size

STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def boolean(word: str) -> bool:
    """Return what "true" or "false" says; at a ValueError, argparse names this function: "invalid boolean value"."""
    return bool(["false", "true"].index(word.lower()))


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Give the parser a flag for each field of Config, with the comment beside it as help."""
    comments = dict(re.findall(r"^ +(\w+): .*? # *(.*)", inspect.getsource(Config), re.MULTILINE))
    settings = parser.add_argument_group("settings")
    for name, kind in get_type_hints(Config).items():
        if get_origin(kind) is Literal:
            options = {"choices": get_args(kind), "type": type(get_args(kind)[0])}
        elif kind is bool:
            options = {"type": boolean, "metavar": "BOOL", "nargs": "?", "const": True}
        else:
            options = {"type": kind, "metavar": kind.__name__.upper()}
        text = f"{comments.get(name, '')} (default: {getattr(config, name)!r})".replace("%", "%%")
        settings.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **options)


def parse_args(argv: list[str] | None = None) -> tuple[Config, bool, bool]:
    """Return (config, resume, whether to draw a report). Flags override --config's file, which overrides config.py."""
    usage = "python train.py [--resume RUN_DIR | --config FILE] [--no-report] [--SETTING VALUE ...]"
    parser = argparse.ArgumentParser("train.py", usage, allow_abbrev=False)
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--resume", metavar="RUN_DIR", help="continue the run in this folder")
    begin.add_argument("--config", metavar="FILE", help="take settings from a JSON file, such as a run's config.json")
    parser.add_argument("--no-report", action="store_false", dest="report", help="draw no pictures, write no report.md")
    check(config)
    add_settings(parser)
    arguments = parser.parse_args(argv)
    given = {name: value for name, value in vars(arguments).items() if name in get_type_hints(Config)}
    if arguments.resume is not None:
        if "run_dir" in given:
            raise UsageError("--resume names the run's folder: leave out --run-dir")
        return resumed_config(os.path.expanduser(arguments.resume), given), True, arguments.report
    try:
        settings = json.loads(Path(arguments.config).expanduser().read_text()) if arguments.config is not None else {}
        settings = replace(config, **(settings | given))
        return replace(settings, run_dir=os.path.expanduser(settings.run_dir or new_run_dir())), False, arguments.report
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{arguments.config} cannot be read as a JSON object of settings ({error})") from None


def _stop(signum: int, frame: object) -> None:
    raise KeyboardInterrupt(signum)


def in_one_line(program: str, function: Callable, progress: Callable[[bool], str] | None = None) -> object:
    """Return what the function returns; if it fails, end the program with one line on stderr and an exit code.

    2: the user's mistake; 128 and a signal's number; 1: all else, a bug after Python's traceback.
    progress(resumable): what is saved, for the end of the line.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):  # one may be closed
        stream.reconfigure(errors="backslashreplace")  # no print ends a run, whatever the terminal's encoding
    for number in (stop for stop in STOPS if signal.getsignal(stop) != signal.SIG_IGN):  # nohup ignores SIGHUP
        signal.signal(number, _stop)
    resumable = True
    try:
        return function()
    except (UsageError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]  # after a worker's traceback, if any
        code, message = (2, "error") if isinstance(error, UsageError) else (1, "stopped")
        message += f": {reason.removeprefix('config.UsageError: ')}"
    except FloatingPointError as error:  # a loss that is not finite
        code, message, resumable = 1, f"stopped: {error}", False
    except KeyboardInterrupt as error:
        code = 128 + (error.args or [signal.SIGINT])[0]  # without args it is Python's own
        message = f"stopped by {signal.Signals(code - 128).name}"
    except Exception as error:
        code, message = 1, f"stopped by {type(error).__name__}"
        print(traceback.format_exc(), file=sys.__stderr__, flush=True)
    # After the except blocks: the exception and its frames are freed, so their bars are closed and workers ended.
    for number in STOPS:  # the program is ending already
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "SIGCHLD"):  # torch's alarm at the end of a worker; not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if progress is not None and code != 2:
        message += f"; {progress(resumable)}"
    told = sys.stderr if rank_and_size()[0] == 0 or code != 1 else sys.__stderr__  # another process may fail alone
    print(f"{program}: {message}", file=told, flush=True)
    if dist.is_initialized():
        os._exit(code)  # nccl's own shutdown would wait for the other processes
    sys.exit(code)


def run(main: Callable, report: Callable[[str], None]) -> None:
    """Train as the command line asks, by main(config, resume); then, for decoration only, call report(run_dir)."""
    if hasattr(builtins, "__IPYTHON__"):
        sys.exit("train.py: in a notebook, start it in a process of its own: !python train.py")
    os.environ.pop("MPLBACKEND", None)  # of a notebook that started this: it may be missing here
    launcher, rank = ("torchrun ...", int(os.environ["RANK"])) if dist.is_torchelastic_launched() else ("python", 0)
    if rank > 0:  # one process speaks for all
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    config, resume, wanted = in_one_line("train.py", parse_args)

    def train() -> None:
        with process_group(config.device):
            main(replace(config, run_dir=of_first(config.run_dir)), resume)  # the clocks of several may differ
        if wanted and rank == 0:
            try:
                report(config.run_dir)
            except Exception as error:
                print(f"train.py: the run is finished, but not its report ({error})", file=sys.stderr)

    in_one_line("train.py", train, lambda resumable: describe_progress(config.run_dir, launcher, resumable))
