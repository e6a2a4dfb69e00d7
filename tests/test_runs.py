import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from extras import runs
from filelock import FileLock
from PIL import Image

import train
from model import BlockSpec, Net
from tests.conftest import ROOT, equal, flags, outcome, start
from utils import load_checkpoint, save_checkpoint

# --- a run that is stopped and continued ---


def test_killed_again_and_again_it_is_the_same_run(tiny, finished, cli, capsys, tmp_path):
    kills = [
        ("replace best.pt", 2, [*flags(tiny, run_dir="killed"), "--no-report"]),  # after last.pt: the epoch counts
        ("write last.pt", 3, ["--resume", "killed/last.pt"]),  # after the second epoch, which is lost
    ]
    for moment, workers, argv in kills:
        process = start(*argv, "--num-workers", workers, cwd=tmp_path, DIE_AT=moment)
        _, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (-signal.SIGKILL, "")
        assert load_checkpoint("killed/last.pt")["epoch"] == 1
    assert cli("--resume", "killed", "--num-workers", 0, "--no-report") == 0
    assert "Continuing after epoch 1\n" in capsys.readouterr().out
    assert equal(outcome(Path("killed")), outcome(finished))


def test_run_that_was_killed_in_its_first_epoch_begins_anew(finished, copy_of_finished, cli):
    for name in ("last.pt", "best.pt", "metrics.csv"):
        (copy_of_finished / name).unlink()
    (copy_of_finished / "last.pt.1234.tmp").touch()  # half written
    (copy_of_finished / "thesis.tmp").touch()  # somebody else's
    assert cli("--resume", copy_of_finished, "--no-report") == 0
    assert equal(outcome(copy_of_finished), outcome(finished))
    assert [path.name for path in copy_of_finished.glob("*.tmp")] == ["thesis.tmp"]


def group_is_gone(group: int) -> bool:
    """Whether a group's last process ends within 3 s: less than an orphaned worker takes to notice that it is one."""
    for _ in range(60):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("number", "method", "moment"),
    [
        (signal.SIGINT, "fork", "Epoch 2/"),
        (signal.SIGTERM, "spawn", "Epoch 1/"),
        (signal.SIGINT, "spawn", "Total params"),  # while the worker starts
    ],
)
def test_signal_to_the_process_group_ends_it_with_one_line(tiny, tmp_path, number, method, moment):
    argv = flags(tiny, epochs=1000, run_dir="a run", num_workers=2 if method == "fork" else 1)  # spawned ones are slow
    process = start(*argv, "--no-report", cwd=tmp_path, START_METHOD=method)
    assert any(line.startswith(moment) for line in process.stdout)
    while not (tmp_path / "a run" / "config.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, number)
    assert process.wait(timeout=60) == 128 + number
    assert group_is_gone(process.pid)
    last = tmp_path / "a run" / "last.pt"
    saved = f"epoch {load_checkpoint(last)['epoch']} is saved" if last.exists() else "no epoch is finished yet"
    told = f"train.py: stopped by {number.name}; {saved}; to continue: python {ROOT}/train.py --resume 'a run'\n"
    assert process.communicate()[1] == told


def test_ctrl_c_during_the_imports_ends_without_a_word(tmp_path):
    process = start(cwd=tmp_path, DIE_AT="import torch", DIE_OF="SIGINT")
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == -signal.SIGINT


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_run_that_ended_stays_as_it_is(cli, copy_of_finished, capsys):
    before = files(copy_of_finished)
    (copy_of_finished / "metrics.csv").unlink()  # as if killed before it was written
    assert cli("--resume", copy_of_finished, "--no-report") == 0
    assert "Best Valid Acc" in capsys.readouterr().out
    after = files(copy_of_finished)
    assert after.pop("config.json") != before.pop("config.json")  # the folder's new name
    assert after == before


# --- a run that becomes longer, or goes on elsewhere ---


@pytest.fixture
def short(cli, tiny, narrow) -> list[str]:
    """The command line of a run that is finished after an epoch, and could go on."""
    argv = [*flags(tiny, schedule="constant", epochs=1), "--no-report"]
    assert cli(*argv, "--run-dir", "run") == 0
    return argv


def test_longer_run_though_stopped_is_the_same_as_one_that_was_longer_from_the_start(cli, short, before, refusal):
    assert cli(*short, "--epochs", 2, "--run-dir", "straight") == 0
    before("last.pt", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert cli("--resume", "run", "--epochs", 2, "--no-report") == 143
    assert refusal() == "train.py: stopped by SIGTERM; epoch 1 is saved; to continue: python train.py --resume run\n"
    assert cli("--resume", "run", "--no-report") == 0
    longer, straight = (load_checkpoint(f"{name}/last.pt") for name in ("run", "straight"))
    assert all(equal(longer[part], straight[part]) for part in ("epoch", "model", "optimizers", "metrics"))


def test_run_goes_on_in_another_precision_with_its_images_elsewhere(cli, short, pictures):
    shutil.copytree(pictures, "elsewhere")
    argv = ("--epochs", 2, "--precision", "bfloat16", "--data-dir", "elsewhere", "--compile", "false")
    assert cli("--resume", "run", *argv, "--no-report") == 0
    last = load_checkpoint("run/last.pt")
    assert (last["epoch"], last["config"]["precision"], last["config"]["data_dir"]) == (2, "bfloat16", "elsewhere")


# --- what cannot be continued ---


def change_settings(run: Path, **changes) -> None:
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_network(run: Path) -> None:
    checkpoint = load_checkpoint(run / "last.pt")
    save_checkpoint(run / "last.pt", {**checkpoint, "model": Net([BlockSpec(3, 10)]).state_dict()})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (run / "last.pt").write_bytes(b"PK"), "last.pt is damaged"),
        (lambda run: (run / "last.pt").unlink(), "last.pt is gone, and the run cannot be continued without it"),
        (other_network, "another architecture than the one in model.py: blocks.0.0.bias.shape is (10,) there, (16,)"),
        (lambda run: change_settings(run, epochs=-1), "config.json cannot be used (epochs must be between"),
        (lambda run: change_settings(run, muon_learning_rate=0.02), "another version (muon_learning_rate differs)"),
        (lambda run: (run / "config.json").write_text('{"epochs": 2}'), "begun by another version (batch_size"),
        (lambda run: change_settings(run, seed=1), "seed is 1 in config.json, and this run began with 0"),
        (lambda run: change_settings(run, schedule="constant", epochs=1), "epochs cannot become 1: 2 are done already"),
    ],
)
def test_damaged_run_is_refused_and_stays_as_it_is(cli, copy_of_finished, refusal, damage, words):
    damage(copy_of_finished)
    before = files(copy_of_finished)
    assert cli("--resume", copy_of_finished) == 2
    assert words in refusal()
    assert files(copy_of_finished) == before


