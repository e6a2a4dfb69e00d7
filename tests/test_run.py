"""A run's folder: it goes on after any end, on other machines too, and it is refused where it would be another run."""

import csv
import functools
import json
import os
import shutil
import signal
from pathlib import Path
from unittest.mock import Mock

import albumentations as A
import pytest
import torch
from torch import nn

import dataset
import model
import train
from config import UsageError
from model import Net
from parts.transforms import RepeatableCompose
from tests.conftest import ROOT, equal, flags, outcome, start
from utils import load_checkpoint, save_checkpoint

DEFAULT_BLOCKS = model.default_blocks()


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def rewrite(run, **changes) -> None:
    """Change last.pt: in its config, what is a setting."""
    checkpoint = load_checkpoint(Path(run, "last.pt"))
    for name, value in changes.items():
        (checkpoint if name in checkpoint else checkpoint["config"])[name] = value
    save_checkpoint(Path(run, "last.pt"), checkpoint)


def test_killed_again_and_again_it_is_the_same_run_with_any_number_of_workers(tiny, finished, cli, tmp_path):
    kills = [
        ("write last.pt 2", 0, flags(tiny, run_dir="run"), 0),  # the first epoch is lost
        ("replace best.pt 1", 3, ["--resume", "run"], 1),  # after last.pt: the epoch counts
    ]
    for moment, workers, argv, saved in kills:
        process = start(*argv, "--num-workers", workers, "--no-report", cwd=tmp_path, DIE_AT=moment)
        assert process.wait(timeout=120) == -signal.SIGKILL
        assert load_checkpoint("run/last.pt")["epoch"] == saved
    assert cli("--resume", "run", "--num-workers", 0, "--no-report") == 0
    assert equal(outcome("run"), outcome(finished))


def test_ctrl_c_ends_a_run_and_its_workers_with_one_line(tiny, tmp_path):
    process = start(*flags(tiny, epochs=1000, run_dir="a run", num_workers=2), cwd=tmp_path)
    assert any(line.startswith("Epoch 2/1000 Summary") for line in process.stdout)
    os.killpg(process.pid, signal.SIGINT)
    *others, told = process.communicate(timeout=60)[1].splitlines()
    assert not any("KeyboardInterrupt" in line for line in others)
    saved = f"epoch {load_checkpoint(tmp_path / 'a run' / 'last.pt')['epoch']} of 1000 is saved in a run"
    assert told == f"train.py: stopped by SIGINT; {saved}; to continue: python train.py --resume 'a run'"
    assert process.returncode == 130
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no worker is left


def test_folder_is_open_to_a_new_run_until_an_epoch_is_saved(cli, tiny, narrow, monkeypatch, refusal):
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_one_epoch", Mock(side_effect=UsageError("the augmentation is wrong")))
        assert cli(*flags(tiny, run_dir="run")) == 2
    assert "the augmentation is wrong" in refusal()
    assert cli(*flags(tiny, run_dir="run", epochs=1, seed=1), "--no-report") == 0
    before = files("run")
    assert cli(*flags(tiny, run_dir="run")) == 2
    assert "run_dir run holds a run: --resume continues it, --run-dir names another" in refusal()
    assert files("run") == before


def test_last_pt_is_the_only_truth_and_the_other_files_follow_from_it(cli, copy_of_finished):
    first, last = load_checkpoint("copy/last.pt")["metrics"]
    last = {"gap": 0.5} | last | {"valid_accuracy": 99.75}  # a column that an edit added; it is the best one
    rewrite("copy", metrics=[first, last])
    Path("copy/metrics.csv").unlink()
    Path("copy/config.json").write_text('{"epochs": 7}')
    assert cli("--resume", "copy", "--no-report") == 0
    assert equal(*outcome("copy"))
    assert json.loads(Path("copy/config.json").read_text()) == load_checkpoint("copy/last.pt")["config"]
    rows = list(csv.DictReader(Path("copy/metrics.csv").read_text().splitlines()))
    assert rows[1] == {name: str(value) for name, value in last.items()}


@pytest.fixture
def short(cli, tiny, narrow) -> list[str]:
    """The settings of a run that is finished after an epoch, in the folder "run", and could go on."""
    argv = [*flags(tiny, schedule="constant"), "--no-report"]
    assert cli(*argv, "--epochs", 1, "--run-dir", "run") == 0
    return argv


def test_run_that_became_longer_in_a_folder_that_moved_is_as_if_it_had_always_been_so(cli, short):
    assert "run_dir" not in Path("run/config.json").read_text()
    assert "run_dir" not in load_checkpoint("run/last.pt")["config"]
    assert all(tensor.is_contiguous() for tensor in load_checkpoint("run/last.pt")["model"].values())  # for safetensors
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
    assert load_checkpoint("run/last.pt")["epoch"] == 2
    assert load_checkpoint("run/last.pt")["config"].items() >= here.items()


def test_device_is_kept_as_auto_and_the_precision_as_what_it_became(cli, tiny, narrow):
    assert cli(*flags(tiny, device="auto", precision="auto", epochs=1, run_dir="run"), "--no-report") == 0
    kept = json.loads(Path("run/config.json").read_text())
    assert (kept["device"], kept["precision"]) in [("auto", "bfloat16"), ("auto", "float32")]


