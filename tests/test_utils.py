import hashlib
import io
import multiprocessing
import os
import pickle
import re
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from extras.failures import RunStopped

from config import UsageError
from model import Net
from tests.conftest import equal
from utils import (
    Meter,
    choose_device,
    choose_precision,
    choose_workers,
    load_checkpoint,
    numerics,
    save_checkpoint,
    seed_torch,
    with_progress,
    write_atomically,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# --- device, precision, workers, seeds ---


def test_auto_device_is_the_accelerator_or_else_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert choose_device("auto") == CPU
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda:99"))
    with pytest.raises(UsageError, match="device 'cuda:99'"):  # it is tried, and there is none
        choose_device("auto")


@pytest.mark.parametrize(
    ("device", "capabilities", "precision"),
    [
        (CPU, {"avx512_bf16": True}, "bfloat16"),
        (CPU, {"amx_bf16": True}, "bfloat16"),
        (CPU, {"avx2": True}, "float32"),
        (CUDA, (8, 0), "bfloat16"),
        (CUDA, (7, 5), "float32"),
    ],
)
def test_auto_precision_is_bfloat16_where_it_is_native(monkeypatch, device, capabilities, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities)
    assert choose_precision("auto", device) == precision
    assert (choose_precision("float32", CPU), choose_precision("float16", CUDA)) == ("float32", "float16")


@pytest.mark.parametrize(
    ("cores", "processes", "beside_cpu", "beside_cuda"), [(64, 1, 1, 8), (2, 1, 0, 1), (64, 16, 1, 3), (64, 64, 0, 1)]
)
def test_auto_workers_are_as_many_as_the_cores_allow(monkeypatch, cores, processes, beside_cpu, beside_cuda):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))  # torchrun's processes on this machine
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["fork", "spawn"])  # as on Linux
    assert (choose_workers(-1, CPU), choose_workers(-1, CUDA)) == (beside_cpu, beside_cuda)
    assert choose_workers(3, CPU) == 3
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])  # as on Windows
    assert choose_workers(-1, CUDA) == min(beside_cuda, 2)


def test_deterministic_asks_torch_for_it(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    matmul_before = torch.backends.cuda.matmul.fp32_precision
    torch.set_deterministic_debug_mode("warn")  # as a notebook may have it
    for deterministic in (True, False):
        with numerics(deterministic):
            assert torch.are_deterministic_algorithms_enabled() == deterministic
            assert torch.backends.cudnn.benchmark != deterministic
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"  # float32 is float32, deterministic or not
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == matmul_before
    assert torch.get_deterministic_debug_mode() == 1  # warn
    torch.set_deterministic_debug_mode("default")
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"


def test_random_numbers_follow_from_seed_epoch_and_rank():
    numbers = []
    for key in [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1), (2**63 - 1, 1, 0), (0, 1, 0)]:
        seed_torch(*key)
        numbers.append(torch.rand(1).item())
    assert numbers[0] == numbers[-1]
    assert len(set(numbers)) == 5


def test_bar_has_the_specifications_form(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    meter = Meter("Epoch 1/30 - Validation", 3, CPU)
    for _, labels in with_progress([(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))] * 3, meter):
        meter.update(torch.tensor(0.5), torch.eye(10)[[0, 0]], labels)
    bar = r"Epoch 1/30 - Validation: 100%\|.+\| 3/3 \[\d\d:\d\d<00:00, .+it/s, accuracy=50\.000, loss=0\.5000\]\n"
    assert re.fullmatch(bar, stderr.getvalue().split("\r")[-1])


# --- files ---


@pytest.mark.parametrize("step", ["builtins.open", "os.fsync", "os.replace"])
def test_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch, step):
    path = tmp_path / "page"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(step, Mock(side_effect=OSError(28, "No space left on device")))
        with pytest.raises(RunStopped, match=r"page cannot be written \(No space left on device\)"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_disk_that_became_read_only_is_told_in_one_line(tmp_path, monkeypatch):
    refuse = Mock(side_effect=OSError(30, "Read-only file system"))
    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)  # the temporary cannot be removed either
    with pytest.raises(RunStopped, match=r"page cannot be written \(Read-only file system\)"):
        write_atomically(tmp_path / "page", b"")


# --- checkpoints ---


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "some.pt"
    save_checkpoint(path, {"model": Net(base_channels=2).state_dict(), "class_names": ["cat", "dog"], "epoch": 3})
    return path


def test_checkpoint_comes_back_and_torch_reads_it_too(checkpoint):
    content = load_checkpoint(checkpoint)
    assert (content["class_names"], content["epoch"]) == (["cat", "dog"], 3)
    assert equal(content, torch.load(checkpoint, weights_only=True))
    Net(base_channels=2).load_state_dict(content["model"])


def test_flipped_bit_anywhere_and_missing_end_are_found(checkpoint):
    whole = checkpoint.read_bytes()
    damaged = [whole[:size] for size in (0, 10, 1000, -1)]
    for position in [*range(0, len(whole), len(whole) // 97), len(whole) - 1]:
        damaged.append(whole[:position] + bytes([whole[position] ^ 8]) + whole[position + 1 :])
    for content in damaged:
        checkpoint.write_bytes(content)
        with pytest.raises(UsageError, match=r"^checkpoint .+some\.pt is damaged"):
            load_checkpoint(checkpoint)


def seal(path, content):
    """Write a file with the right SHA-256 at its end, as anybody can."""
    path.write_bytes(content + hashlib.sha256(content).digest())


def test_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match=r"^checkpoint .+pipe is damaged"):
        load_checkpoint(tmp_path / "pipe")


@pytest.mark.parametrize("content", [[1], {"format": "s8erav3-0"}], ids=["list", "other"])
def test_other_format_is_refused(tmp_path, content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    seal(tmp_path / "older.pt", buffer.getvalue())
    with pytest.raises(UsageError, match=r"older\.pt is not of format s8erav3-\d+: another version"):
        load_checkpoint(tmp_path / "older.pt")


@pytest.mark.parametrize("sealed", [False, True], ids=["plain", "with its SHA-256"])
@pytest.mark.parametrize("zipped", [False, True], ids=["pickle", "zip"])
def test_malicious_checkpoint_never_runs(tmp_path, sealed, zipped):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "marker"),)

    buffer = io.BytesIO()
    torch.save(Malicious(), buffer) if zipped else buffer.write(pickle.dumps(Malicious()))
    write = seal if sealed else Path.write_bytes
    write(tmp_path / "bad.pt", buffer.getvalue())
    with pytest.raises(UsageError, match=r"bad\.pt " + ("holds more than tensors" if sealed else "is damaged")):
        load_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "marker").exists()
