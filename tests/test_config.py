import dataclasses
import re

import pytest

from config import Config, check, config, parse_args


def refusal(argv, capsys):
    """The line on stderr with which the command line is refused."""
    with pytest.raises(SystemExit) as exit_info:
        parse_args(argv)
    assert exit_info.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_without_arguments_the_edited_instance_counts():
    assert parse_args([]).config == config


def test_every_field_is_a_flag_with_its_comment_as_help(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_args(["--help"])
    assert exit_info.value.code == 0
    help_text = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert re.search(rf"^  --{field.name.replace('_', '-')}\b", help_text, re.MULTILINE)
    assert "images per step" in help_text


def test_flags_set_fields_of_their_type():
    arguments = parse_args(["--batch-size=64", "--learning-rate", "1", "--schedule", "cosine", "--nesterov", "false"])
    expected = dataclasses.replace(config, batch_size=64, learning_rate=1.0, schedule="cosine", nesterov=False)
    assert arguments.config == expected
    assert arguments.given == {"batch_size": 64, "learning_rate": 1.0, "schedule": "cosine", "nesterov": False}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--epoch", "3"], "did you mean --epochs?"),
        (["--batch_size", "3"], "did you mean --batch-size?"),
        (["--qqqqqqq"], "see --help"),
        (["--epochs", "many"], "--epochs: invalid int value: 'many'"),
        (["--epochs"], "--epochs: expected one argument"),
        (["--dataset", "cifar11"], "cifar10"),
        (["--nesterov", "maybe"], "--nesterov"),
        (["--learning-rate", "nan"], "learning_rate must be between 1e-09 and 1000, not nan"),
        (["--momentum", "inf"], "momentum must be between 0 and 0.9999, not inf"),
        (["--momentum", "0"], "--nesterov false"),
        (["--resume", "", "--seed", "1"], "--seed cannot be given with --resume"),
        (["--resume", "x", "--nonesterov"], "--nesterov cannot be given with --resume"),
        (["--evaluate", "x", "--epochs", "1"], "--epochs cannot be given with --evaluate"),
        (["--predict"], "--predict: expected at least one argument"),
        (["--predict", "a.png", "--epochs", "1"], "--epochs cannot be given with --predict"),
        (["--predict", "a.png", "--resume", "x"], "--predict goes with --evaluate PATH only"),
        (["--predict", "a.png", "--no-report"], "--predict goes with --evaluate PATH only"),
        (["--tta"], "--tta goes with --evaluate PATH only"),
        (["--no-reports"], "did you mean --no-report?"),
    ],
)
def test_wrong_command_line_is_one_line_with_a_way_out(argv, words, capsys):
    assert words in refusal(argv, capsys)


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
    "learning_rate": (0, -1),
    "muon_learning_rate": (-1,),
    "momentum": (-0.1, 1.0),
    "weight_decay": (-1, 2),
    "muon_weight_decay": (-1, 11),
    "label_smoothing": (-0.1, 1.0),
    "dropout": (-0.1, 1.0),
    "seed": (-1, 2**63),
}


def test_every_number_has_a_range():
    numbers = {field.name for field in dataclasses.fields(Config) if field.type in (int, float)}
    assert numbers == set(OUT_OF_RANGE)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]
)
def test_number_out_of_range_is_named(name, value, capsys):
    message = refusal([f"--{name.replace('_', '-')}", str(value)], capsys)
    assert f"{name} must be between" in message
    assert str(value) in message


@pytest.mark.parametrize(("name", "value"), [("epochs", 1.5), ("epochs", True), ("seed", "0"), ("data_dir", None)])
def test_wrong_type_in_python_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be of type"):
        check(dataclasses.replace(config, **{name: value}))


def test_config_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.epochs = 3
