import csv
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import sources
import train
import utils
from checkpoint import load_checkpoint
from dataset import FixedBatches, make_normalization
from model import Net
from optimizer import make_optimizers
from sources import draw_shapes
from utils import Meter, NonFiniteLoss, with_progress

CPU = torch.device("cpu")
OFF = torch.amp.GradScaler("cpu", enabled=False)
USUAL = {"learning_rate": 1.0, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0}


# --- a whole run ---


def test_run_prints_the_specifications_log_and_leaves_its_files(s8, capsys):
    assert s8("--epochs", "2", "--run-dir", "run") == 0
    out, err = capsys.readouterr()
    assert err == ""  # no terminal, no bars
    assert "Total params: 138,666" in out
    assert re.search(r"^Device: cpu \(\d+ threads\), precision \w+, 0 workers\. Run: run$", out, re.M)
    number = r"(\d+\.\d{4})"
    losses = [rf"{name} Loss: {number}, {name} Acc: {number}\n" for name in ("Train", "Valid")]
    summary = rf"\nEpoch (\d)/2 Summary:\n{losses[0]}{losses[1]}"
    printed = re.findall(summary, out)
    assert [row[0] for row in printed] == ["1", "2"]

    assert sorted(os.listdir("run")) == [".lock", "best.pt", "config.json", "last.pt", "metrics.csv"]
    with open("run/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    columns = ["epoch", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy"]
    for row, values in zip(rows, printed, strict=True):
        assert [f"{float(row[name]):.4f}" for name in columns[1:]] == list(values[1:])
    recorded = json.loads(Path("run/config.json").read_text())
    assert (recorded["dataset"], recorded["device"], recorded["epochs"]) == ("shapes", "cpu", 2)

    last = load_checkpoint("run/last.pt")
    assert last["epoch"] == 2
    assert last["config"] == recorded
    assert last["class_names"] == list(sources.SHAPES)
    assert [str(row["valid_loss"]) for row in last["metrics"]] == [row["valid_loss"] for row in rows]
    best = max(last["metrics"], key=lambda row: row["valid_accuracy"])
    assert load_checkpoint("run/best.pt")["epoch"] == best["epoch"]

    assert s8("--evaluate", "run/last.pt") == 0
    assert f"Test Loss: {printed[1][3]}, Test Acc: {printed[1][4]}" in capsys.readouterr().out


def test_same_seed_same_run_with_dropout_and_workers(s8):
    for name, workers in (("a", "0"), ("b", "2")):
        argv = ("--epochs", "2", "--dropout", "0.1", "--num-workers", workers)
        assert s8(*argv, "--run-dir", name) == 0
    a, b = (load_checkpoint(f"{name}/last.pt") for name in "ab")
    assert a["metrics"] == b["metrics"]
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert s8("--epochs", "1", "--dropout", "0.1", "--run-dir", "c", "--seed", "1") == 0
    assert load_checkpoint("c/last.pt")["metrics"][0] != a["metrics"][0]


def test_held_out_images_choose_and_the_test_images_are_used_once(s8, capsys, monkeypatch):
    titles = []
    validate = train.validate
    monkeypatch.setattr(train, "validate", lambda *args: titles.append((args[-1], args[1].split)) or validate(*args))
    assert s8("--epochs", "2", "--valid-split", "0.2", "--run-dir", "run") == 0
    assert [(title, len(split.labels)) for title, split in titles] == [
        ("Epoch 1/2 - Validation", 30),
        ("Epoch 2/2 - Validation", 30),
        ("Test", 50),
    ]
    out = capsys.readouterr().out
    assert s8("--evaluate", "run/best.pt") == 0
    evaluated = capsys.readouterr().out.strip()
    assert evaluated.startswith("Test Loss: ")
    assert evaluated in out


def test_mirrored_accuracy_is_printed_beside_the_other(s8, capsys):
    assert s8("--epochs", "1", "--run-dir", "run") == 0
    assert s8("--evaluate", "run/last.pt") == 0
    plain = capsys.readouterr().out.splitlines()[-1]
    assert s8("--evaluate", "run/last.pt", "--tta") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == plain
    assert re.fullmatch(r"Mirrored Test Loss: \d+\.\d{4}, Mirrored Test Acc: \d+\.\d{4}", second)