def test_transforms_of_your_own_do_not_stand_in_a_runs_way(cli, tiny, narrow, monkeypatch):
    functions, inverted = [], type("Inverted", (A.ImageOnlyTransform,), {"apply": lambda self, img, **_: 255 - img})

    def make(config, mean):
        functions.append(lambda image, **_: image // 2)  # at an address of its own
        lambdas = [A.Lambda(functions[-1], name="darker", p=1), A.Lambda(functions[-1])]
        return RepeatableCompose([*lambdas, inverted(p=0.5)])

    monkeypatch.setattr(dataset, "make_augmentation", make)
    assert cli(*flags(tiny, schedule="constant", epochs=1, run_dir="run"), "--no-report") == 0
    assert cli("--resume", "run", "--epochs", 2, "--no-report") == 0


def other_images(run, change) -> None:
    shutil.copytree(load_checkpoint(run / "last.pt")["config"]["data_dir"], "others")
    for folder in Path("others").glob("*/ring"):
        change(folder)
    rewrite(run, data_dir="others")


def other_table(base_channels):
    first, *others = DEFAULT_BLOCKS
    return first._replace(last="plain"), *others


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda run, patch: ["--seed", "1"], "seed"),
        (lambda run, patch: ["--epochs", "3"], "epochs"),  # of a schedule that was laid out for two
        (lambda run, patch: rewrite(run, schedule="constant", epochs=1), "2 are done already"),
        (lambda run, patch: rewrite(run, config={"epochs": 2}), "another version"),
        (lambda run, patch: os.truncate(run / "last.pt", 99), "last.pt is damaged"),
        (lambda run, patch: other_images(run, lambda folder: next(folder.iterdir()).unlink()), "images"),
        (lambda run, patch: other_images(run, lambda folder: folder.rename(f"{folder}s")), "class"),
        (lambda run, patch: patch.setattr(dataset, "make_augmentation", lambda *_: RepeatableCompose([])), "augm"),
        (lambda run, patch: patch.setattr(train, "Net", functools.partial(Net, base_channels=2)), "network"),
        (lambda run, patch: patch.setattr(nn, "Dropout2d", nn.Dropout), "network"),  # its weights are the same
        (lambda run, patch: patch.setattr(model, "default_blocks", other_table), "network"),  # its shapes are the same
    ],
)
def test_another_run_is_refused_and_nothing_written(cli, copy_of_finished, monkeypatch, refusal, change, word):
    argv = change(copy_of_finished, monkeypatch) or []
    before = files(copy_of_finished)
    assert cli("--resume", copy_of_finished, *argv) == 2
    assert word in refusal()
    assert files(copy_of_finished) == before


def test_run_knows_what_made_it_and_says_what_changed_since(cli, short, capsys, monkeypatch):
    (maker,) = load_checkpoint("run/last.pt")["made_by"]
    assert maker["modules"]["model.py"] == (ROOT / "model.py").read_text()
    assert maker["versions"].keys() == {"Python", "OpenCV", "torch", "albumentations"}
    assert "--run-dir run" in maker["command"]
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **how: read(path, **how) + "#" * (path.name == "train.py"))
    assert cli("--resume", "run", "--epochs", 2, "--no-report") == 0
    assert "Note: changed since this run was begun or last continued: train.py\n" in capsys.readouterr().out
    assert [*load_checkpoint("run/last.pt")["made_by"][1]["modules"]] == [*maker["modules"]]


def test_run_begins_with_weights_and_needs_their_file_no_more(cli, short, finished, tmp_path, capsys, refusal):
    weights = Path(shutil.copy(finished / "last.pt", tmp_path / "weights.pt"))
    origin = load_checkpoint(weights)
    origin["mean"] = (0.1, 0.2, 0.3)
    save_checkpoint(weights, origin)
    argv = [*short, "--weights", "weights.pt", "--schedule", "constant", "--learning-rate", "1e-9"]
    assert cli(*argv, "--activation", "relu") == 2
    assert "activation must be silu, with which the weights were learnt, not relu" in refusal()
    save_checkpoint("own.pt", origin | {"network": ["", " MyNet"]})
    assert cli(*argv, "--weights", "own.pt") == 2
    assert "the weights are of a network of your own (MyNet)" in refusal()
    assert cli(*argv, "--epochs", 1, "--run-dir", "tuned") == 0
    assert "begins anew" not in capsys.readouterr().out
    tuned = load_checkpoint("tuned/last.pt")
    assert tuned["mean"] == origin["mean"]  # of the images that the weights know
    assert tuned["arguments"] == origin["arguments"]
    torch.testing.assert_close(tuned["model"]["classifier.weight"], origin["model"]["classifier.weight"])
    weights.unlink()
    assert cli("--resume", "tuned", "--epochs", 2, "--no-report") == 0


def test_other_classes_begin_with_a_classifier_of_their_own(cli, short, finished, tmp_path, capsys):
    origin = load_checkpoint(finished / "last.pt")
    save_checkpoint("weights.pt", origin | {"class_names": [f"other {name}" for name in origin["class_names"]]})
    assert cli(*short, "--weights", "weights.pt", "--epochs", 1, "--learning-rate", "1e-9", "--run-dir", "tuned") == 0
    assert "The class names differ from those of the weights: classifier begins anew" in capsys.readouterr().out
    tuned = load_checkpoint("tuned/last.pt")["model"]
    torch.testing.assert_close(tuned["blocks.0.0.weight"], origin["model"]["blocks.0.0.weight"])
    assert not torch.allclose(tuned["classifier.weight"], origin["model"]["classifier.weight"], atol=0.01)
