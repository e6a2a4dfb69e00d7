"""The command line: what it sets, what it refuses, and how a program ends that does not end well."""

import builtins
import io
import json
import os
import re
import signal
import sys
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import Mock

import albumentations as A
import pytest

import dataset
import train
from config import Config, config
from parts import command_line
from parts.transforms import RepeatableCompose
from tests.conftest import flags


@pytest.fixture
def settings(cli, monkeypatch):
    """Return a function that gives the Config which `python train.py ARGUMENTS` trains by."""

    def read(*argv):
        monkeypatch.setattr(train, "main", Mock())
        assert cli(*argv, "--no-report") == 0
        (config, *_), _ = train.main.call_args
        return config

    return read


def test_every_field_is_a_flag_with_its_comment_as_help(cli, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli("--help") == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^  --{field.name.replace('_', '-')}\b", text, re.MULTILINE) for field in fields(Config))
    assert f"images per step (default: {config.batch_size})" in text


def test_flag_goes_before_the_file_of_another_run_and_that_before_config_py(settings, finished, tiny, monkeypatch):
    monkeypatch.setattr(command_line, "config", replace(config, epochs=7, batch_size=7, run_dir="mine"))
    its = json.loads((finished / "config.json").read_text()) | {"run_dir": "its"}
    Path("its.json").write_text(json.dumps({name: value for name, value in its.items() if name != "epochs"}))
    found = settings("--config", "its.json", "--seed=9", "--schedule", "cosine", "--nesterov", "false", "--compile")
    assert found == replace(tiny, epochs=7, seed=9, schedule="cosine", nesterov=False, compile=True, run_dir="its")


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("--epoch 3", "--epoch"),
        ("--epochs many", "'many'"),
        ("--nesterov maybe", "invalid boolean value: 'maybe'"),
        ("--resume x --config y", "not allowed with"),
        ("--resume nowhere", "nowhere/last.pt is not there"),
        ("--resume x --run-dir y", "leave out --run-dir"),
        ("--config settings.json", "epocs"),
        ("--momentum 0", "--nesterov false"),
        ("--image-size 64", "--dataset folder"),
        ("--dataset shapes --valid-split 0.001", "change valid_split"),
    ],
)
def test_mistake_is_told_in_one_line_and_nothing_is_written(cli, capsys, tmp_path, line, word):
    Path("settings.json").write_text('{"epochs": 3, "epocs": 3}')
    assert cli(*line.split()) == 2
    assert re.search(f"^train.py: error: .*{re.escape(word)}", capsys.readouterr().err, re.MULTILINE)
    assert os.listdir(tmp_path) == ["settings.json"]


@pytest.mark.parametrize("workers", [0, 1])
def test_augmentation_that_does_not_keep_the_image_is_one_line(cli, tiny, narrow, monkeypatch, refusal, workers):
    monkeypatch.setattr(dataset, "make_augmentation", lambda *_: RepeatableCompose([A.ToFloat(p=1)]))
    assert cli(*flags(tiny, num_workers=workers)) == 2
    assert refusal().startswith("train.py: error: augmentation must keep (32, 32, 3) uint8, not make (32, 32, 3) float")


def test_run_in_a_notebooks_own_process_is_refused(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    assert "!python train.py" in cli()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("end", "code", "told"),
    [
        (lambda: signal.raise_signal(signal.SIGTERM), 143, "stopped by SIGTERM"),
        (Mock(side_effect=OSError(28, "No space left on device")), 1, "stopped: [Errno 28] No space left on device"),
        (Mock(side_effect=KeyError("no such key")), 1, "stopped by KeyError"),
    ],
)
def test_end_before_time_is_told_with_the_command_that_continues(cli, tiny, narrow, before, capfd, end, code, told):
    before("last.pt", end, nth=3)  # of epoch 2, after that of epoch 0
    assert cli(*flags(tiny, run_dir="run")) == code
    *trace, last = capfd.readouterr().err.strip().splitlines()
    assert last == f"train.py: {told}; epoch 1 of 2 is saved in run; to continue: python train.py --resume run"
    assert trace[:1] == (["Traceback (most recent call last):"] if told == "stopped by KeyError" else [])
    assert not list(Path("run").glob("*.tmp"))
    assert cli("--resume", "run", "--no-report") == 0


def test_nohup_keeps_a_run_alive(cli, tiny, narrow, before):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before("last.pt", lambda: signal.raise_signal(signal.SIGHUP), nth=2)
    assert cli(*flags(tiny, run_dir="run"), "--no-report") == 0


def test_loss_that_is_not_finite_is_one_line_without_a_command_that_would_meet_it_again(cli, tiny, narrow, refusal):
    assert cli(*flags(tiny, run_dir="run", learning_rate=1e30)) == 1
    told = r"Epoch 1/2 - Training: the loss is \S+ at step \d; a new run needs a lower --learning-rate"
    assert re.fullmatch(rf"train.py: stopped: {told}; epoch 0 of 2 is saved in run\n", refusal())


def test_report_that_fails_is_one_line_and_the_run_is_finished(cli, tiny, narrow, monkeypatch, refusal):
    monkeypatch.setattr("tests.conftest.report", Mock(side_effect=ImportError("there is no matplotlib")))
    assert cli(*flags(tiny, run_dir="run")) == 0
    assert "there is no matplotlib" in refusal()


def test_name_that_the_terminal_cannot_show_ends_nothing(cli, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(train, "main", lambda *_, **__: print("Käse", flush=True))
    assert cli("--no-report") == 0
    assert output.buffer.getvalue() == b"K\\xe4se\n"
