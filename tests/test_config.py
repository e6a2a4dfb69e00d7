from dataclasses import make_dataclass, replace
from typing import Literal

import numpy as np
import pytest

from config import Config, UsageError, check, config

INF, NAN = float("inf"), float("nan")
LIMITS = {  # of each number: what is allowed, what is not
    "batch_size epochs": ([1, 65536], [0]),
    "learning_rate": ([1e-6, 1, 10], [0, INF, NAN]),
    "rotate_limit weight_decay sgd_weight_decay": ([0, 180], [-1, INF, NAN]),
    "valid_split scale_limit momentum dropout": ([0, 0.9], [-0.1, 1.0, NAN]),
    "flip_probability shift_scale_rotate_probability": ([0, 1], [-0.1, 1.1, NAN]),
    "coarse_dropout_probability shift_limit label_smoothing": ([0, 1], [-0.1, 1.1, NAN]),
    "hole_size": ([1, 32], [0, 33]),
    "image_size": ([32], [8]),
    "num_workers": ([-1, 0, 256], [-2]),
    "seed train_images": ([0, 2**63 - 1], [-1]),
}


@pytest.mark.parametrize("names", LIMITS)
def test_number_out_of_range_is_named_with_its_value(names):
    allowed, refused = LIMITS[names]
    for name in names.split():
        for value in allowed:
            check(replace(config, nesterov=False, **{name: value}))
        for value in refused:
            with pytest.raises(UsageError, match=f"^{name} must be .+, not {value}$"):
                check(replace(config, **{name: value}))


def test_wrong_type_word_or_path_is_named_with_what_may_be():
    for name, value, words in (
        ("epochs", 1.5, "of type int, not 1.5"),
        ("epochs", True, "of type int, not True"),
        ("seed", np.int64(0), "of type int, not "),
        ("run_dir", "https://example.org/run", "a path on this machine, not a URL"),
        ("schedule", "no such", "one of onecycle, cosine, plateau, constant, not 'no such'"),
    ):
        with pytest.raises(UsageError, match=f"^{name} must be {words}"):
            check(replace(config, **{name: value}))


def test_field_of_your_own_is_welcome_if_it_can_be_a_flag():
    def check_field(kind, default):
        check(make_dataclass("Edited", [("gadget", kind, default)], bases=(Config,), frozen=True)())

    check_field(Literal[16, 32], 32)
    check_field(str, "")
    for kind, default, words in ((list, None, "declared as bool, "), (Literal[16, 32], 17, "one of 16, 32, not 17")):
        with pytest.raises(UsageError, match=f"gadget must be {words}"):
            check_field(kind, default)
