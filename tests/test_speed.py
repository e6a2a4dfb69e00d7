import functools
import platform
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from extras.speed import faster_step, keep_freed_memory

from config import UsageError, config
from model import Net
from tests.conftest import ROOT, flags
from train import train_step
from utils import load_checkpoint


def test_compiled_network_keeps_names_and_numbers(cli, tiny, narrow, monkeypatch):
    # Without the code generator, which takes half a minute.
    compiler = Mock(side_effect=functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch, "compile", compiler)
    for name, flag in (("compiled", "true"), ("plain", "false")):
        argv = flags(tiny, epochs=1, batch_size=50, run_dir=name)
        assert cli(*argv, "--compile", flag, "--no-report") == 0
    compiler.assert_called_once()
    ours, plain = (load_checkpoint(f"{name}/last.pt") for name in ("compiled", "plain"))
    assert ours["model"].keys() == plain["model"].keys()
    assert ours["network"] == plain["network"]
    assert ours["metrics"][0] == pytest.approx(plain["metrics"][0], rel=1e-3)


def test_no_compiler_is_told_before_anything_is_written(cli, tiny, refusal, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cli(*flags(tiny, compile=True, run_dir="run")) == 2
    assert "compile needs a compiler, and there is no no-such-compiler: install it, or give --compile" in refusal()
    assert list(tmp_path.iterdir()) == []


def test_compile_is_not_for_several_processes():
    with pytest.raises(UsageError, match="compile is not for several processes: give --compile false"):
        faster_step(train_step, Net(), config, world_size=2)


KEPT = """
import resource, torch
from extras.speed import keep_freed_memory

keep_freed_memory()
faults = []
for _ in range(20):
    torch.ones(2**24)  # 64 MiB, of which Linux gives a page at its first use
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[9])  # by then the heap has grown to have room for it
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is a setting of glibc")
def test_freed_memory_is_kept_for_the_next_step():
    # In a process of its own: where an allocation has failed before, glibc takes memory from elsewhere.
    result = subprocess.run([sys.executable, "-c", KEPT], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 100  # without it 16,384 each time, or 32 if pages are huge


def test_another_c_library_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("there is no such setting"))
    keep_freed_memory()
