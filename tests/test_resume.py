import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sources
import train
from checkpoint import load_checkpoint, save_checkpoint
from model import BlockSpec, Net
from tests.conftest import NEW, equal, few_shapes, outcome, start

ROOT = Path(__file__).parent.parent


def test_killed_again_and_again_it_is_the_same_run(tmp_path):
    straight = start(*NEW, "--run-dir", "straight", "--num-workers", "0", folder=tmp_path)
    # An epoch is 5 steps and 2 validation batches; then come last.pt, perhaps best.pt, and metrics.csv,
    # each with an fsync of the file, a rename, and an fsync of the folder.
    kills = [
        (("3", "update"), "1"),  # in the first epoch: nothing is saved yet
        (("3", "fsync"), "2"),  # while the first checkpoint is written
        (("3", "replace"), "0"),  # between last.pt and best.pt, the first epoch's or a later one's, or metrics.csv
        (("14", "update"), "3"),  # in the next epoch's validation
    ]
    argv = (*NEW, "--run-dir", "killed")
    for kill, workers in kills:
        process = start("--kill-at", *kill, *argv, "--num-workers", workers, folder=tmp_path)
        _, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (-signal.SIGKILL, "")
        argv = ("--resume", "killed")
    process = start(*argv, folder=tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert straight.wait() == 0
    assert equal(outcome(tmp_path / "straight"), outcome(tmp_path / "killed"))
    assert "Continuing after epoch" in out


def group_is_gone(group):
    """Whether a group's last process ends within 3 s: less than an orphaned worker takes to notice that it is one."""
    for _ in range(60):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("number", "method", "line_start"),
    [
        (signal.SIGINT, "fork", "Epoch 2/"),
        (signal.SIGTERM, "spawn", "Epoch 2/"),
        (signal.SIGINT, "spawn", "Device"),  # while the workers start
    ],
)
def test_signal_to_the_process_group_ends_it_with_one_line(tmp_path, number, method, line_start):
    argv = ("--epochs", "1000", "--run-dir", "a run", "--num-workers", "2")
    process = start("--start-method", method, *NEW, *argv, folder=tmp_path)
    for line in process.stdout:
        if line.startswith(line_start):
            break
    while not (tmp_path / "a run" / "config.json").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    last = tmp_path / "a run" / "last.pt"
    saved = f"epoch {load_checkpoint(last)['epoch']} is saved" if last.exists() else "no epoch is finished yet"
    name = signal.Signals(number).name
    assert err == f"train.py: stopped by {name}; {saved}; to continue: python train.py --resume 'a run'\n"
    assert group_is_gone(process.pid)


def test_worker_says_nothing_when_the_main_process_lets_go_of_a_batch():
    code = (
        "import dataset, socket, time; from multiprocessing.resource_sharer import DupFd; dataset._start_worker(0); "
        "socket.socket(socket.AF_UNIX).connect(DupFd(0)._id[0]); time.sleep(1)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stderr == ""


def test_longer_run_is_the_same_as_one_that_was_longer_from_the_start(s8):
    constant = ("--schedule", "constant", "--learning-rate", "0.05")
    assert s8(*constant, "--epochs", "2", "--run-dir", "straight") == 0
    assert s8(*constant, "--epochs", "1", "--run-dir", "longer") == 0
    assert s8("--resume", "longer", "--epochs", "2") == 0
    straight, longer = (load_checkpoint(f"{name}/last.pt") for name in ("straight", "longer"))
    assert all(equal(straight[part], longer[part]) for part in ("model", "optimizers", "metrics"))
    assert json.loads(Path("longer/config.json").read_text())["epochs"] == 2


def test_longer_run_that_is_stopped_stays_longer(s8, fail):
    assert s8("--schedule", "constant", "--epochs", "1", "--run-dir", "run") == 0
    fail(train, "train_step", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert s8("--resume", "run", "--epochs", "2") == 143
    assert s8("--resume", "run") == 0
    assert load_checkpoint("run/last.pt")["epoch"] == 2


def test_finished_run_stays_as_it_is(s8, capsys):
    assert s8("--epochs", "1", "--run-dir", "run") == 0
    before = Path("run/last.pt").read_bytes()
    Path("run/metrics.csv").unlink()  # as if killed before it was written
    capsys.readouterr()
    assert s8("--resume", "run") == 0
    assert "Best Valid Acc" in capsys.readouterr().out
    assert Path("run/last.pt").read_bytes() == before
    assert Path("run/metrics.csv").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--seed", "1"], "--seed cannot be given with --resume"),
        (["--run-dir", "x"], "--run-dir cannot be given with --resume"),
        (["--epochs", "2"], "the onecycle schedule was laid out for 1"),
        (["--evaluate", "run/last.pt"], "not allowed with"),
    ],
)
def test_setting_that_would_make_it_another_run_is_refused(s8, refusal, argv, words, capsys):
    assert s8("--epochs", "1", "--run-dir", "run") == 0
    before = Path("run/last.pt").read_bytes()
    capsys.readouterr()
    assert s8("--resume", "run", *argv) == 2
    assert words in refusal()
    assert Path("run/last.pt").read_bytes() == before


