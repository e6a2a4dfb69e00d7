import os
import platform

import pytest
import torch

import train
import utils
from checkpoint import load_checkpoint

CPU = torch.device("cpu")


def test_auto_precision_is_bfloat16_only_where_it_is_native(monkeypatch):
    for capabilities, precision in [
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({}, "float32"),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capabilities=capabilities: capabilities)
        assert utils.choose_precision("auto", CPU) == precision
    for capability, precision in [((8, 0), "bfloat16"), ((7, 5), "float32")]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert utils.choose_precision("auto", torch.device("cuda")) == precision
    assert utils.choose_precision("float16", torch.device("cuda")) == "float16"


def test_auto_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    cuda = torch.device("cuda")
    assert [utils.choose_workers(-1, CPU), utils.choose_workers(-1, cuda), utils.choose_workers(3, cuda)] == [1, 8, 3]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert [utils.choose_workers(-1, CPU), utils.choose_workers(-1, cuda)] == [0, 1]


def test_compile_without_a_compiler_is_refused(s8, refusal, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert s8("--compile", "true", "--run-dir", "run") == 2
    assert "there is no no-such-compiler" in refusal()
    assert list(tmp_path.iterdir()) == []


def test_compile_trains_the_network_that_is_saved(s8, monkeypatch):
    real = torch.compile  # its code generator takes half a minute: leave that out
    monkeypatch.setattr(torch, "compile", lambda net, dynamic: real(net, dynamic=dynamic, backend="aot_eager"))
    assert s8("--compile", "true", "--epochs", "1", "--run-dir", "compiled") == 0
    assert s8("--epochs", "1", "--run-dir", "plain") == 0
    compiled, plain = (load_checkpoint(f"{name}/last.pt") for name in ("compiled", "plain"))
    assert compiled["model"].keys() == plain["model"].keys()
    assert compiled["metrics"][0]["train_loss"] == pytest.approx(plain["metrics"][0]["train_loss"], rel=1e-3)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is a setting of glibc")
def test_steps_fetch_no_new_memory(s8, monkeypatch):
    resource = pytest.importorskip("resource")
    faults = []
    step = train.train_step

    def counted_step(*args):
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        return step(*args)

    monkeypatch.setattr(train, "train_step", counted_step)
    assert s8("--epochs", "3", "--batch-size", "50") == 0
    assert faults[-1] - faults[-3] < 4000  # pages; without it some 20,000


def test_deterministic_asks_torch_for_it(s8):
    try:
        assert s8("--epochs", "1", "--deterministic", "true", "--run-dir", "run") == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_bfloat16_trains(s8):
    assert s8("--epochs", "1", "--precision", "bfloat16", "--run-dir", "run") == 0
