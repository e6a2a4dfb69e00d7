from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest

from config import RANGES, Config, UsageError, check, config
from tests.conftest import ROOT


def test_config_as_it_is_passes():
    check(config)


def test_config_cannot_be_changed_by_accident():
    with pytest.raises(FrozenInstanceError, match=r"dataclasses\.replace\(config, epochs=3\) gives a copy"):
        config.epochs = 3


def test_int_is_good_enough_for_a_float():
    check(replace(config, learning_rate=1))


def test_every_number_has_a_range():
    assert {field.name for field in fields(Config) if field.type in (int, float)} == set(RANGES)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("valid_split", (0, 0.9)),
        ("num_workers", (-1, 0, 256)),
        ("batch_size", (1, 65536)),
        ("shift_limit", (0, 1)),
        ("rotate_limit", (0, 180)),
        ("hole_size", (1, 32)),
        ("epochs", (1, 1000)),
        ("learning_rate", (1e-6, 10)),
        ("weight_decay", (0, 1)),
        ("momentum", (0, 0.999)),
        ("seed", (0, 2**63 - 1)),
    ],
)
def test_what_makes_sense_is_allowed(name, values):
    for value in values:
        check(replace(config, nesterov=False, **{name: value}))


OUT_OF_RANGE = {
    "valid_split": (-0.1, 1.0),
    "num_workers": (-2,),
    "batch_size": (0,),
    "flip_probability": (-0.1, 1.1),
    "shift_scale_rotate_probability": (-0.1, 1.1),
    "shift_limit": (-0.1, 1.1),
    "scale_limit": (-0.1, 1.0),
    "rotate_limit": (-1, 181),
    "coarse_dropout_probability": (-0.1, 1.1),
    "hole_size": (0, 33),
    "epochs": (0,),
    "learning_rate": (0, float("nan")),
    "momentum": (-0.1, 1.0, float("inf")),
    "weight_decay": (-1, 11),
    "label_smoothing": (-0.1, 1.0),
    "dropout": (-0.1, 1.0),
    "seed": (-1, 2**63),
}


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in OUT_OF_RANGE.items() for v in values])
def test_number_out_of_range_is_named_with_its_range(name, value):
    with pytest.raises(UsageError, match=f"^{name} must be between .+ and .+, not {value}$"):
        check(replace(config, **{name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 1.5), ("epochs", True), ("seed", "0"), ("seed", np.int64(0)), ("data_dir", None), ("nesterov", 1)],
)
def test_wrong_type_is_named(name, value):
    with pytest.raises(UsageError, match=f"^{name} must be of type \\w+, not "):
        check(replace(config, **{name: value}))


@pytest.mark.parametrize("name", ["dataset", "optimizer", "schedule", "precision"])
def test_unknown_word_is_named_with_those_that_are_known(name):
    known = {"dataset": "cifar100", "optimizer": "muon, sgd", "schedule": "cosine", "precision": "bfloat16"}[name]
    with pytest.raises(UsageError, match=f"^{name} must be one of .*{known}.*, not 'no such'$"):
        check(replace(config, **{name: "no such"}))


def test_nesterov_without_momentum_is_refused_with_the_way_out():
    with pytest.raises(UsageError, match="give --nesterov false too"):
        check(replace(config, momentum=0.0))


def edited_config(old, new):
    """Return config.py's names, with a piece of it edited."""
    source, names = (ROOT / "config.py").read_text(), {"__name__": "edited_config"}
    assert old in source
    exec(source.replace(old, new), names)
    return names


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("batch_size: int = 128", "", "the field batch_size is missing"),
        ("device: str", "gadget: str", "the field device is missing"),
        ("epochs: int = 30", "epochs: list = 30", "epochs must be declared as bool, int, float, str or Literal"),
        ("epochs: int = 30", "epochs: int = 30.0", "epochs must be of type int, not 30.0"),
    ],
)
def test_mistake_in_config_py_itself_is_named(old, new, words):
    edited = edited_config(old, new)
    with pytest.raises(ValueError, match=words):
        edited["check"](edited["config"])


def test_field_of_your_own_is_welcome():
    edited = edited_config("epochs: int", "note: str = ''\n    epochs: int")
    edited["check"](edited["config"])