def test_run_cannot_become_shorter_than_it_is(s8, refusal):
    assert s8("--epochs", "2", "--schedule", "constant", "--run-dir", "run") == 0
    assert s8("--resume", "run", "--epochs", "1") == 2
    assert "2 are done already" in refusal()


def other_architecture():
    checkpoint = load_checkpoint("run/last.pt")
    save_checkpoint(Path("run/last.pt"), {**checkpoint, "model": Net([BlockSpec(3, 10)]).state_dict()})


def change_settings(**changes):
    path = Path("run/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda: Path("run/last.pt").write_bytes(b"PK"), "run/last.pt is damaged"),
        (other_architecture, "another architecture"),
        (lambda: Path("run/config.json").unlink(), "run holds no run"),
        (lambda: Path("run/config.json").write_text("{"), "config.json cannot be read"),
        (lambda: Path("run/config.json").write_text("[1]"), "config.json cannot be read"),
        (lambda: change_settings(epochs=-1), "epochs must be between"),
        (lambda: change_settings(gone=1), "begun by another version (gone differs)"),
        (lambda: Path("run/config.json").write_text('{"epochs": 1}'), "begun by another version"),
    ],
)
def test_run_that_cannot_be_resumed(s8, refusal, damage, words):
    assert s8("--epochs", "1", "--run-dir", "run") == 0
    damage()
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    assert s8("--resume", "run") == 2
    assert words in refusal()
    assert before == {path.name: path.read_bytes() for path in Path("run").iterdir()}


def test_resume_in_another_precision(s8):
    assert s8("--epochs", "1", "--schedule", "constant", "--run-dir", "run") == 0
    assert s8("--resume", "run", "--epochs", "2", "--precision", "bfloat16") == 0
    assert load_checkpoint("run/last.pt")["config"]["precision"] == "bfloat16"
    assert load_checkpoint("run/last.pt")["epoch"] == 2


def test_what_a_killed_run_left_half_written_goes(s8):
    assert s8("--epochs", "1", "--run-dir", "run") == 0
    Path("run/last.pt.1234.tmp").touch()
    assert s8("--resume", "run") == 0
    assert not Path("run/last.pt.1234.tmp").exists()


@pytest.mark.parametrize("change", ["names", "pixels"])
def test_other_images_are_refused(s8, refusal, monkeypatch, change):
    assert s8("--epochs", "1", "--run-dir", "run") == 0
    train_split, test_split, names = few_shapes()
    if change == "names":
        names = names[::-1]
    else:
        train_split = train_split._replace(images=train_split.images // 2)
    monkeypatch.setattr(sources, "load_shapes", lambda data_dir: sources.Source(train_split, test_split, names))
    assert s8("--resume", "run") == 2
    assert "are not those that this run began with: give --data-dir" in refusal()


def test_second_run_in_the_same_folder_is_refused(s8, refusal):
    assert s8("--epochs", "1", "--run-dir", "run") == 0
    code = (
        "import fcntl as f, sys; l = open('run/.lock', 'w'); f.lockf(l, f.LOCK_EX); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert s8("--resume", "run") == 2
        other.stdin.close()
    assert "run_dir run is in use" in refusal()
    assert s8("--resume", "run") == 0
