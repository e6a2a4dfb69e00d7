"""What comes after ``python train.py``: open it to add a flag that is not a setting in config.py."""

import argparse
import builtins
import contextlib
import difflib
import inspect
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from torch import distributed as dist

from config import Config, UsageError, check, config
from extras.distributed import first_to_fail, launcher, of_first_process, process_group
from extras.evaluate import evaluate
from extras.failures import SignalReceived, describe_failure
from extras.predict import print_predictions
from extras.runs import CHANGEABLE, checkpoint_to_test, describe_progress, resumed_config
from extras.speed import keep_freed_memory
from utils import new_run_dir

IN_NOTEBOOK = hasattr(builtins, "__IPYTHON__")  # or IPython in a terminal, by %run
WEIGHTS = Path(__file__).parent.parent / "weights" / "cifar10.pt"  # what --predict uses if no checkpoint is named

MODES = "--resume", "--evaluate", "--predict", "--tta", "--no-report"
# What may be given beside --resume, --evaluate and --predict; the rest follows from the run or the checkpoint.
GIVEN_WITH = {
    "resume": CHANGEABLE,
    "evaluate": {"batch_size", "device", "precision", "data_dir"},
    "predict": set(),
}


class _Parser(argparse.ArgumentParser):
    """argparse, except that a wrong command line raises UsageError."""

    def error(self, message: str):
        raise UsageError(message)


def to_flag(name: str) -> str:
    """Return the flag for a field of Config: "batch_size" is "--batch-size"."""
    return f"--{name.replace('_', '-')}"


def to_bool(text: str) -> bool:
    """Return the value of the word "true" or "false"; raise ArgumentTypeError for any other."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return text.lower() == "true"


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Give the parser a flag for each field of Config, with the comment beside it as help."""
    comments = dict(re.findall(r"^ +(\w+): .*? # *(.*)", inspect.getsource(Config), re.MULTILINE))
    settings = parser.add_argument_group("settings")
    for name, kind in get_type_hints(Config).items():
        if get_origin(kind) is Literal:
            options = {"choices": get_args(kind), "type": type(get_args(kind)[0])}
        elif kind is bool:
            options = {
                "type": to_bool,
                "metavar": "true|false",
                "nargs": "?",
                "const": True,
            }
        else:
            options = {"type": kind, "metavar": kind.__name__.upper()}
        text = f"{comments.get(name, '')} (default: {getattr(config, name)!r})".replace("%", "%%")
        settings.add_argument(to_flag(name), default=argparse.SUPPRESS, help=text, **options)


