import errno
import functools
import io
import math
import multiprocessing
import os
import re
import signal
import sys
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from extras import command_line
from extras.command_line import parse_args
from torch import distributed as dist

import train
from config import Config, UsageError, config
from model import Net
from tests.conftest import flags, start
from utils import load_checkpoint

# --- reading the command line ---


def test_without_arguments_the_edited_instance_counts(monkeypatch):
    edited = replace(config, epochs=7)
    monkeypatch.setattr(command_line, "config", edited)
    assert parse_args([]).config == edited


def test_every_field_is_a_flag_with_its_comment_as_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in fields(Config):
        assert re.search(rf"^  --{field.name.replace('_', '-')}\b", text, re.MULTILINE)
    assert f"images per step (default: {config.batch_size})" in text
    assert f"SGD looks ahead by one momentum step (default: {config.nesterov})" in text


def test_comment_may_hold_any_character(capsys, monkeypatch):
    monkeypatch.setattr(command_line.inspect, "getsource", lambda _: "    epochs: int = 1 # 50 %(d) of {all} [x]\n")
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    assert stop.value.code == 0
    assert f"50 %(d) of {{all}} [x] (default: {config.epochs})" in capsys.readouterr().out


def test_flags_set_fields_of_their_type():
    arguments = parse_args(["--batch-size=64", "--learning-rate", "1", "--schedule", "cosine", "--nesterov", "false"])
    given = {"batch_size": 64, "learning_rate": 1.0, "schedule": "cosine", "nesterov": False}
    assert arguments.config == replace(config, **given)
    assert arguments.given == given
    assert arguments.report


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--epoch 3", "unknown argument --epoch: did you mean --epochs?"),
        ("--batch_size 3", "did you mean --batch-size?"),
        ("--lr=3", "unknown argument --lr: did you mean --learning-rate?"),
        ("--qqqqqqq", "unknown argument --qqqqqqq: see --help"),
        ("--epochs many", "--epochs: invalid int value: 'many'"),
        ("--dataset cifar11", "cifar10"),
        ("--nesterov maybe", "--nesterov: true or false, not 'maybe'"),
        ("--resume x --evaluate y", "not allowed with"),
        ("--resume x --seed 1", "--seed cannot be given with --resume"),
        ("--evaluate x --epochs 1", "--epochs cannot be given with --evaluate"),
        ("--predict a.png --epochs 1", "--epochs cannot be given with --predict"),
        ("--predict a.png --resume x", "--predict goes with --evaluate PATH only"),
        ("--predict a.png --no-report", "--predict goes with --evaluate PATH only"),
        ("--tta", "--tta goes with --evaluate PATH only"),
        ("--learning-rate nan", "learning_rate must be between 1e-09 and 1000, not nan"),
        ("--momentum 0", "give --nesterov false too"),
        ("--device cud", "device 'cud' cannot be used here"),
        ("--device cuda:99", "device 'cuda:99' cannot be used here"),
        ("--device hpu", "device 'hpu' cannot be used here"),
        ("--device meta", "cannot be used here (Cannot copy out of meta tensor; no data!): name another with --device"),
        ("--device cpu --precision float16", "float16 needs a CUDA device, not cpu: name another with --precision"),
        ("--dataset shapes --valid-split 0.001", "valid_split 0.001 leaves a class of 120 images with none on one"),
        ("--evaluate nowhere.pt", "checkpoint nowhere.pt cannot be read (No such file or directory)"),
        ("--predict nowhere.png", "nowhere.png cannot be read as an image (No such file or directory)"),
        ("--resume nowhere", "nowhere holds no run"),
        ("--dataset shapes --run-dir /dev/null/run", "run_dir /dev/null/run cannot be written (Not a directory)"),
    ],
)
def test_wrong_command_line_is_one_line_with_a_way_out(cli, refusal, tmp_path, line, words):
    assert cli(*line.split()) == 2
    message = refusal()
    assert message.startswith("train.py: error: ")
    assert words in message
    assert os.listdir(tmp_path) == []


def test_wrong_default_in_config_py_is_one_line(cli, refusal, monkeypatch):
    monkeypatch.setattr(command_line, "config", replace(config, epochs=0))
    assert cli() == 2
    assert refusal().startswith("train.py: error: config.py: epochs must be between 1")


# --- an end before time, of a training of the test's own ---


GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"
BUS = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ..."


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nto"), "out of memory; a new run needs a smaller --batch-s"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "out of memory; a new run"),
        (MemoryError(), "out of memory; a new run"),
        (RuntimeError("unable to open shared memory object </torch_1> in read-write mode"), "--shm-size"),
        (RuntimeError(BUS), "no shared memory"),
        (RuntimeError("unable to mmap 7372800 bytes from file </torch_1>: Cannot allocate memory"), "no shared memory"),
        (OSError(errno.EMFILE, "Too many open files"), "too many open files: raise the limit"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "no process is left"),
        (RuntimeError("DataLoader worker (pid 7) exited unexpectedly with exit code 75."), "no shared memory"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "a process that augments images died"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "a process that augments images died"),
        (EOFError(), "a process that augments images died (its batch broke off)"),
        (OSError(errno.ENOSPC, "No space left on device"), "the output cannot be written, there is no space left"),
        (
            dist.DistBackendError("unhandled system error\nLast error:\nNo space left"),
            "system error Last error: No space",
        ),
        (RuntimeError(GLOO), "another process of the run died or does not answer"),
    ],
)
def test_what_befalls_a_run_is_one_line(cli, monkeypatch, refusal, error, words):
    monkeypatch.setattr(train, "main", Mock(side_effect=error))
    assert cli("--run-dir", "run") == 1
    message = refusal()
    assert words in message
    assert message.endswith("; nothing was written\n")


@pytest.mark.parametrize("error", [KeyError("model"), RuntimeError("mat1 and mat2 shapes cannot be multiplied")])
def test_mistake_of_ours_is_a_traceback(cli, monkeypatch, error):
    monkeypatch.setattr(train, "main", Mock(side_effect=error))
    with pytest.raises(type(error)):
        cli("--run-dir", "run")


def test_signal_before_anything_is_written(cli, monkeypatch, refusal):
    monkeypatch.setattr(train, "main", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM))
    assert cli("--run-dir", "run") == 143
    assert refusal() == "train.py: stopped by SIGTERM; nothing was written\n"


# --- an end before time, of a real run ---


CONTINUE = "epoch 1 is saved; to continue: python train.py --resume run"


@pytest.mark.parametrize(
    ("mishap", "workers", "told"),
    [
        # A continued run would come to the same loss.
        (lambda log_probs: log_probs * math.inf, 0, "Epoch 2/2 - Training: the loss is inf at .+; epoch 1 is saved"),
        (lambda log_probs: torch.empty(2**60), 0, f"out of memory; a new run needs a smaller --batch-size; {CONTINUE}"),
        (
            lambda log_probs: os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL) or log_probs,
            2,
            rf"a process that augments images died \(.+\); {CONTINUE}",
        ),
    ],
    ids=["loss", "memory", "worker"],
)
def test_mishap_in_the_second_epoch_keeps_the_first(cli, tiny, monkeypatch, refusal, mishap, workers, told):
    class Fateful(Net):
        step = 0

        def forward(self, x):
            self.step += self.training
            log_probs = super().forward(x)
            return mishap(log_probs) if self.training and self.step == 8 else log_probs

    monkeypatch.setattr(train, "Net", functools.partial(Fateful, base_channels=2))
    assert cli(*flags(tiny, num_workers=workers, run_dir="run"), "--no-report") == 1
    assert re.fullmatch(f"train.py: stopped: {told}\n", refusal())
    assert load_checkpoint("run/last.pt")["epoch"] == 1


def test_full_disk(cli, tiny, narrow, before, refusal):
    before("last.pt", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")), nth=2)
    assert cli(*flags(tiny, run_dir="run"), "--no-report") == 1
    assert refusal() == f"train.py: stopped: run/last.pt cannot be written (No space left on device); {CONTINUE}\n"
    assert not list(Path("run").glob("*.tmp"))
    assert cli("--resume", "run", "--no-report") == 0


# --- an output that takes nothing, or not everything ---


def test_output_that_nobody_reads(tiny, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    process = start(*flags(tiny, run_dir="run"), "--no-report", cwd=tmp_path, stdout=writer)
    os.close(writer)
    told = "train.py: stopped: nobody reads the output any more; nothing was written\n"
    assert process.communicate(timeout=120)[1] == told
    assert process.returncode != 0


def test_name_that_the_terminal_cannot_show_ends_nothing(cli, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(train, "main", lambda *args, **kwargs: print("Käse"))
    assert cli() == 0
    output.flush()
    assert output.buffer.getvalue() == b"K\\xe4se\n"


def test_closed_output_ends_nothing(cli, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)  # as with pythonw, and `python train.py >&- 2>&-`
    monkeypatch.setattr(train, "main", lambda *args, **kwargs: sys.stdout.write(str(sys.stderr.isatty())))
    assert cli() == 0


def test_notebook_keeps_its_stop_button_and_its_pictures(monkeypatch):
    monkeypatch.setattr(command_line, "IN_NOTEBOOK", True)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("MPLBACKEND", "inline")
    before = signal.getsignal(signal.SIGINT)

    def fail(config, report):
        assert signal.getsignal(signal.SIGINT) != before
        raise UsageError("bad\nname.png is no image")

    with pytest.raises(SystemExit):
        command_line.run(fail)
    assert signal.getsignal(signal.SIGINT) == before
    assert os.environ["MPLBACKEND"] == "inline"
