"""What stands after ``python train.py``: open it to add a flag that is no setting of config.py."""

import contextlib
import difflib
import os
import signal
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import simple_parsing
from torch import distributed as dist

from config import Config, UsageError, check, config
from extras.distributed import first_to_fail, launcher, of_first_process, process_group
from extras.evaluate import evaluate
from extras.failures import Stop, describe_failure
from extras.predict import print_predictions
from extras.runs import LAST, checkpoint_that_counts, describe_progress, resumed_config
from extras.speed import keep_freed_memory
from utils import new_run_dir

WEIGHTS = Path(__file__).parent.parent / "weights" / "cifar10.pt"  # what --predict asks if no checkpoint is named

MODES = "--resume", "--evaluate", "--predict", "--tta", "--no-report"
# What may be given beside --resume, --evaluate and --predict; the rest follows from the run or the checkpoint.
GIVEN_WITH = {
    "resume": {"epochs", "num_workers", "device", "precision", "data_dir"},
    "evaluate": {"batch_size", "device", "precision", "data_dir"},
    "predict": set(),
}


class _HelpFormatter(simple_parsing.SimpleHelpFormatter):
    """A line for each setting where the terminal is wide enough; no "(default: )" where there is none."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=42)

    def _get_help_string(self, action):
        action.help = action.help.replace("%", "%%").replace("%%%%", "%%")  # a comment may hold any character
        return action.help if action.default in (None, "") or action.nargs == 0 else super()._get_help_string(action)


class _Parser(simple_parsing.ArgumentParser):
    """argparse with fields of a dataclass as flags; errors are one line on stderr, exit code 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def format_help(self) -> str:
        return super().format_help().replace("Config ['config']:", "settings:")


def make_parser() -> _Parser:
    """Return the parser; simple_parsing makes a flag of each field of Config, with the comment beside it as help."""
    parser = _Parser(
        prog="train.py",
        usage="python train.py [--resume RUN_DIR | --evaluate PATH] [--predict IMAGE ...] [--SETTING VALUE ...]",
        description="Train the 138,666-parameter network on CIFAR-10.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        add_option_string_dash_variants=simple_parsing.DashVariant.DASH,
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--resume", metavar="RUN_DIR", help="continue the run in this folder")
    modes.add_argument("--evaluate", metavar="PATH", help="print a checkpoint's accuracy instead of training")
    parser.add_argument("--predict", metavar="IMAGE", nargs="+", help="print what --evaluate's network sees")
    parser.add_argument("--tta", action="store_true", help="with --evaluate, average over mirrored images as well")
    parser.add_argument("--no-report", action="store_true", help="draw no pictures and write no report.md")
    try:
        check(config)
        parser.add_arguments(Config, dest="config", default=config)
    except UsageError as error:
        parser.error(f"config.py: {error}")
    except Exception as error:  # simple_parsing's own
        parser.error(f"config.py: a field's type cannot become a flag ({error})")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Read the command line; a wrong one ends the program with one line on stderr and exit code 2.

    The result has `config` and `given`, the fields of it that stand on the command line with their values; `resume`,
    `evaluate`, `predict` (images; `evaluate` names the checkpoint then) and `tta`; `report`: whether to draw pictures.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser()
    arguments, unknown = parser.parse_known_args(argv)
    flags = {f"--{field.name.replace('_', '-')}": field.name for field in fields(Config)}
    if unknown:
        short = [flag for flag in flags if "--" + "".join(word[0] for word in flag[2:].split("-")) == unknown[0]]
        nearest = short or difflib.get_close_matches(unknown[0], [*flags, *MODES], n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "see --help"
        parser.error(f"unknown argument {unknown[0]}: {hint}")
    words = {word.split("=")[0] for word in argv}
    given = {flag: name for flag, name in flags.items() if words & {flag, flag.replace("--", "--no", 1)}}
    for mode, allowed in GIVEN_WITH.items():
        for flag, name in given.items():
            if getattr(arguments, mode) is not None and name not in allowed:
                parser.error(f"{flag} cannot be given with --{mode}")
    if arguments.tta and (arguments.evaluate is None or arguments.predict):
        parser.error("--tta goes with --evaluate PATH only")
    if arguments.predict and (arguments.resume is not None or arguments.no_report):
        parser.error("--predict goes with --evaluate PATH only")
    if arguments.predict and arguments.evaluate is None:
        arguments.evaluate = str(WEIGHTS)
    if arguments.resume and Path(arguments.resume).name == LAST:
        arguments.resume = str(Path(arguments.resume).parent)
    arguments.given = {name: getattr(arguments.config, name) for name in given.values()}
    arguments.report = not arguments.no_report
    return arguments


def stop(signum: int, frame: object) -> None:
    """Raise Stop: what Ctrl-C and SIGTERM do, instead of what Python does."""
    raise Stop(signum)


def set_up_output() -> None:
    """Let no print end a run: whatever a name holds, whatever the terminal's encoding, or if there is none."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed, or this is pythonw
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        with contextlib.suppress(AttributeError):  # a notebook's takes everything
            getattr(sys, name).reconfigure(errors="backslashreplace")
    os.environ.pop("MPLBACKEND", None)  # a notebook's would be looked for here, and no picture is shown


def run(main: Callable[..., None]) -> None:
    """Do what the command line asks, by main(config, resume, report) where it is to train.

    An end before time is one line on stderr and an exit code that is not 0; one line in all, if several processes
    share the run.
    """
    set_up_output()
    arguments, run_dir = None, ""
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        arguments = parse_args()
        run_dir = arguments.resume or arguments.config.run_dir or new_run_dir()
        with process_group(arguments.config.device) if dist.is_torchelastic_launched() else contextlib.nullcontext():
            if dist.is_initialized():
                run_dir = of_first_process(run_dir)  # the others may have read the clock a second later
            return carry_out(arguments, replace(arguments.config, run_dir=run_dir), main)
    except SystemExit:
        raise
    except BaseException as error:
        for number in handlers:  # the program is ending already
            signal.signal(number, signal.SIG_IGN)
        if hasattr(signal, "SIGCHLD"):  # torch's alarm at the end of a worker; not on Windows
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if dist.is_initialized() and not first_to_fail():
            os._exit(1)  # at once: what the others wait for will not come
        failure = describe_failure(error)
        if failure is None and not dist.is_initialized():
            raise
        code, message = failure or (1, traceback.format_exc())
        resumable = getattr(error, "resumable", True)
    finally:
        if "ipykernel" in sys.modules:  # a notebook lives on
            for number, handler in handlers.items():
                signal.signal(number, handler)
    # Only here, where the exception is gone, are the bars closed and the workers ended that its frames held.
    if code != 2 and arguments.evaluate is None:
        message += f"; {describe_progress(run_dir, resumable, launcher())}"
    print(f"train.py: {message}\n", end="", file=sys.stderr, flush=True)  # one piece: torchrun writes there too
    if dist.is_initialized():
        os._exit(code)  # nccl's own end would wait for the others
    sys.exit(code)


def carry_out(arguments: Namespace, config: Config, main: Callable[..., None]) -> None:
    """Train, continue, evaluate or predict. Evaluation and prediction are the work of one process."""
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
            path = checkpoint_that_counts(path)
        if arguments.predict:
            print_predictions(path, arguments.predict)
        else:
            here = {"device": config.device, "precision": config.precision}
            evaluate(path, here | arguments.given, arguments.report, arguments.tta)