def test_default_run_dir_is_a_new_dated_one(s8, tmp_path):
    assert s8("--epochs", "1") == 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", os.listdir(tmp_path / "runs")[0])


# --- the loop's numbers ---


@pytest.fixture
def uneven():
    """Three batches of 20, 20 and 3 images."""
    return FixedBatches(draw_shapes(43, np.random.default_rng(1)), make_normalization((0.5,) * 3, (0.25,) * 3), 20)


def test_validation_averages_are_over_images(uneven):
    net = Net()
    images, labels = (torch.cat(part) for part in zip(*uneven, strict=True))
    result = train.validate(net, uneven, CPU, torch.float32)
    with torch.no_grad():
        log_probs = net.eval()(images)
    assert result["loss"] == pytest.approx(F.nll_loss(log_probs, labels).item(), rel=1e-5)
    assert result["accuracy"] == pytest.approx(100 * (log_probs.argmax(1) == labels).float().mean().item())


def test_training_averages_are_over_images(uneven):
    torch.manual_seed(0)
    net = Net()
    losses = [F.nll_loss(net(images), labels).item() for images, labels in uneven]
    optimizers = make_optimizers(net, **USUAL)
    result = train.train_one_epoch(net, uneven, optimizers, OFF, [0.0] * 3, CPU, torch.float32)
    assert result["loss"] == pytest.approx(np.average(losses, weights=[20, 20, 3]), rel=1e-5)


def test_step_follows_smoothed_labels_and_reports_the_loss_without(uneven):
    torch.manual_seed(0)
    images, labels = next(iter(uneven))
    net, reference = Net(), Net()
    reference.load_state_dict(net.state_dict())
    F.cross_entropy(reference(images), labels, label_smoothing=0.3).backward()
    loss, log_probs = train.train_step(net, images, labels, make_optimizers(net, **USUAL), OFF, torch.float32, 0.3)
    for ours, expected in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-3, atol=1e-6)
    assert loss.item() == pytest.approx(F.nll_loss(log_probs, labels, reduction="sum").item())


def test_decay_smoothing_and_augmentation_of_the_settings_count(s8):
    usual = {"epochs": 1, "label_smoothing": 0}
    runs = {
        "usual": {},
        "decayed": {"muon_weight_decay": 10},
        "smoothed": {"label_smoothing": 0.5},
        "still": {"shift_scale_rotate_probability": 0},
        "whole": {"coarse_dropout_probability": 0},
    }
    for name, settings in runs.items():
        settings = {**usual, **settings, "run_dir": name}
        flags = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        assert s8(*flags) == 0
    losses = {load_checkpoint(f"{name}/last.pt")["metrics"][0]["valid_loss"] for name in runs}
    assert len(losses) == len(runs)


@pytest.mark.parametrize("muon", [0.0, 0.5], ids=["SGD", "Muon"])
def test_each_step_has_its_part_of_the_learning_rates(uneven, muon):
    net = Net()
    before = [p.clone() for p in net.parameters()]
    optimizers = make_optimizers(net, **{**USUAL, "learning_rate": 2.0}, muon_learning_rate=muon)
    train.train_one_epoch(net, uneven, optimizers, OFF, [0.0, 0.0, 0.0], CPU, torch.float32)
    assert all(map(torch.equal, before, net.parameters()))
    train.train_one_epoch(net, uneven, optimizers, OFF, [0.0, 0.0, 0.1], CPU, torch.float32)
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == ([0.05, 0.2] if muon else [0.2])
    assert not any(map(torch.equal, before, net.parameters()))


