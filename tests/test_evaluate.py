import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from extras.predict import load_network
from extras.runs import best_row, checkpoint_to_test

import train
from config import config
from dataset import load_datasets, make_loader
from model import Net
from tests.conftest import ROOT, equal, flags
from utils import load_checkpoint, save_checkpoint


@pytest.mark.parametrize("argv", [["float32"], ["float32", "--batch-size", "7"], ["bfloat16"]])
def test_checkpoint_is_tested_with_its_own_settings_but_for_those_given(cli, finished, capsys, argv):
    assert cli("--evaluate", finished / "last.pt", "--no-report", "--precision", *argv) == 0
    loss, accuracy = map(float, re.findall(r"\d+\.\d{4}", capsys.readouterr().out))
    last = load_checkpoint(finished / "last.pt")["metrics"][-1]  # of the same images, for none were held out
    assert loss == pytest.approx(last["valid_loss"], abs=0.05 if "bfloat16" in argv else 1e-4)
    assert accuracy == pytest.approx(last["valid_accuracy"], abs=10 if "bfloat16" in argv else 1e-4)


def test_device_and_precision_of_the_training_need_not_be_here(cli, finished):
    last = load_checkpoint(finished / "last.pt")
    last["config"] |= {"device": "cuda:99", "precision": "float16"}
    save_checkpoint("far.pt", last)
    assert cli("--evaluate", "far.pt", "--no-report") == 0


def test_only_the_test_images_are_needed(cli, finished, pictures, capsys):
    shutil.copytree(pictures / "test", "elsewhere/test")
    assert cli("--evaluate", finished, "--no-report", "--data-dir", "elsewhere") == 0
    elsewhere = capsys.readouterr().out
    assert cli("--evaluate", finished, "--no-report") == 0
    assert elsewhere == capsys.readouterr().out != ""


def test_mirrored_accuracy_is_printed_beside_the_other(cli, capsys):
    path = ROOT / "weights" / "shapes.pt"
    assert cli("--evaluate", path, "--tta", "--no-report", "--device", "cpu", "--precision", "float32") == 0
    plain, mirrored = capsys.readouterr().out.splitlines()[-2:]
    assert re.fullmatch(r"Test Loss: 0\.\d{4}, Test Acc: 100\.0000", plain)
    net, _ = load_network(path)
    test = load_datasets(replace(config, dataset="shapes")).test
    images, labels = next(iter(make_loader(test, len(test))))
    with torch.no_grad():
        probabilities = (net(images).exp() + net(images.flip(3)).exp()) / 2
    accuracy = 100 * (probabilities.argmax(dim=1) == labels).double().mean()
    loss = -probabilities[range(len(labels)), labels].log().mean()
    assert mirrored == f"Averaged Test Loss: {loss:.4f}, Averaged Test Acc: {accuracy:.4f}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class_names": list("abcdefghij")}, "was trained on other classes than those of the images"),
        ({"config": {"dataset": "folder", "batch_size": 0}}, "batch_size must be between 1 and 65536, not 0"),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused(cli, finished, pictures, refusal, change, words):
    save_checkpoint("other.pt", load_checkpoint(finished / "last.pt") | change)
    assert cli("--evaluate", "other.pt", "--data-dir", pictures, "--no-report") == 2
    assert re.search(f"other.pt.*{words}", refusal())


# --- the end of a run ---


def test_held_out_images_choose_the_network_that_is_tested_at_the_end(cli, tiny, monkeypatch, before, capsys):
    made = []
    monkeypatch.setattr(train, "Net", lambda **options: made.append(Net(**options)) or made[0])
    # All that the network has learnt is lost after the first epoch, when that is saved.
    before("metrics.csv", lambda: [parameter.data.zero_() for parameter in made[0].parameters()])
    assert cli(*flags(tiny, valid_split=0.2, run_dir="run"), "--no-report") == 0
    out = capsys.readouterr().out
    assert "(epoch 1). Results are in run.\nTest Loss: " in out
    for path, tested in (("run", True), ("run/best.pt", True), ("run/last.pt", False)):
        assert cli("--evaluate", path, "--no-report") == 0
        assert (capsys.readouterr().out.strip() in out) == tested


def test_test_images_play_no_part_before_the_end(cli, tiny, narrow, pictures):
    shutil.copytree(pictures, "others")
    for path in Path("others", "test").glob("*/*"):
        shutil.copy(next(pictures.glob("train/*/*")), path)
    for name, data_dir in (("one", str(pictures)), ("other", "others")):
        assert cli(*flags(tiny, valid_split=0.2, data_dir=data_dir, run_dir=name), "--no-report") == 0
    one, other = load_checkpoint("one/best.pt"), load_checkpoint("other/best.pt")
    assert one["metrics"] == other["metrics"]
    assert equal(dict(one["model"]), dict(other["model"]))


# --- the checkpoint that counts ---


def test_best_epoch_is_the_first_of_equals():
    rows = [{"epoch": epoch, "valid_accuracy": accuracy} for epoch, accuracy in [(1, 10.0), (2, 30.0), (3, 30.0)]]
    assert best_row(rows)["epoch"] == 2


def test_best_counts_only_if_held_out_images_chose_it(copy_of_finished):
    assert checkpoint_to_test(copy_of_finished).name == "last.pt"
    last = load_checkpoint(copy_of_finished / "last.pt")
    last["config"]["valid_split"] = 0.1
    save_checkpoint(copy_of_finished / "last.pt", last)
    assert checkpoint_to_test(copy_of_finished).name == "best.pt"


def test_continued_run_says_that_its_best_checkpoint_is_gone_and_tests_the_last(cli, tiny, narrow, capsys):
    assert cli(*flags(tiny, valid_split=0.2, run_dir="run"), "--no-report") == 0
    last = load_checkpoint("run/last.pt")
    last["metrics"][0]["valid_accuracy"] = 100.0  # the first epoch was the best
    save_checkpoint("run/last.pt", last)
    Path("run/best.pt").write_bytes(b"PK")
    capsys.readouterr()
    assert cli("--resume", "run", "--no-report") == 0
    out, err = capsys.readouterr()
    assert re.search(r"Best Valid Acc: 100\.0000 \(epoch 1\)\..+\nTest Loss: ", out)
    assert err.startswith("train.py: warning: run/best.pt is gone or damaged: last.pt is tested in its place")
