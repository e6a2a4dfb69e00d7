"""One run in several processes, started by the real torchrun."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from extras import command_line
from extras.distributed import SharedBatchNorm2d, process_group, share_training
from extras.predict import load_network
from extras.runs import open_run
from filelock import FileLock, Timeout
from torch import distributed as dist
from torch import nn

import train
from config import Config, UsageError
from dataset import load_datasets, make_loader
from tests.conftest import ROOT, equal, flags, outcome, start
from tests.shared_steps import two_steps
from train import validate

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
# 50 images to train on, the last batch of which, of one, is left out; 100 to validate on, the last batch of which, of
# two, has none for the third process; 50 to test on.
SETTINGS = {"batch_size": 7, "valid_split": 0.7, "epochs": 3}


def start_several(count, *argv, cwd, **environment):
    """Start train.py in so many processes."""
    before = (*TORCHRUN, str(count))
    return start(*argv, "--no-report", cwd=cwd, before=before, QUICK_END="yes", PYTHONFAULTHANDLER="1", **environment)


def end(process):
    """Wait for torchrun; return whether all went well, what was printed, and the program's own lines on stderr."""
    out, err = process.communicate(timeout=200)
    print(err)  # for whoever looks into a failure
    return process.returncode == 0, out, [line for line in err.splitlines() if line.startswith("train.py: ")]


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """A folder of a run "3" in three processes that nothing disturbed; not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    well, out, ours = end(start_several(3, *flags(tiny, **SETTINGS, run_dir="3"), cwd=folder))
    assert (well, ours) == (True, [])
    assert out.count("Epoch 3/3 Summary") == out.count("Best Valid Acc") == out.count("Test Acc") == 1
    return folder


def test_several_processes_train_as_one_does(tmp_path):
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "moments")))
    command = [sys.executable, *TORCHRUN, "3", "-m", "tests.shared_steps", tmp_path]
    seen = {"QUICK_END": "yes", "PYTHONFAULTHANDLER": "1"}  # a process that aborts says where
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": paths, **seen})
    one, parts = two_steps(), [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    assert all(equal(dict(part["weights"]), dict(parts[0]["weights"])) for part in parts)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(parts[0]["weights"][name], weight, rtol=1e-6, atol=1e-8)
    for step, (loss, images) in enumerate(one["steps"]):
        losses, weights = zip(*(part["steps"][step] for part in parts), strict=True)
        assert sum(weights) == images
        assert np.average(losses, weights=weights) == pytest.approx(loss, rel=1e-6)
    # Rank 0 comes first, to download what the others find; then the first process of each other machine.
    assert (tmp_path / "order.txt").read_text() == "0 2 1 "


def test_averages_are_over_each_image_once(runs):
    net, checkpoint = load_network(runs / "3" / "last.pt")
    last = checkpoint["metrics"][-1]
    valid = validate(net, make_loader(load_datasets(Config(**checkpoint["config"])).valid, 7))
    assert (last["valid_loss"], last["valid_accuracy"]) == pytest.approx((valid["loss"], valid["accuracy"]))
    hits = 49 * last["train_accuracy"] / 100
    assert hits == pytest.approx(round(hits), abs=1e-9)


def test_run_that_loses_a_process_says_why_once_and_goes_on_as_if_it_had_not(runs, tiny, tmp_path):
    argv = flags(tiny, **SETTINGS, run_dir="run")
    well, out, ours = end(start_several(3, *argv, cwd=tmp_path, DIE_AT="replace best.pt", DIE_IN_RANK="0"))
    # It is SIGTERM where torchrun sees the death before the other processes do.
    why = "(stopped: another process of the run died .*|stopped by SIGTERM)"
    again = re.escape(f"torchrun --nproc-per-node 3 {ROOT / 'train.py'} --resume run")
    assert (well, out.count("Best Valid Acc"), len(ours)) == (False, 0, 1)
    assert re.fullmatch(f"train.py: {why}; epoch [12] is saved; to continue: {again}", ours[0])

    well, out, ours = end(start_several(3, "--resume", "run", cwd=tmp_path))
    assert (well, ours) == (True, [])
    assert "Continuing after epoch" in out
    assert "Note" not in out
    assert equal(outcome(tmp_path / "run"), outcome(runs / "3"))


def test_signal_to_torchrun_is_one_line(tiny, tmp_path):
    process = start_several(2, *flags(tiny, **SETTINGS | {"epochs": 30}, run_dir="run"), cwd=tmp_path)
    while not (tmp_path / "run" / "metrics.csv").exists():  # until an epoch is saved
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # as a cluster does
    well, _, ours = end(process)
    assert (well, len(ours)) == (False, 1)
    command = "torchrun --nproc-per-node 2"
    assert re.match(rf"train.py: stopped by SIGTERM; epoch \d+ is saved; to continue: {command} ", ours[0])


def test_mistake_on_the_command_line_is_one_line(tmp_path):
    well, out, ours = end(start_several(2, "--epoch", "3", cwd=tmp_path))
    assert (well, out, ours) == (False, "", ["train.py: error: unknown argument --epoch: did you mean --epochs?"])


def test_other_number_of_processes_is_noted(runs, tmp_path, cli, capsys):
    shutil.copytree(runs / "3", tmp_path / "run")
    assert cli("--resume", "run", "--no-report") == 0
    assert "Note: processes: 3 before, 1 now" in capsys.readouterr().out


def test_evaluation_is_the_work_of_one_process(runs, cli, capsys):
    well, out, ours = end(start_several(2, "--evaluate", "3/best.pt", cwd=runs))
    assert (well, ours) == (True, [])
    capsys.readouterr()
    assert cli("--evaluate", runs / "3" / "best.pt", "--no-report") == 0
    assert out == capsys.readouterr().out


def test_continued_run_joins_the_others_on_its_own_device(finished, cli, monkeypatch):
    devices = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(command_line, "process_group", lambda device: contextlib.nullcontext(devices.append(device)))
    monkeypatch.setattr(command_line, "of_first_process", lambda value: value)
    monkeypatch.setattr(train, "main", lambda config, **options: devices.append(config.device))
    assert cli("--resume", finished) == 0
    assert devices == ["cpu", "cpu"]  # not "auto", which config.py says


# --- one process alone, in a group of its own ---


@pytest.fixture
def alone(monkeypatch):
    """Make this process the only one that torchrun has started."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    group = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in group.items():
        monkeypatch.setenv(name, str(value))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["cuda:1", "mps"])