def test_nothing_waits_for_the_device_at_each_step(uneven, monkeypatch):
    """What would make the host wait for an accelerator happens in Meter.result alone: a few times a second."""
    waiting = []
    result = Meter.result

    def allowed(meter):
        with monkeypatch.context() as patch:
            for name, original in originals.items():
                patch.setattr(torch.Tensor, name, original)
            return result(meter)

    names = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")
    originals = {name: getattr(torch.Tensor, name) for name in names}
    monkeypatch.setattr(Meter, "result", allowed)
    batches = list(uneven)
    net = Net()
    optimizers = make_optimizers(net, **USUAL, muon_learning_rate=0.1)
    for name, original in originals.items():
        monkeypatch.setattr(torch.Tensor, name, lambda *a, name=name, f=original: waiting.append(name) or f(*a))
    train.train_one_epoch(net, batches, optimizers, OFF, [0.1] * 3, CPU, torch.float32)
    train.validate(net, batches, CPU, torch.float32)
    assert waiting == []
    assert torch.ones(1).item() == 1
    assert waiting == ["item"]  # the trap works


@pytest.mark.parametrize("muon", [0.0, 1.0], ids=["SGD", "Muon"])
def test_it_learns(uneven, muon):
    torch.manual_seed(0)
    net = Net()
    optimizers = make_optimizers(net, **USUAL, muon_learning_rate=muon)
    batches = list(uneven)[:1]
    losses = [
        train.train_one_epoch(net, batches, optimizers, OFF, [0.02], CPU, torch.float32)["loss"] for _ in range(40)
    ]
    assert losses[-1] < 0.5 < 2 < losses[0]


# --- what is shown ---


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bars_have_the_specifications_form(uneven, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(
        utils.tqdm, "__init__", lambda bar, *a, f=utils.tqdm.__init__, **k: f(bar, *a, file=sys.stderr, **k)
    )
    monkeypatch.setenv("COLUMNS", "120")
    train.validate(Net(), uneven, CPU, torch.float32, "Epoch 1/30 - Validation")
    last = sys.stderr.getvalue().split("\r")[-1]
    assert re.match(
        r"Epoch 1/30 - Validation: 100%\|.*\| 3/3 \[\d\d:\d\d<00:00, .*it/s, accuracy=\d+\.\d{3}, loss=\d\.\d{4}\]",
        last,
    )


# --- what can go wrong ---


def test_loss_that_is_not_finite_stops_the_run(s8, refusal):
    code = s8(
        "--epochs", "3", "--run-dir", "run", "--learning-rate", "1000", "--schedule", "constant", "--dropout", "0.9"
    )
    assert code == 1
    assert re.search(
        r"Epoch \d/3 - (Training|Validation): the loss is (nan|inf) at step \d+; a new run needs a lower "
        r"--learning-rate or --muon-learning-rate; (no epoch is finished yet|epoch \d is saved)$",
        refusal().strip(),
    )


def test_the_first_loss_that_is_not_finite_is_found(uneven):
    meter = Meter("Epoch 3/9 - Training", 3, CPU)
    for loss in (1.0, float("nan"), float("inf")):
        meter.update(torch.tensor(loss), torch.zeros(4, 10), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(NonFiniteLoss, match="Epoch 3/9 - Training: the loss is nan at step 2"):
        list(with_progress([], meter))


def test_run_dir_that_holds_a_run_is_kept(s8, capsys, refusal):
    assert s8("--epochs", "1", "--run-dir", "run") == 0
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    capsys.readouterr()
    assert s8("--epochs", "1", "--run-dir", "run", "--seed", "1") == 2
    assert "run_dir run holds a run already" in refusal()
    assert before == {path.name: path.read_bytes() for path in Path("run").iterdir()}


def test_run_dir_that_cannot_be_written(s8, refusal):
    Path("file").touch()
    assert s8("--run-dir", "file/run") == 2
    assert "run_dir file/run cannot be written" in refusal()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--device", "cud"], "device 'cud'"),
        (["--device", "cuda:99"], "device 'cuda:99'"),
        (["--device", "cpu", "--precision", "float16"], "float16 needs a CUDA device"),
        (["--valid-split", "0.001"], "valid_split"),
        (["--epochs", "0"], "epochs must be between 1"),
    ],
)
def test_wrong_setting_leaves_nothing_behind(s8, argv, words, refusal, tmp_path):
    assert s8(*argv) == 2
    assert words in refusal()
    assert os.listdir(tmp_path) == []
