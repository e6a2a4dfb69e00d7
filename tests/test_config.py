import re
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest

from config import RANGES, Config, UsageError, check, config
from tests.conftest import ROOT


def test_config_cannot_be_changed_by_accident():
    with pytest.raises(FrozenInstanceError, match=r"dataclasses\.replace\(config, epochs=3\) gives a copy"):
        config.epochs = 3


LIMITS = {  # of each number: what is allowed, what is not
    "valid_split": [(0, 0.9), (-0.1, 1.0)],
    "num_workers": [(-1, 0, 256), (-2,)],
    "batch_size": [(1, 65536), (0,)],
    "flip_probability": [(0, 1), (-0.1, 1.1)],
    "shift_scale_rotate_probability": [(0, 1), (-0.1, 1.1)],
    "shift_limit": [(0, 1), (-0.1, 1.1)],
    "scale_limit": [(0, 0.9), (-0.1, 1.0)],
    "rotate_limit": [(0, 180), (-1, 181)],
    "coarse_dropout_probability": [(0, 1), (-0.1, 1.1)],
    "hole_size": [(1, 32), (0, 33)],
    "epochs": [(1, 1000), (0,)],
    "learning_rate": [(1e-6, 1, 10), (0, float("nan"))],
    "weight_decay": [(0, 1), (-1, 11)],
    "momentum": [(0, 0.999), (-0.1, 1.0, float("inf"))],
    "label_smoothing": [(0, 0.9), (-0.1, 1.0)],
    "dropout": [(0, 0.9), (-0.1, 1.0)],
    "seed": [(0, 2**63 - 1), (-1, 2**63)],
}


@pytest.mark.parametrize("name", LIMITS)
def test_number_out_of_range_is_named_with_its_range(name):
    allowed, refused = LIMITS[name]
    for value in allowed:
        check(replace(config, nesterov=False, **{name: value}))
    for value in refused:
        with pytest.raises(UsageError, match=f"^{name} must be between .+ and .+, not {value}$"):
            check(replace(config, **{name: value}))


def test_every_range_is_that_of_a_number_and_was_tried():
    assert {field.name for field in fields(Config) if field.type in (int, float)} >= LIMITS.keys() == RANGES.keys()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("epochs", 1.5, "of type int, not 1.5"),
        ("epochs", True, "of type int, not True"),
        ("seed", "0", "of type int, not '0'"),
        ("seed", np.int64(0), "of type int, not "),
        ("data_dir", None, "of type str, not None"),
        ("nesterov", 1, "of type bool, not 1"),
        ("dataset", "no such", "one of cifar10, cifar100, folder, shapes, not 'no such'"),
        ("optimizer", "no such", "one of muon, sgd, not 'no such'"),
        ("schedule", "no such", "one of onecycle, cosine, plateau, constant, not 'no such'"),
        ("precision", "no such", "one of auto, float32, bfloat16, float16, not 'no such'"),
    ],
)
def test_wrong_type_or_word_is_named_with_what_may_be(name, value, words):
    with pytest.raises(UsageError, match=f"^{name} must be {words}"):
        check(replace(config, **{name: value}))


def check_edited(old, new):
    """Check config.py with a piece of it, a regular expression, edited."""
    source, edited = (ROOT / "config.py").read_text(), {"__name__": "edited_config"}
    assert re.search(old, source)
    exec(re.sub(old, new, source), edited)
    edited["check"](edited["config"])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (r"batch_size: int = \d+", "", "the field batch_size is missing"),
        ("device: str", "gadget: str", "the field device is missing"),
        (r"epochs: int = \d+", "epochs: list = 30", "epochs must be declared as bool, int, float, str or Literal"),
        (r"epochs: int = \d+", "epochs: int = 30.0", "epochs must be of type int, not 30.0"),
        (r"epochs: int = \d+", "epochs: Literal[16, 32] = 17", "epochs must be one of 16, 32, not 17"),
    ],
)
def test_mistake_in_config_py_itself_is_named(old, new, words):
    with pytest.raises(ValueError, match=words):
        check_edited(old, new)


def test_field_of_your_own_is_welcome():
    check_edited("epochs: int", "note: str = ''\n    epochs: int")