def test_one_device_is_not_for_several_processes(name, alone):
    with (
        pytest.raises(UsageError, match=f"device '{name}' is not for several processes: give --device"),
        process_group(name),
    ):
        pass


def test_no_process_reads_a_run_before_it_is_locked(tiny, tmp_path, monkeypatch):
    waits = []

    def wait():
        waits.append(rank)
        if rank == 0:
            with pytest.raises(Timeout):
                FileLock(tmp_path / ".lock").acquire(timeout=0)

    monkeypatch.setattr("extras.runs.wait_for_all", wait)
    for rank in (0, 1):
        with open_run(replace(tiny, run_dir=str(tmp_path)), load_datasets(tiny), rank=rank, world_size=2):
            assert waits == [0, 1][: rank + 1]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_shared_batchnorm_of_one_process_is_batchnorm(dtype, tolerance, alone):
    torch.manual_seed(0)
    x, direction = 3 + 5 * torch.randn(2, 6, 8, 5, 5)
    results = []
    with process_group("cpu"):
        for layer in (nn.BatchNorm2d(8), SharedBatchNorm2d(8)):
            inputs = x.to(dtype, copy=True).requires_grad_()
            trained = layer(inputs)
            (trained * direction).sum().backward()
            gradients = [inputs.grad, *(parameter.grad for parameter in layer.parameters())]
            results.append([trained, *gradients, *layer.buffers(), layer.eval()(x)])
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}])
def test_batchnorm_that_cannot_be_shared_is_refused(options, alone):
    with process_group("cpu"), pytest.raises(UsageError, match=r"^1 has no weights, running averages or momentum"):
        share_training(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, **options)), 8)


@pytest.mark.parametrize(
    ("device", "batch_size", "why"),
    [("meta", 8, "device meta is not for several"), ("cpu", 0, "a batch has 0 images, too few for 1 processes")],
)
def test_training_that_cannot_be_shared_is_refused(device, batch_size, why, alone):
    with process_group("cpu"), pytest.raises(UsageError, match=f"^{why}"):
        share_training(nn.Conv2d(3, 4, 1).to(device), batch_size)