@pytest.mark.parametrize("damaged", ["", "[1]"])
def test_settings_are_in_the_checkpoint_too(cli, copy_of_finished, damaged):
    begun = json.loads((copy_of_finished / "config.json").read_text())
    (copy_of_finished / "config.json").write_text(damaged)
    assert cli("--resume", copy_of_finished, "--no-report") == 0
    assert json.loads((copy_of_finished / "config.json").read_text()) == {**begun, "run_dir": str(copy_of_finished)}


def test_run_with_other_optimizers_is_refused(cli, finished, refusal, monkeypatch):
    monkeypatch.setattr(train, "make_optimizers", lambda net, config: [torch.optim.SGD(net.parameters(), 0.1)])
    assert cli("--resume", finished) == 2
    assert "the optimizers are not those that this run began with" in refusal()


@pytest.mark.parametrize("edited", [False, True])
def test_schedule_that_was_laid_out_keeps_its_epochs(cli, copy_of_finished, refusal, edited):
    if edited:
        settings = json.loads((copy_of_finished / "config.json").read_text())
        (copy_of_finished / "config.json").write_text(json.dumps({**settings, "epochs": 3}))
    assert cli("--resume", copy_of_finished, *([] if edited else ["--epochs", 3])) == 2
    assert "epochs cannot change: the onecycle schedule was laid out for 2" in refusal()


def rename_class() -> None:
    for part in ("train", "test"):
        Path(f"others/{part}/ring").rename(f"others/{part}/rings")


def change_pixel() -> None:
    path = next(Path("others/train/ring").iterdir())
    image = Image.open(path)
    red, green, blue = image.getpixel((0, 0))
    image.putpixel((0, 0), (red ^ 1, green, blue))
    image.save(path)


@pytest.mark.parametrize("change", [rename_class, change_pixel])
def test_other_images_are_refused(cli, finished, pictures, refusal, change):
    shutil.copytree(pictures, "others")
    change()
    assert cli("--resume", finished, "--data-dir", "others") == 2
    assert "the images in others are not those that this run began with: give --data-dir" in refusal()


# --- a folder for one run at a time ---


def test_folder_that_holds_a_run_is_kept(cli, finished, tiny, refusal):
    before = files(finished)
    assert cli(*flags(tiny, run_dir=str(finished), seed=1)) == 2
    assert f"run_dir {finished} holds a run: --resume continues it, --run-dir names another" in refusal()
    assert files(finished) == before


def test_second_run_in_the_same_folder_is_refused(cli, copy_of_finished, refusal, monkeypatch):
    monkeypatch.setattr(runs, "LOCK_TIMEOUT", 0)
    with FileLock(copy_of_finished / ".lock"):
        assert cli("--resume", copy_of_finished) == 2
    assert f"run_dir {copy_of_finished} is in use by another run" in refusal()
    assert cli("--resume", copy_of_finished, "--no-report") == 0
