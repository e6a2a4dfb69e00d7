import re
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from config import UsageError, check, config
from tests.conftest import ROOT


def test_config_cannot_be_changed_by_accident():
    with pytest.raises(FrozenInstanceError):
        config.epochs = 3


LIMITS = {  # of each number: what is allowed, what is not
    "valid_split": [(0, 0.9), (-0.1, 1.0)],
    "num_workers": [(-1, 0, 256), (-2,)],
    "batch_size": [(1, 65536), (0,)],
    "flip_probability": [(0, 1), (-0.1, 1.1)],
    "shift_scale_rotate_probability": [(0, 1), (-0.1, 1.1)],
    "shift_limit": [(0, 1), (-0.1, 1.1)],
    "scale_limit": [(0, 0.9), (-0.1, 1.0)],
    "rotate_limit": [(0, 180), (-1,)],
    "coarse_dropout_probability": [(0, 1), (-0.1, 1.1)],
    "hole_size": [(1, 32), (0, 33)],
    "epochs": [(1, 1000), (0,)],
    "learning_rate": [(1e-6, 1, 10), (0, float("nan"), float("inf"))],
    "weight_decay": [(0, 1), (-1,)],
    "sgd_weight_decay": [(0, 1), (-1,)],
    "momentum": [(0, 0.999), (-0.1, 1.0)],
    "label_smoothing": [(0, 1), (-0.1, 1.1)],
    "dropout": [(0, 0.9), (-0.1, 1.0)],
    "seed": [(0, 2**63 - 1), (-1,)],
}


@pytest.mark.parametrize("name", LIMITS)
def test_number_out_of_range_is_named_with_its_value(name):
    allowed, refused = LIMITS[name]
    for value in allowed:
        check(replace(config, nesterov=False, **{name: value}))
    for value in refused:
        with pytest.raises(UsageError, match=f"^{name} must be .+, not {value}$"):
            check(replace(config, **{name: value}))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("epochs", 1.5, "of type int, not 1.5"),
        ("epochs", True, "of type int, not True"),
        ("seed", np.int64(0), "of type int, not "),
        ("data_dir", None, "of type str, not None"),
        ("data_dir", "s3://bucket/images", "a folder on this machine, not a URL"),
        ("run_dir", "https://example.org/run", "a folder on this machine, not a URL"),
        ("nesterov", 1, "of type bool, not 1"),
        ("schedule", "no such", "one of onecycle, cosine, plateau, constant, not 'no such'"),
    ],
)
def test_wrong_type_word_or_path_is_named_with_what_may_be(name, value, words):
    with pytest.raises(UsageError, match=f"^{name} must be {words}"):
        check(replace(config, **{name: value}))


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(UsageError, match="--nesterov false"):
        check(replace(config, nesterov=True, momentum=0.0))


def check_edited(new):
    """Check config.py with the field `epochs` edited."""
    source, edited = (ROOT / "config.py").read_text(), {"__name__": "edited_config"}
    exec(re.sub(r"epochs: int = \d+", new, source), edited)
    edited["check"](edited["config"])


def test_mistake_in_config_py_itself_is_named_and_a_field_of_your_own_is_welcome():
    check_edited("epochs: int = 30\n    note: str = ''")
    check_edited("epochs: Literal[16, 32] = 16")
    for new, words in {
        "epochs: list = 30": "declared as bool, int, float, str or Literal",
        "epochs: int = 30.0": "of type int, not 30.0",
        "epochs: Literal[16, 32] = 17": "one of 16, 32, not 17",
    }.items():
        with pytest.raises(ValueError, match=f"epochs must be {words}"):
            check_edited(new)
