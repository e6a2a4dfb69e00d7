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

import pytest
import torch
from torch import distributed as dist

import train
from config import Config, RunStopped, UsageError, config
from extras import command_line
from extras.command_line import WEIGHTS, parse_args
from model import Net
from tests.conftest import flags, start
from utils import load_checkpoint

# --- reading the command line ---


def test_without_arguments_the_edited_instance_counts(monkeypatch):
    assert parse_args([]).config == config
    edited = replace(config, epochs=7)
    monkeypatch.setattr(command_line, "config", edited)
    assert parse_args([]).config == edited


def test_every_field_is_a_flag_with_its_comment_as_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in fields(Config):
        assert re.search(rf"^  --{field.name.replace('_', '-')}\b", text, re.MULTILINE)
    assert "images per step (default: 128)" in text


def test_flags_set_fields_of_their_type():
    arguments = parse_args(["--batch-size=64", "--learning-rate", "1", "--schedule", "cosine", "--nesterov", "false"])
    given = {"batch_size": 64, "learning_rate": 1.0, "schedule": "cosine", "nesterov": False}
    assert arguments.config == replace(config, **given)
    assert arguments.given == given
    assert arguments.report


def test_modes():
    assert parse_args(["--resume", "runs/a/last.pt"]).resume == "runs/a"
    elsewhere = ["--epochs", "3", "--num-workers", "0", "--device", "cpu", "--precision", "float32", "--data-dir", "d"]
    assert parse_args(["--resume", "runs/a", *elsewhere]).given["epochs"] == 3
    assert parse_args(["--evaluate", "a.pt", "--tta", "--no-report", *elsewhere[4:]]).evaluate == "a.pt"
    arguments = parse_args(["--predict", "cat.png", "dog.png"])
    assert (arguments.predict, arguments.evaluate) == (["cat.png", "dog.png"], str(WEIGHTS))
    assert parse_args(["--evaluate", "a.pt", "--predict", "cat.png"]).evaluate == "a.pt"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--epoch 3", "unknown argument --epoch: did you mean --epochs?"),
        ("--batch_size 3", "did you mean --batch-size?"),
        ("--lr 3", "did you mean --learning-rate?"),
        ("--no-reports", "did you mean --no-report?"),
        ("--qqqqqqq", "unknown argument --qqqqqqq: see --help"),
        ("--epochs many", "--epochs: invalid int value: 'many'"),
        ("--epochs", "--epochs: expected one argument"),
        ("--dataset cifar11", "cifar10"),
        ("--nesterov maybe", "--nesterov"),
        ("--resume x --evaluate y", "not allowed with"),
        ("--resume x --seed 1", "--seed cannot be given with --resume"),
        ("--resume x --run-dir y", "--run-dir cannot be given with --resume"),
        ("--resume x --nonesterov", "--nesterov cannot be given with --resume"),
        ("--evaluate x --epochs 1", "--epochs cannot be given with --evaluate"),
        ("--predict", "--predict: expected at least one argument"),
        ("--predict a.png --epochs 1", "--epochs cannot be given with --predict"),
        ("--predict a.png --resume x", "--predict goes with --evaluate PATH only"),
        ("--predict a.png --no-report", "--predict goes with --evaluate PATH only"),
        ("--tta", "--tta goes with --evaluate PATH only"),
        ("--learning-rate nan", "learning_rate must be between 1e-09 and 1000, not nan"),
        ("--momentum 0", "give --nesterov false too"),
        ("--evaluate nowhere.pt", "checkpoint nowhere.pt cannot be read"),
        ("--resume nowhere", "nowhere holds no run"),
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


@pytest.fixture
def failing(cli, monkeypatch):
    """Return a function that runs `python train.py --run-dir run` with a training that raises an error."""

    def run(error: BaseException) -> int:
        def training(config, resume=False, report=True):
            raise error

        monkeypatch.setattr(train, "main", training)
        return cli("--run-dir", "run")

    return run


GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"
BUS = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ..."


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UsageError("epochs is wrong"), 2, "error: epochs is wrong"),
        (RunStopped("the loss is nan"), 1, "stopped: the loss is nan"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nto"), 1, "out of memory; a new run needs a smaller --ba"),
        (RuntimeError("[x] DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory; a new run"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), 1, "out of memory; a new run"),
        (MemoryError(), 1, "out of memory; a new run"),
        (RuntimeError("unable to open shared memory object </torch_1> in read-write mode"), 1, "--shm-size"),
        (RuntimeError(BUS), 1, "no shared memory"),
        (RuntimeError("DataLoader worker (pid 7) exited unexpectedly with exit code 75."), 1, "no shared memory"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.\nmore"),
            1,
            "a process that augments images",
        ),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), 1, "a process that augments images died"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), 1, "a process that augments images died"),
        (EOFError(), 1, "a process that augments images died (its batch broke off)"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "nobody reads the output any more"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "the output cannot be written, there is no space left"),
        (dist.DistNetworkError("recvValue failed"), 1, "another process of the run died or does not answer (recvValue"),
        (RuntimeError(GLOO), 1, "another process of the run died or does not answer"),
    ],
)
def test_what_befalls_a_run_is_one_line(failing, refusal, error, code, words):
    assert failing(error) == code
    message = refusal()
    assert words in message
    assert message.endswith("; nothing was written\n") == (code == 1)


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError(),
        KeyError("model"),
        AttributeError("no such thing"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    ],
)
def test_mistake_of_ours_is_a_traceback(failing, error):
    with pytest.raises(type(error)):
        failing(error)


def test_signal_before_anything_is_written(cli, monkeypatch, refusal, tmp_path):
    monkeypatch.setattr(train, "main", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM))
    assert cli("--run-dir", "run") == 143
    assert refusal() == "train.py: stopped by SIGTERM; nothing was written\n"
    assert os.listdir(tmp_path) == []


# --- an end before time, of a real run ---


@pytest.fixture
def at_step_8(monkeypatch):
    """Return a function that arranges for an action in the second epoch: the network calls it with its output."""

    def arrange(action):
        class Fateful(Net):
            step = 0

            def forward(self, x):
                self.step += self.training
                log_probs = super().forward(x)
                return action(log_probs) if self.training and self.step == 8 else log_probs

        monkeypatch.setattr(train, "Net", functools.partial(Fateful, base_channels=2))

    return arrange


CONTINUE = "epoch 1 is saved; to continue: python train.py --resume run\n"


def test_loss_that_is_not_finite_keeps_what_was_saved(cli, tiny, at_step_8, refusal):
    at_step_8(lambda log_probs: log_probs * math.nan)
    assert cli(*flags(tiny, run_dir="run"), "--no-report") == 1
    message = refusal()
    assert "Epoch 2/2 - Training: the loss is nan at step 3; a new run needs a lower --learning-rate" in message
    assert message.endswith("; epoch 1 is saved\n")  # continuing would come to the same loss
    assert load_checkpoint("run/last.pt")["epoch"] == 1


def test_learning_rate_that_is_too_high(cli, tiny, narrow, refusal):
    argv = flags(tiny, optimizer="sgd", schedule="constant", learning_rate=1000.0, momentum=0.99, run_dir="run")
    assert cli(*argv, "--no-report") == 1
    assert re.search(r"Epoch \d/2 - (Training|Validation): the loss is (nan|-?inf) at step \d+; a new run", refusal())


def test_out_of_memory(cli, tiny, at_step_8, refusal):
    at_step_8(lambda log_probs: torch.empty(2**60))
    assert cli(*flags(tiny, run_dir="run"), "--no-report") == 1
    assert refusal() == f"train.py: stopped: out of memory; a new run needs a smaller --batch-size; {CONTINUE}"


def test_worker_killed(cli, tiny, at_step_8, refusal):
    at_step_8(lambda log_probs: os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL) or log_probs)
    assert cli(*flags(tiny, num_workers=2, run_dir="run"), "--no-report") == 1
    message = refusal()
    assert message.startswith("train.py: stopped: a process that augments images died (")
    assert message.endswith(f"); {CONTINUE}")


def test_full_disk(cli, tiny, narrow, before, refusal):
    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    before("last.pt", fail, nth=2)
    assert cli(*flags(tiny, run_dir="run"), "--no-report") == 1
    expected = f"train.py: stopped: {Path('run/last.pt')} cannot be written (No space left on device); {CONTINUE}"
    assert refusal() == expected
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
        monkeypatch.setattr(sys, name, None)  # as pythonw has them, and `python train.py >&- 2>&-`
    monkeypatch.setattr(train, "main", lambda *args, **kwargs: sys.stdout.write(str(sys.stderr.isatty())))
    assert cli() == 0


def test_notebook_keeps_its_stop_button(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    inside = []
    monkeypatch.setattr(sys, "argv", ["train.py"])
    command_line.run(lambda config, report: inside.append(signal.getsignal(signal.SIGINT)))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert inside[0] not in handlers
