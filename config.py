"""Every setting of a run: edit a default here, or give it on the command line (``--batch-size 256``)."""

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Config:
    """The settings of one run. In Python, `dataclasses.replace(config, batch_size=64)` gives a changed copy."""

    dataset: Literal["cifar10", "cifar100", "folder", "shapes"] = "cifar10"  # shapes are drawn, not downloaded
    data_dir: str = "data"  # of the downloads; for `folder`, what holds train/CLASS/* and test/CLASS/*
    image_size: int = 32  # side in pixels, of `folder`; the other datasets have 32
    train_images: int = 0  # how many of the training images to train on, rounded in each class; 0: all
    valid_split: float = 0.0  # fraction of the training images to validate on; 0: the test images
    num_workers: int = -1  # processes that augment; -1: as many as pay off
    batch_size: int = 128  # images per step

    flip_probability: float = 0.5  # that an image is mirrored
    shift_scale_rotate_probability: float = 0.5  # of shift, scale and rotation together
    shift_limit: float = 0.125  # at most this fraction of the side, each way, cut to whole pixels
    scale_limit: float = 0.1  # at most this fraction larger or smaller
    rotate_limit: float = 15.0  # at most this many degrees, either way
    coarse_dropout_probability: float = 0.5  # that a square hole is filled with the dataset's mean colour
    hole_size: int = 8  # side of the hole in pixels

    epochs: int = 30  # passes over the training images
    optimizer: Literal["muon", "sgd"] = "muon"  # muon leaves 2,042 of the 138,666 parameters to SGD
    learning_rate: float = 0.02  # highest value of the schedule; SGD beside Muon has ten times this
    schedule: Literal["onecycle", "cosine", "plateau", "constant"] = "onecycle"  # of the learning rate, over the run
    weight_decay: float = 0.05  # Muon's: a step multiplies its weights by 1 - learning_rate * this
    sgd_weight_decay: float = 5e-4  # SGD's, as torch.optim.SGD means it: beside Muon, and alone
    momentum: float = 0.9  # of SGD; that of Muon is 0.95
    nesterov: bool = True  # SGD looks ahead by one momentum step
    label_smoothing: float = 0.1  # fraction of each label that is spread over all classes
    activation: Literal["relu", "silu"] = "silu"  # of each layer; the specification's is relu
    dropout: float = 0.0  # probability of zeroing a channel
    weights: str = ""  # checkpoint whose weights the run begins with; empty: random ones

    seed: int = 0  # of all that is random: weights, order, augmentation, dropout
    device: str = "auto"  # cpu, cuda, cuda:1, mps, ...
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the layers' arithmetic
    compile: bool = False  # faster: on CUDA, one step is recorded and its Python runs no more; elsewhere, torch.compile
    deterministic: bool = False  # repeatable operations only: slower on CUDA; the CPU's always repeat
    run_dir: str = ""  # folder of the results; empty: a new dated one under runs/


config = Config()


class UsageError(ValueError):
    """A mistake in a setting, a file or an image, for the user to mend. The message says in one line what and how."""


RULES = (  # what is allowed, whether a value is, the fields
    ("above 0", lambda value: 0 < value < math.inf, "batch_size epochs learning_rate hole_size"),
    ("9 or more", lambda value: value >= 9, "image_size"),  # of less, the blocks leave nothing
    ("0 or more", lambda value: 0 <= value < math.inf, "rotate_limit weight_decay sgd_weight_decay seed train_images"),
    ("at least 0 and below 1", lambda value: 0 <= value < 1, "valid_split scale_limit momentum dropout"),
    ("from 0 to 1", lambda value: 0 <= value <= 1, "flip_probability shift_scale_rotate_probability"),
    ("from 0 to 1", lambda value: 0 <= value <= 1, "coarse_dropout_probability shift_limit label_smoothing"),
    ("-1 or more", lambda value: value >= -1, "num_workers"),
    ("a path on this machine, not a URL", lambda value: "://" not in value, "data_dir run_dir weights"),
)


def check(config: Config) -> None:
    """Raise UsageError, naming the field, the value and what is allowed, for the first field that is wrong."""
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                raise UsageError(f"{name} must be one of {', '.join(map(str, get_args(kind)))}, not {value!r}")
        elif kind not in (bool, int, float, str):
            raise UsageError(f"{name} must be declared as bool, int, float, str or Literal, not as {kind}")
        elif type(value) is not kind and (type(value), kind) != (int, float):  # an int will do for a float
            raise UsageError(f"{name} must be of type {kind.__name__}, not {value!r}")
    for allowed, holds, names in RULES:
        for name in names.split():
            if not holds(getattr(config, name)):
                raise UsageError(f"{name} must be {allowed}, not {getattr(config, name)!r}")
    if config.hole_size > config.image_size:
        raise UsageError(f"hole_size must be at most {config.image_size}, the image's side, not {config.hole_size}")
    if config.image_size != 32 and config.dataset in ("cifar10", "cifar100", "shapes"):
        raise UsageError(f"image_size must be 32 for {config.dataset}: another is for --dataset folder")
    if config.nesterov and config.momentum == 0:
        raise UsageError("nesterov needs a momentum above 0: give --nesterov false too")
