"""A run's folder: it goes on after any end, on other machines too, and it is refused where it would be another run."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from unittest.mock import Mock

import albumentations as A
import pytest
from PIL import Image
from torch import nn

import dataset
import train
from config import UsageError
from parts.transforms import RepeatableCompose
from tests.conftest import equal, flags, outcome, start
from utils import load_checkpoint, save_checkpoint


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def rewrite(run, **changes) -> None:
    """Change last.pt: in its config, what is a setting."""
    checkpoint = load_checkpoint(Path(run, "last.pt"))
    for name, value in changes.items():
        (checkpoint if name in checkpoint else checkpoint["config"])[name] = value
    save_checkpoint(Path(run, "last.pt"), checkpoint)


# --- a run that is stopped and continued ---


def test_killed_again_and_again_it_is_the_same_run_with_any_number_of_workers(tiny, finished, cli, tmp_path):
    kills = [
        ("write last.pt 2", 0, flags(tiny, run_dir="run"), 0),  # the first epoch is lost
        ("replace best.pt 1", 3, ["--resume", "run"], 1),  # after last.pt: the epoch counts
    ]
    for moment, workers, argv, saved in kills:
        process = start(*argv, "--num-workers", workers, "--no-report", cwd=tmp_path, DIE_AT=moment)
        assert process.communicate(timeout=120)[1] == ""
        assert process.returncode == -signal.SIGKILL
        assert load_checkpoint("run/last.pt")["epoch"] == saved
    assert cli("--resume", "run", "--num-workers", 0, "--no-report") == 0
    assert equal(outcome("run"), outcome(finished))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_all_its_processes_ends_a_run_with_workers_in_one_line(tiny, tmp_path, number):
    argv = flags(tiny, epochs=1000, run_dir="a run", num_workers=2)
    process = start(*argv, "--no-report", cwd=tmp_path)
    while not (tmp_path / "a run" / "metrics.csv").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, number)
    told = (
        r"train.py: stopped by {}; epoch {} of 1000 is saved in a run; to continue: python train.py --resume 'a run'\n"
    )
    err = process.communicate(timeout=60)[1]
    epoch = load_checkpoint(tmp_path / "a run" / "last.pt")["epoch"]
    assert err == told.format(number.name, epoch).replace(r"\n", "\n")
    assert process.returncode == 128 + number
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no worker is left


def test_folder_is_open_to_a_new_run_until_an_epoch_is_saved(cli, tiny, narrow, monkeypatch, refusal):
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_one_epoch", Mock(side_effect=UsageError("the augmentation is wrong")))
        assert cli(*flags(tiny, run_dir="run")) == 2
    refusal()
    assert load_checkpoint("run/last.pt")["epoch"] == 0
    assert cli(*flags(tiny, run_dir="run", epochs=1, seed=1), "--no-report") == 0
    before = files("run")
    assert cli(*flags(tiny, run_dir="run")) == 2
    assert "run_dir run holds a run: --resume continues it, --run-dir names another" in refusal()
    assert files("run") == before


def test_last_pt_is_the_only_truth_and_the_other_files_follow_from_it(cli, copy_of_finished):
    rows = load_checkpoint(copy_of_finished / "last.pt")["metrics"]
    rows[1]["valid_accuracy"] = 99.75  # the last epoch is the best one
    rewrite(copy_of_finished, metrics=rows)
    (copy_of_finished / "metrics.csv").unlink()
    (copy_of_finished / "config.json").write_text('{"epochs": 7}')
    assert cli("--resume", copy_of_finished, "--no-report") == 0
    last, best = outcome(copy_of_finished)
    assert equal(last, best)
    assert json.loads((copy_of_finished / "config.json").read_text()) == load_checkpoint("copy/last.pt")["config"]
    lines = (copy_of_finished / "metrics.csv").read_text().splitlines()
    assert lines[2].split(",") == [str(value) for value in rows[1].values()]


# --- a run that becomes longer, or goes on elsewhere ---


@pytest.fixture
def short(cli, tiny, narrow) -> list[str]:
    """The settings of a run that is finished after an epoch, in the folder "run", and could go on."""
    argv = [*flags(tiny, schedule="constant"), "--no-report"]
    assert cli(*argv, "--epochs", 1, "--run-dir", "run") == 0
    return argv


def test_run_that_became_longer_in_a_folder_that_moved_is_as_if_it_had_always_been_so(cli, short):
    assert not any(b"run_dir" in content for name, content in files("run").items() if name != "report.md")
    Path("run").rename("moved")
    assert cli("--resume", "moved", "--epochs", 2, "--no-report") == 0
    assert cli(*short, "--run-dir", "straight") == 0
    assert equal(outcome("moved"), outcome("straight"))


@pytest.mark.parametrize("schedule", ["constant", "plateau"])
def test_run_that_began_on_another_machine_goes_on_here(cli, short, pictures, schedule):
    there = {"device": "cuda:7", "precision": "float16", "compile": True, "num_workers": 64, "data_dir": "/gone"}
    rewrite("run", **there, schedule=schedule)
    here = {"device": "cpu", "precision": "bfloat16", "compile": False, "num_workers": 1, "data_dir": str(pictures)}
    argv = [word for name, value in here.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert cli("--resume", "run", *argv, "--epochs", 2, "--no-report") == 0
    last = load_checkpoint("run/last.pt")
    assert last["epoch"] == 2
    assert last["config"].items() >= here.items()


def test_device_is_kept_as_auto_and_the_precision_as_what_it_became(cli, tiny, narrow):
    assert cli(*flags(tiny, device="auto", precision="auto", epochs=1, run_dir="run"), "--no-report") == 0
    kept = json.loads(Path("run/config.json").read_text())
    assert kept["device"] == "auto"
    assert kept["precision"] in ("bfloat16", "float32")


class Inverted(A.ImageOnlyTransform):
    def apply(self, img, **params):
        return 255 - img


def test_transforms_of_your_own_do_not_stand_in_a_runs_way(cli, tiny, narrow, monkeypatch):
    functions = []

    def make(config, mean):
        functions.append((lambda image, **_: image // 2, lambda image, **_: image))  # at an address of its own
        named, unnamed = functions[-1]
        return RepeatableCompose([A.Lambda(image=named, name="darker", p=1), A.Lambda(image=unnamed), Inverted(p=0.5)])

    monkeypatch.setattr(dataset, "make_augmentation", make)
    assert cli(*flags(tiny, schedule="constant", epochs=1, run_dir="run"), "--no-report") == 0
    assert cli("--resume", "run", "--epochs", 2, "--no-report") == 0


# --- what cannot be continued ---


def other_images(change):
    """Return what gives --data-dir another copy of the images, with that change."""

    def arrange(run, monkeypatch):
        shutil.copytree(load_checkpoint(run / "last.pt")["config"]["data_dir"], "others")
        change()
        return ["--data-dir", "others"]

    return arrange


def change_pixel() -> None:
    path = next(Path("others/test/ring").iterdir())
    image = Image.open(path)
    red, green, blue = image.getpixel((0, 0))
    image.putpixel((0, 0), (red ^ 1, green, blue))
    image.save(path)


def rename_class() -> None:
    for part in ("train", "test"):
        Path(f"others/{part}/ring").rename(f"others/{part}/rings")


def other_augmentation(run, monkeypatch):
    monkeypatch.setattr(dataset, "make_augmentation", lambda config, mean: RepeatableCompose([A.HorizontalFlip(p=0.4)]))


def other_module(run, monkeypatch):
    class Edited(train.Net):
        def __init__(self, **options):
            super().__init__(**options)
            self.blocks[0][2] = nn.Dropout(0.1)  # in place of Dropout2d: the same weights

    monkeypatch.setattr(train, "Net", Edited)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run, _: ["--seed", "1"], "seed is 1 now, and this run began with 0"),
        (lambda run, _: ["--dropout", "0.2"], "dropout is 0.2 now"),
        (lambda run, _: ["--epochs", "3"], "epochs cannot change: the onecycle schedule"),
        (lambda run, _: rewrite(run, schedule="constant", epochs=1), "epochs cannot become 1: 2 are done already"),
        (lambda run, _: rewrite(run, config={"epochs": 2}), "another version of config.py"),
        (lambda run, _: (run / "last.pt").write_bytes(b"PK"), "last.pt is damaged"),
        (lambda run, _: (run / "last.pt").unlink(), "holds no run"),
        (other_images(change_pixel), "images are not those that this run began with: give --data-dir"),
        (other_images(rename_class), "images are not those that this run began with: give --data-dir"),
        (other_augmentation, "make_augmentation makes another pipeline"),
        (lambda run, patch: patch.setattr(train, "Net", lambda **_: nn.Linear(1, 1)), "makes another network"),
        (other_module, "makes another network"),
    ],
)
def test_what_would_be_another_run_is_refused_and_stays_as_it_is(
    cli, copy_of_finished, monkeypatch, refusal, change, words
):
    argv = change(copy_of_finished, monkeypatch)
    before = files(copy_of_finished)
    assert cli("--resume", copy_of_finished, *(argv if isinstance(argv, list) else [])) == 2
    assert words in refusal()
    assert files(copy_of_finished) == before


def test_missing_best_checkpoint_of_held_out_images_is_refused_at_once(cli, tiny, narrow, monkeypatch, refusal):
    accuracies = iter([90.0, 80.0])
    numbers = {"loss": 1.0, "seconds": 1.0, "images_per_second": 1.0}
    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", lambda *args: {**numbers, "accuracy": next(accuracies, 80.0)})
        settings = {"valid_split": 0.2, "schedule": "constant", "run_dir": "run"}
        assert cli(*flags(tiny, **settings), "--no-report") == 0
    Path("run/best.pt").unlink()
    assert cli("--resume", "run", "--epochs", 3, "--no-report") == 2
    assert "best.pt is not there" in refusal()
    assert load_checkpoint("run/last.pt")["epoch"] == 2
