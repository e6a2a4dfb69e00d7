import hashlib
import io
import multiprocessing
import os
import pickle
import re
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from config import UsageError, config
from model import Net
from tests.conftest import equal
from utils import (
    Meter,
    choose_device,
    choose_precision,
    choose_workers,
    load_checkpoint,
    resolve,
    save_checkpoint,
    seed_torch,
    set_numerics,
    with_progress,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# --- what a config leaves open ---


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


def test_float16_off_cuda_is_refused():
    with pytest.raises(UsageError, match="float16 needs a CUDA device"):
        choose_precision("float16", CPU)


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


def test_resolved_config_has_facts_and_whole_paths_and_keeps_the_rest(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = replace(config, device="cpu", precision="auto", num_workers=-1, data_dir="~/data", run_dir="~/runs/a")
    facts = resolve(asked)
    assert (facts.data_dir, facts.run_dir) == (f"{tmp_path}/data", f"{tmp_path}/runs/a")
    assert facts.precision in ("float32", "bfloat16")
    assert facts.num_workers >= 0
    open_fields = ("device", "precision", "num_workers", "data_dir", "run_dir")
    assert replace(facts, **{name: getattr(asked, name) for name in open_fields}) == asked


def test_runs_without_a_folder_get_new_dated_ones():
    first, second = (resolve(replace(config, device="cpu", run_dir="")).run_dir for _ in range(2))
    assert re.match(r"runs/\d{4}-\d\d-\d\d_", first)
    assert first != second


# --- numerics, seeds, progress ---


def test_deterministic_asks_torch_for_it(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    for deterministic in (True, False):  # the latter last, as it is for the other tests
        set_numerics(deterministic)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.backends.cudnn.benchmark != deterministic
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"  # float32 is float32, deterministic or not
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_random_numbers_follow_from_seed_epoch_and_rank():
    numbers = []
    for key in [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1), (2**63 - 1, 1, 0), (0, 1, 0)]:
        seed_torch(*key)
        numbers.append(torch.rand(1).item())
    assert numbers[0] == numbers[-1]
    assert len(set(numbers)) == 5


def measured(losses, batches):
    """A meter that has seen the batches; of each two images one is right."""
    meter = Meter("Epoch 1/30 - Validation", len(batches), CPU)
    for loss, (_, labels) in zip(losses, with_progress(batches, meter), strict=True):
        meter.update(torch.tensor(loss), torch.eye(10)[[0] * len(labels)], labels)
    return meter


def test_averages_are_over_images_and_come_with_the_speed():
    batches = [(torch.zeros(count, 3, 4, 4), torch.arange(count) % 2) for count in (6, 2)]
    average = measured([1.0, 2.0], batches).average()
    assert (average["loss"], average["accuracy"]) == (1.25, 50)
    assert average["images_per_second"] == pytest.approx(8 / average["seconds"])


def test_loss_that_is_not_finite_is_told_with_its_step():
    with pytest.raises(FloatingPointError, match="loss is nan at step 2; .+--learning-rate"):
        measured([1.0, float("nan"), 1.0], [(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))] * 3).average()


def test_bar_has_the_specifications_form(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    measured([0.5] * 3, [(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))] * 3)
    bar = r"Epoch 1/30 - Validation: 100%\|.+\| 3/3 \[\d\d:\d\d<00:00, .+it/s, accuracy=50\.000, loss=0\.5000\]\n"
    assert re.fullmatch(bar, stderr.getvalue().split("\r")[-1])


# --- checkpoints ---


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "some.pt"
    save_checkpoint(path, {"model": Net(base_channels=2).state_dict(), "class_names": ["cat", "dog"], "epoch": 3})
    return path


def test_checkpoint_comes_back_and_torch_reads_it_too(checkpoint):
    content = load_checkpoint(str(checkpoint))
    assert (content["class_names"], content["epoch"]) == (["cat", "dog"], 3)
    assert equal(content, torch.load(checkpoint, weights_only=True))
    Net(base_channels=2).load_state_dict(content["model"])


@pytest.mark.parametrize("step", ["builtins.open", "torch.save", "os.fsync", "os.replace"])
def test_checkpoint_that_cannot_be_written_stays_as_it_was(checkpoint, monkeypatch, step):
    before = load_checkpoint(checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr(step, Mock(side_effect=OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left on device"):
            save_checkpoint(checkpoint, {"epoch": 4})
    assert equal(load_checkpoint(checkpoint), before)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_missing_end_is_found_and_a_flipped_bit_is_found_or_changes_nothing(checkpoint):
    whole, content, found = checkpoint.read_bytes(), load_checkpoint(checkpoint), 0
    for size in (0, 10, 1000, len(whole) - 1):
        checkpoint.write_bytes(whole[:size])
        with pytest.raises(UsageError, match=r"^checkpoint .+some\.pt is damaged"):
            load_checkpoint(checkpoint)
    for position in range(0, len(whole), len(whole) // 300):
        checkpoint.write_bytes(whole[:position] + bytes([whole[position] ^ 8]) + whole[position + 1 :])
        try:
            assert equal(load_checkpoint(checkpoint), content)
        except UsageError:
            found += 1
    assert found > 100


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for ever
    for name in ("pipe", "missing.pt", "."):
        with pytest.raises(UsageError, match="is not there, or not a file"):
            load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("content", [[1], {"model": {}}, {"format": "s8erav3-2"}], ids=["list", "other", "older"])
def test_other_format_is_refused_in_one_line(tmp_path, content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    sealed = buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()  # as the format before had it
    for data in (buffer.getvalue(), sealed):
        (tmp_path / "older.pt").write_bytes(data)
        with pytest.raises(UsageError, match=r"^checkpoint .+older\.pt is not of format s8erav3-3.*$"):
            load_checkpoint(tmp_path / "older.pt")


@pytest.mark.parametrize("write", [torch.save, lambda content, path: Path(path).write_bytes(pickle.dumps(content))])
def test_code_in_a_checkpoint_never_runs(tmp_path, write):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "marker"),)

    write({"format": "s8erav3-3", "model": Malicious()}, tmp_path / "bad.pt")
    with pytest.raises(UsageError, match=r"bad\.pt is damaged, or holds more than tensors and plain values"):
        load_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "marker").exists()
