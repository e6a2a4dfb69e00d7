import errno
import os
import signal
from pathlib import Path

import pytest
import torch

import train
from checkpoint import WriteError, load_checkpoint, write_atomically
from tests.conftest import NEW, start


def throw(error):
    raise error


FIRST = "epoch 1 is saved; to continue: python train.py --resume run"


def test_full_disk(s8, fail, refusal):
    # config.json and the three files of the first epoch, each with its folder; then last.pt of the second
    fail(os, "fsync", 9, lambda: throw(OSError(errno.ENOSPC, "No space left on device")))
    assert s8("--epochs", "3", "--run-dir", "run") == 1
    message = refusal()
    assert "run/last.pt cannot be written (No space left on device)" in message
    assert FIRST in message
    assert load_checkpoint("run/last.pt")["epoch"] == 1
    assert not [path for path in Path("run").iterdir() if path.suffix == ".tmp"]
    assert s8("--resume", "run") == 0


def test_disk_that_became_read_only(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(WriteError, match="page cannot be written"):
        write_atomically(tmp_path / "page", b"")


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize(
    ("words", "open_output"),
    [
        ("nobody reads the output any more", closed_pipe),
        pytest.param(
            "the output cannot be written, there is no space left",
            lambda: os.open("/dev/full", os.O_WRONLY),
            marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full"),
        ),
    ],
)
def test_output_that_cannot_be_written(tmp_path, words, open_output):
    output = open_output()
    _, err = start(*NEW, "--run-dir", "run", folder=tmp_path, stdout=output).communicate(timeout=120)
    os.close(output)
    assert err == f"train.py: stopped: {words}; nothing was written\n"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory(s8, fail, refusal, error):
    fail(train, "train_step", 7, lambda: throw(error))
    assert s8("--epochs", "3", "--run-dir", "run") == 1
    message = refusal()
    assert "smaller --batch-size" in message
    assert "epoch 1 is saved" in message


def test_worker_killed(tmp_path):
    argv = (*NEW, "--run-dir", "run", "--num-workers", "2")
    _, err = start("--kill-at", "9", "worker", *argv, folder=tmp_path).communicate(timeout=120)
    assert err.startswith("train.py: stopped: a process that augments images died (")
    assert err.endswith("; epoch 1 is saved; to continue: python train.py --resume run\n")
    assert err.count("\n") == 1


def test_signal_before_anything_is_written(s8, fail, refusal, tmp_path):
    fail(train, "load_data", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert s8("--run-dir", "run") == 143
    assert refusal() == "train.py: stopped by SIGTERM; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_loss_that_is_not_finite_keeps_what_was_saved(s8, fail, refusal):
    bad = torch.tensor(float("nan"), requires_grad=True)
    fail(train, "train_step", 8, lambda: (bad, torch.zeros(32, 10)))
    assert s8("--epochs", "3", "--run-dir", "run") == 1
    message = refusal()
    assert "Epoch 2/3 - Training: the loss is nan at step 3" in message
    assert message.endswith("epoch 1 is saved\n")  # continuing would come to the same loss
    assert load_checkpoint("run/last.pt")["epoch"] == 1


def test_mistake_of_ours_is_a_traceback(s8, fail):
    fail(train, "train_step", 1, lambda: throw(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError):
        s8("--epochs", "1", "--run-dir", "run")
