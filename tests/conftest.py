"""Helpers of all tests: small images, one finished run, the command line in this process and in one of its own."""

import functools
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the tests run side by side, a process for each core

import numpy as np
import pytest
import torch
from PIL import Image

import train
from config import Config, config
from model import Net
from parts import command_line
from parts.images import SHAPES, draw_shapes
from tools.report import report
from utils import load_checkpoint

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder of shapes as `--dataset folder` reads them, not to be changed: 150 to train on, 50 to test on."""
    folder, rng, names = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), list(SHAPES)
    for part, count in (("train", 150), ("test", 50)):
        for number, (image, label) in enumerate(zip(*draw_shapes(count, rng), strict=True)):
            (folder / part / names[label]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / part / names[label] / f"{number:03}.png")
    return folder


@pytest.fixture(scope="session")
def tiny(pictures) -> Config:
    """Settings of a run of two epochs that takes a second or two: replace(tiny, run_dir=..., ...)."""
    small = {"dataset": "folder", "data_dir": str(pictures), "batch_size": 32, "epochs": 2, "dropout": 0.1}
    small |= {"activation": "silu", "num_workers": 0, "device": "cpu", "precision": "float32"}
    rates = {"optimizer": "muon", "learning_rate": 0.02, "weight_decay": 0.05, "sgd_weight_decay": 5e-4}
    rates |= {"momentum": 0.9, "nesterov": True, "schedule": "onecycle", "label_smoothing": 0.1}
    return replace(config, **small, **rates)  # whatever config.py says by now


def flags(config: Config, **changes) -> list[str]:
    """Return the command line that gives these settings."""
    changed = asdict(replace(config, **changes)).items() - asdict(Config()).items()
    return [f"--{name.replace('_', '-')}={value}" for name, value in sorted(changed)]


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory) -> Path:
    """The folder of a finished run with its report, made once; not to be changed: use `copy_of_finished` for that."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train.main(replace(tiny, run_dir=str(folder)))
    report(folder)
    return folder


@pytest.fixture
def copy_of_finished(finished, tmp_path) -> Path:
    """A copy of the finished run, for a test that changes it."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def cli(monkeypatch, tmp_path):
    """Return a function that does what `python train.py ARGUMENTS` does, here in an empty folder: its exit code."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (*command_line.STOPS, signal.SIGCHLD)}

    def run(*argv: object) -> int:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
        try:
            command_line.run(train.main, report)
        except SystemExit as stop:
            return stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return 0

    return run


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def narrow(monkeypatch):
    """Let runs in this process train a network of an eighth of the width, in a third of the time."""
    monkeypatch.setattr(train, "Net", functools.partial(Net, base_channels=2))


@pytest.fixture
def before(monkeypatch):
    """Return a function that arranges for an action, in this process, before the nth time that a file is replaced."""

    def arrange(name, action, nth=1):
        replace, times = os.replace, itertools.count(1)

        def watched(source, target):
            if Path(target).name == name and next(times) == nth:
                action()
            return replace(source, target)

        monkeypatch.setattr(os, "replace", watched)

    return arrange


@pytest.fixture
def refusal(capsys):
    """Return a function that gives the one line on stderr."""
    lines = re.compile(r"train.py: .+\n")
    return lambda: lines.fullmatch(capsys.readouterr().err)[0]


def start(*argv: object, cwd: Path, before: tuple = (), program=ROOT / "train.py", **environment) -> subprocess.Popen:
    """Start `python train.py ARGUMENTS` itself, in a process group of its own; `before` comes after python.

    DIE_AT="write last.pt 2" kills it while that file is written for the second time: see moments/.
    """
    command = [sys.executable, *before, program, *map(str, argv)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'moments'}", **environment}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored, if the tests run behind &
    return subprocess.Popen(command, cwd=cwd, env=environment, **options)


def equal(a, b) -> bool:
    """Whether two nests of dicts, lists and tensors are the same, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def outcome(run_dir: Path) -> list[dict]:
    """Everything a run leaves that counts: not its times, not the settings that may differ between equal runs."""
    checkpoints = [load_checkpoint(Path(run_dir, name)) for name in ("last.pt", "best.pt")]
    for checkpoint in checkpoints:
        checkpoint["config"].pop("num_workers")
        checkpoint.pop("made_by")
        for row in checkpoint["metrics"]:
            del row["seconds"], row["images_per_second"]
    return checkpoints
