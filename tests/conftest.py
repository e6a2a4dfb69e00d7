import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the tests run side by side, a process for each core

import numpy as np
import pytest
import torch

import sources
import train
from checkpoint import load_checkpoint
from sources import Source, draw_shapes

ROOT = Path(__file__).parent.parent


def few_shapes(data_dir=None):
    """Stands in for load_shapes: 150 pictures to train on, 50 to test on."""
    rng = np.random.default_rng(0)
    return Source(draw_shapes(150, rng), draw_shapes(50, rng), tuple(sources.SHAPES))


NEW = ("--dataset", "shapes", "--batch-size", "32", "--epochs", "3", "--dropout", "0.1")
NEW += ("--device", "cpu", "--precision", "float32")


def start(*argv, folder, stdout=subprocess.PIPE):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.driver", *argv],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore:This DataLoader"},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def equal(a, b):
    """Whether two nests of dicts, lists and tensors are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def outcome(run_dir):
    """Everything a run leaves, but for the settings that may differ between equal runs."""
    checkpoints = [load_checkpoint(run_dir / name) for name in ("last.pt", "best.pt")]
    for checkpoint in checkpoints:
        for setting in ("run_dir", "num_workers"):
            checkpoint["config"].pop(setting)
    return checkpoints, (run_dir / "metrics.csv").read_text()


@pytest.fixture
def s8(monkeypatch, tmp_path):
    """Run train.py's command line in an empty folder, on a few of the shapes; return its exit code."""
    monkeypatch.setattr(sources, "load_shapes", few_shapes)
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)}

    def run(*argv, report=False):
        new = not {"--evaluate", "--resume", "--predict"} & {*argv}
        flags = ("--device", "cpu") if "--predict" not in argv else ()
        if new:
            flags += ("--dataset", "shapes", "--batch-size", "32", "--num-workers", "0", "--precision", "float32")
        if not report:
            flags += ("--no-report",)  # pictures take seconds
        monkeypatch.setattr(sys, "argv", ["train.py", *flags, *argv])
        try:
            train.run()
        except SystemExit as stop:
            return stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return 0

    return run


@pytest.fixture
def refusal(capsys):
    """Return a function that gives the one line on stderr."""

    def read():
        err = capsys.readouterr().err
        assert err.startswith("train.py: ")
        assert err.count("\n") == 1
        return err

    return read


@pytest.fixture
def fail(monkeypatch):
    """Make the Nth call of a function from now on do something else."""

    def arrange(owner, name, count, failure):
        original, calls = getattr(owner, name), []

        def counted(*args, **kwargs):
            calls.append(1)
            return failure() if len(calls) == count else original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    return arrange
