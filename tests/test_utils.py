import io
import os
import pickle
import re
import resource
import sys
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

import utils
from config import UsageError, config
from model import Net
from tests.conftest import equal
from utils import choose_device, choose_precision, choose_workers, load_checkpoint, resolve, save_checkpoint

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_device_is_the_accelerator_or_else_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert choose_device("auto") == CPU
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda:99"))
    with pytest.raises(UsageError, match="device 'cuda:99'"):  # it is tried, and there is none
        choose_device("auto")


def test_auto_precision_is_bfloat16_where_it_is_native(monkeypatch):
    for flags, capability, precision in (("avx512_bf16", (8, 0), "bfloat16"), ("avx2", (7, 5), "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: {flags: True}, raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, result=capability: result)
        assert [choose_precision("auto", device) for device in (CPU, CUDA)] == [precision] * 2
    assert (choose_precision("float32", CPU), choose_precision("float16", CUDA)) == ("float32", "float16")
    with pytest.raises(UsageError, match="float16 needs a CUDA device"):
        choose_precision("float16", CPU)


def test_auto_workers_are_as_many_as_the_cores_allow(monkeypatch):
    monkeypatch.setattr(utils.multiprocessing, "get_all_start_methods", lambda: ["fork"])
    for cores, processes, beside_cpu, beside_cuda in ((64, 1, 1, 8), (2, 1, 0, 1), (64, 16, 1, 3), (64, 64, 0, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: range(cores), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))  # torchrun's processes on this machine
        assert [choose_workers(-1, device) for device in (CPU, CUDA)] == [beside_cpu, beside_cuda]
    assert choose_workers(5, CPU) == 5


def test_resolved_config_has_facts_and_whole_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = replace(config, device="cpu", precision="auto", num_workers=-1, run_dir="~/runs/a")
    facts = resolve(asked)
    assert facts.run_dir == f"{tmp_path}/runs/a"
    assert (facts.precision in ("float32", "bfloat16"), facts.num_workers >= 0) == (True, True)
    new = {resolve(replace(asked, run_dir="")).run_dir for _ in range(2)}
    assert [bool(re.match(r"runs/\d{4}-\d\d-\d\d_", name)) for name in new] == [True, True]


def test_deterministic_asks_torch_for_it(monkeypatch):
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else it would be set for other tests
    for deterministic in (True, False):  # the latter last, as it is for the other tests
        utils.set_numerics(deterministic)
        assert torch.are_deterministic_algorithms_enabled() == deterministic != torch.backends.cudnn.benchmark
        assert not torch.backends.cudnn.allow_tf32  # float32 is float32, deterministic or not


def test_random_numbers_follow_from_seed_epoch_and_rank():
    numbers = []
    for key in [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1), (2**63 - 1, 1, 0), (0, 1, 0)]:
        utils.seed_torch(*key)
        numbers.append(torch.rand(1).item())
    assert (numbers[0], len(set(numbers))) == (numbers[-1], 5)


def test_bar_fits_80_columns_with_loss_and_accuracy(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr := io.StringIO())
    monkeypatch.setattr(stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    meter = utils.Meter("Epoch 100/300 - Validation", 3, CPU)
    for _, labels in utils.with_progress([(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))] * 3, meter):
        meter.update(torch.tensor(0.5), torch.eye(10)[[0, 0]].log(), labels)
    *_, bar = stderr.getvalue().split("\r")
    assert re.fullmatch(r"Epoch 100/300 - Validation: 100%\|.+\| 3/3 00:00, loss 0\.5000, acc 50\.00\n", bar)
    assert len(bar) <= 81  # the line's end included


@pytest.fixture
def checkpoint(tmp_path):
    save_checkpoint(tmp_path / "some.pt", {"model": Net(base_channels=2).state_dict(), "class_names": ["cat", "dog"]})
    return tmp_path / "some.pt"


@pytest.mark.parametrize("step", ["builtins.open", "os.fsync", "os.replace"])
def test_checkpoint_that_cannot_be_written_stays_as_it_was(checkpoint, monkeypatch, step):
    before = load_checkpoint(checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr(step, Mock(side_effect=OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left on device"):
            save_checkpoint(checkpoint, {"epoch": 4})
    with pytest.raises(pickle.UnpicklingError):  # nothing but tensors and plain values could be read again
        save_checkpoint(checkpoint, {"folder": checkpoint.parent})
    assert equal(load_checkpoint(checkpoint), before)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_disk_that_fills_up_is_told_in_the_systems_words(checkpoint):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # bytes in a file
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(checkpoint, {"weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_missing_end_is_found_and_a_flipped_bit_is_found_or_changes_nothing(checkpoint):
    with pytest.raises(UsageError, match="is not there, or not a file"):
        load_checkpoint("missing.pt")
    whole, content, found = checkpoint.read_bytes(), load_checkpoint(checkpoint), 0
    for size in (0, 10, 1000, len(whole) - 1):
        checkpoint.write_bytes(whole[:size])
        with pytest.raises(UsageError, match=r"^checkpoint .+some\.pt is damaged"):
            load_checkpoint(checkpoint)
    for position in range(0, len(whole), len(whole) // 100):
        checkpoint.write_bytes(whole[:position] + bytes([whole[position] ^ 8]) + whole[position + 1 :])
        try:
            assert equal(load_checkpoint(checkpoint), content)
        except UsageError:
            found += 1
    assert found > 50


@pytest.mark.parametrize("content", [[1], {"format": "s8erav3-2"}], ids=["list", "older"])
def test_other_format_is_refused_in_one_line(tmp_path, content):
    torch.save(content, tmp_path / "older.pt")
    with pytest.raises(UsageError, match=r"^checkpoint .+older\.pt is not of format s8erav3-3.*$"):
        load_checkpoint(tmp_path / "older.pt")


def test_code_in_a_checkpoint_never_runs(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "marker"),)

    torch.save({"format": "s8erav3-3", "model": Malicious()}, tmp_path / "bad.pt")
    with pytest.raises(UsageError, match=r"bad\.pt is damaged, or not one of this program"):
        load_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "marker").exists()
