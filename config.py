"""Every setting of a run: edit a default here, or give it on the command line (``--batch-size 256``)."""

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

import simple_parsing


@dataclass(frozen=True)
class Config:
    """The defaults are edited in config.py."""

    dataset: Literal["cifar10", "cifar100", "folder", "shapes"] = "cifar10"  # shapes are drawn, not downloaded
    data_dir: str = "data"  # of the downloads; for `folder`, what holds train/CLASS/* and test/CLASS/*
    valid_split: float = 0.0  # part of the training images to validate on; 0: the test images
    num_workers: int = -1  # processes that augment; -1: as many as pay off
    batch_size: int = 128  # images per step

    flip_probability: float = 0.5  # of a mirrored image
    shift_scale_rotate_probability: float = 0.5  # of the next three together
    shift_limit: float = 0.125  # part of the image's side, in any direction, in whole pixels
    scale_limit: float = 0.1  # relative change of size
    rotate_limit: float = 15.0  # degrees, in either direction
    coarse_dropout_probability: float = 0.5  # of a square hole in the dataset's mean colour
    hole_size: int = 8  # side of the hole in pixels

    epochs: int = 30  # passes over the training images
    learning_rate: float = 0.2  # highest value of the schedule
    muon_learning_rate: float = 0.02  # the same, of Muon, which moves most weights; 0: SGD moves all
    schedule: Literal["onecycle", "cosine", "plateau", "constant"] = "onecycle"  # of the learning rate
    momentum: float = 0.9  # of SGD
    nesterov: bool = True  # look ahead by one momentum step
    weight_decay: float = 5e-4  # of the convolution weights that SGD moves: this part of each is added to its gradient
    muon_weight_decay: float = 0.05  # of those that Muon moves: a step shrinks them by its learning rate times this
    label_smoothing: float = 0.1  # part of each label that is spread over all classes
    dropout: float = 0.0  # probability of zeroing a channel

    seed: int = 0  # the same seed gives the same run
    device: str = "auto"  # cpu, cuda, cuda:1, mps, ...
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the layers' arithmetic
    compile: bool = False  # torch.compile: takes up to a minute, then steps can be faster
    deterministic: bool = False  # meant for the same run bit for bit on CUDA too, slower; the CPU's always is
    run_dir: str = ""  # folder of the results; empty: a new dated one under runs/


config = Config()

WEIGHTS = Path(__file__).parent / "weights" / "cifar10.pt"  # what --predict asks if no checkpoint is named


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line for the user."""


# What each number may be: lowest and highest value, both included.
_RANGES = {
    "valid_split": (0, 0.9),
    "num_workers": (-1, 256),
    "batch_size": (1, 65536),
    "flip_probability": (0, 1),
    "shift_scale_rotate_probability": (0, 1),
    "shift_limit": (0, 1),
    "scale_limit": (0, 0.9),
    "rotate_limit": (0, 180),
    "coarse_dropout_probability": (0, 1),
    "hole_size": (1, 32),
    "epochs": (1, 100_000),
    "learning_rate": (1e-9, 1000),
    "muon_learning_rate": (0, 1000),
    "momentum": (0, 0.9999),
    "weight_decay": (0, 1),
    "muon_weight_decay": (0, 10),
    "label_smoothing": (0, 0.9),
    "dropout": (0, 0.9),
    "seed": (0, 2**63 - 1),
}


def check(config: Config) -> None:
    """Raise ConfigError, naming the field, the value and what is allowed, for the first field that is wrong."""
    for name, kind in get_type_hints(Config).items():
        value = getattr(config, name)
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(kind))}, not {value!r}")
        elif type(value) is not kind and not (kind is float and type(value) is int):
            raise ConfigError(f"{name} must be of type {kind.__name__}, not {value!r}")
        if name in _RANGES:
            low, high = _RANGES[name]
            if not low <= value <= high:  # false for NaN too
                raise ConfigError(f"{name} must be between {low:g} and {high:g}, not {value}")
    if config.nesterov and config.momentum == 0:
        raise ConfigError("nesterov needs a momentum above 0: give --nesterov false too")


class Arguments(NamedTuple):
    """What the command line asks for; `given` holds the fields of `config` that stand on it.

    predict: images; `evaluate` names the checkpoint then. report: whether pictures are drawn. tta: whether
    `evaluate` gives the accuracy with mirrored images too.
    """

    config: Config
    given: dict[str, object]
    resume: str | None
    evaluate: str | None
    predict: list[str] | None
    report: bool
    tta: bool


# What may be given beside --resume, --evaluate and --predict; the rest follows from the run or the checkpoint.
_GIVEN_WITH = {
    "resume": {"epochs", "num_workers", "device", "precision", "data_dir"},
    "evaluate": {"batch_size", "device", "precision", "data_dir"},
    "predict": set(),
}


_MODES = ("--resume", "--evaluate", "--predict", "--tta", "--no-report")


class _HelpFormatter(simple_parsing.SimpleHelpFormatter):
    """A line for each setting where the terminal is wide enough; no "(default: )" where there is none."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=42)

    def _get_help_string(self, action):
        return action.help if action.default in (None, "") or action.nargs == 0 else super()._get_help_string(action)


class _Parser(simple_parsing.ArgumentParser):
    """argparse with fields of a dataclass as flags; errors are one line on stderr, exit code 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def format_help(self) -> str:
        return super().format_help().replace("Config ['config']:", "settings:")


def parse_args(argv: Sequence[str] | None = None) -> Arguments:
    """Read the command line; a wrong one ends the program with one line on stderr and exit code 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
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
    parser.add_arguments(Config, dest="config", default=config)
    arguments, unknown = parser.parse_known_args(argv)
    flags = {f"--{field.name.replace('_', '-')}": field.name for field in fields(Config)}
    if unknown:
        nearest = difflib.get_close_matches(unknown[0], [*flags, *_MODES, "--help"], n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "see --help"
        parser.error(f"unknown argument {unknown[0]}: {hint}")
    try:
        check(arguments.config)
    except ConfigError as error:
        parser.error(str(error))
    words = {word.split("=")[0] for word in argv}
    given = {flag: name for flag, name in flags.items() if words & {flag, flag.replace("--", "--no", 1)}}
    for mode, allowed in _GIVEN_WITH.items():
        for flag, name in given.items():
            if getattr(arguments, mode) is not None and name not in allowed:
                parser.error(f"{flag} cannot be given with --{mode}")
    if arguments.tta and (arguments.evaluate is None or arguments.predict):
        parser.error("--tta goes with --evaluate PATH only")
    if arguments.predict:
        if arguments.resume is not None or arguments.no_report:
            parser.error("--predict goes with --evaluate PATH only")
        arguments.evaluate = arguments.evaluate if arguments.evaluate is not None else str(WEIGHTS)
    values = {name: getattr(arguments.config, name) for name in given.values()}
    modes = arguments.resume, arguments.evaluate, arguments.predict
    return Arguments(arguments.config, values, *modes, report=not arguments.no_report, tta=arguments.tta)