def make_parser() -> _Parser:
    """Return the parser of the command line. Raises UsageError for a mistake in config.py."""
    parser = _Parser(
        prog="train.py",
        usage="python train.py [--resume RUN_DIR | --evaluate PATH] [--predict IMAGE ...] [--SETTING VALUE ...]",
        description="Train the 138,666-parameter network on CIFAR-10.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=42),
        allow_abbrev=False,
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--resume", metavar="RUN_DIR", help="continue the run in this folder")
    modes.add_argument("--evaluate", metavar="PATH", help="test a checkpoint, or a run's; its report goes beside it")
    parser.add_argument("--predict", metavar="IMAGE", nargs="+", help="print each image's likeliest classes")
    parser.add_argument("--tta", action="store_true", help="with --evaluate, average over mirrored images as well")
    parser.add_argument("--no-report", action="store_false", dest="report", help="draw no pictures, write no report.md")
    try:
        check(config)
        add_settings(parser)
    except (UsageError, argparse.ArgumentError) as error:
        raise UsageError(f"config.py: {error}") from None
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line. Raises UsageError for a wrong one.

    The result has `config` and `given`, those of its fields that the command line names, with their values; `resume`,
    `evaluate`, `predict` (images; `evaluate` then names the checkpoint) and `tta`; `report`: whether to draw pictures.
    """
    parser, names = make_parser(), [field.name for field in fields(Config)]
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].partition("=")[0]
        flags = [flag.removeprefix("--") for flag in (*map(to_flag, names), *MODES)]
        short = [flag for flag in flags if "--" + "".join(part[0] for part in flag.split("-")) == word]
        nearest = short or difflib.get_close_matches(word.removeprefix("--"), flags, n=1)
        hint = f"did you mean --{nearest[0]}?" if nearest else "see --help"
        parser.error(f"unknown argument {word}: {hint}")
    arguments.given = {name: value for name, value in vars(arguments).items() if name in names}
    arguments.config = replace(config, **arguments.given)
    for mode, allowed in GIVEN_WITH.items():
        for name in arguments.given:
            if getattr(arguments, mode) is not None and name not in allowed:
                parser.error(f"{to_flag(name)} cannot be given with --{mode}")
    if arguments.tta and (arguments.evaluate is None or arguments.predict):
        parser.error("--tta goes with --evaluate PATH only")
    if arguments.predict and (arguments.resume is not None or not arguments.report):
        parser.error("--predict goes with --evaluate PATH only")
    if arguments.predict and arguments.evaluate is None:
        arguments.evaluate = str(WEIGHTS)
    if arguments.resume and Path(arguments.resume).is_file():  # a file in the run's folder
        arguments.resume = str(Path(arguments.resume).parent)
    return arguments


def stop(signum: int, frame: object) -> None:
    """Raise SignalReceived: what Ctrl-C and SIGTERM do here, in place of what Python does."""
    raise SignalReceived(signum)


def set_up_output() -> None:
    """Keep print from ending a run, whatever a name holds, whatever the terminal's encoding, even with no terminal.

    Of several processes, only rank 0 prints, until first_to_fail lets another.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed, or this is pythonw
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        with contextlib.suppress(AttributeError):  # a notebook's stream takes everything
            getattr(sys, name).reconfigure(errors="backslashreplace")
    if dist.is_torchelastic_launched() and os.environ["RANK"] != "0":
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if not IN_NOTEBOOK:
        os.environ.pop("MPLBACKEND", None)  # from a notebook that started this: it may be missing here, and is unneeded


def run(main: Callable[..., None]) -> None:
    """Do what the command line asks; to train, call main(config, resume, report).

    A run that ends early prints one line on stderr, and its exit code is not 0. Processes that share a run print one
    line between them.
    """
    set_up_output()
    arguments, run_dir, several = None, "", dist.is_torchelastic_launched()
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        arguments = parse_args()
        run_dir = arguments.resume or arguments.config.run_dir or new_run_dir()
        device = arguments.config.device
        if several and arguments.resume is not None:
            device = resumed_config(run_dir, arguments.given).device
        with process_group(device) if several else contextlib.nullcontext():
            if several:
                run_dir = of_first_process(run_dir)  # the others may have read the clock a second later
            return carry_out(arguments, replace(arguments.config, run_dir=run_dir), main)
    except SystemExit:
        raise
    except BaseException as error:
        for number in handlers:  # the program is ending already
            signal.signal(number, signal.SIG_IGN)
        if hasattr(signal, "SIGCHLD"):  # torch's alarm at the end of a worker; not on Windows
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if several and not first_to_fail():
            os._exit(1)  # at once: what the others wait for will not come
        failure = describe_failure(error)
        if failure is None and not several:
            raise
        code, message = failure or (1, traceback.format_exc())
        resumable = getattr(error, "resumable", True)
    finally:
        if IN_NOTEBOOK:  # it lives on
            for number, handler in handlers.items():
                signal.signal(number, handler)
    # Only here: by now the exception is gone, and with its frames the bars and the workers that they held.
    if code != 2 and arguments is not None and arguments.evaluate is None:
        message += f"; {describe_progress(run_dir, resumable, launcher())}"
    print(f"train.py: {message}\n", end="", file=sys.stderr, flush=True)  # one piece: torchrun writes there too
    if several:
        os._exit(code)  # nccl's own shutdown would wait for the others
    sys.exit(code)


def carry_out(arguments: argparse.Namespace, config: Config, main: Callable[..., None]) -> None:
    """Train, continue, evaluate or predict. Only one process evaluates or predicts."""
    keep_freed_memory()
    if arguments.resume is not None:
        main(resumed_config(arguments.resume, arguments.given), resume=True, report=arguments.report)
    elif arguments.evaluate is None:
        main(config, report=arguments.report)
    elif dist.is_initialized() and dist.get_rank() > 0:
        return
    else:
        path = arguments.evaluate
        if Path(path).is_dir():  # a run's folder
            path = checkpoint_to_test(path)
        if arguments.predict:
            print_predictions(path, arguments.predict)
        else:
            here = {"device": config.device, "precision": config.precision}
            evaluate(path, here | arguments.given, arguments.report, arguments.tta)
