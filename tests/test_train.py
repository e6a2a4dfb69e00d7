import copy
import csv
import json
import re
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from extras import predict
from extras.failures import RunStopped
from extras.sources import SHAPES
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import train
import utils
from config import config
from model import Net
from tests.conftest import equal, flags
from train import make_optimizers, train_one_epoch, train_step, validate
from utils import load_checkpoint


@pytest.fixture
def loader():
    """Three batches of 20, 20 and 3 images, always in the same order."""
    rng = torch.Generator().manual_seed(0)
    images, labels = torch.randn(43, 3, 32, 32, generator=rng), torch.randint(10, (43,), generator=rng)
    return DataLoader(TensorDataset(images, labels), batch_size=20)


# --- the loop ---


def test_step_follows_smoothed_labels_and_reports_the_loss_without(net, loader):
    images, labels = next(iter(loader))
    reference = Net()
    reference.load_state_dict(net.state_dict())
    F.cross_entropy(reference(images), labels, label_smoothing=0.3).backward()
    loss, log_probs = train_step(net, images, labels, make_optimizers(net, config), label_smoothing=0.3)
    for ours, expected in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-3, atol=1e-6)
    assert loss.item() == pytest.approx(F.nll_loss(log_probs, labels).item())


def averages(log_probs, labels):
    loss, hits = F.nll_loss(log_probs, labels), (log_probs.argmax(1) == labels).float()
    return pytest.approx({"loss": loss.item(), "accuracy": 100 * hits.mean().item()}, rel=1e-5)


def test_validation_averages_are_over_images_and_change_nothing(net, loader):
    before = copy.deepcopy(dict(net.state_dict()))
    images, labels = loader.dataset.tensors
    assert validate(net, loader) == averages(net.eval()(images), labels)
    assert equal(before, dict(net.state_dict()))


def test_training_averages_are_over_images(net, loader):
    log_probs = torch.cat([net(images) for images, _ in loader])  # BatchNorm's statistics are each batch's
    result = train_one_epoch(net, loader, make_optimizers(net, config), factors=[0, 0, 0])
    assert result == averages(log_probs, loader.dataset.tensors[1])


@pytest.mark.parametrize("optimizer", ["muon", "sgd"])
def test_each_step_has_its_part_of_the_learning_rates(net, loader, optimizer):
    before = [p.clone() for p in net.parameters()]
    optimizers = make_optimizers(net, replace(config, optimizer=optimizer, learning_rate=2.0))
    train_one_epoch(net, loader, optimizers, factors=[0, 0, 0])
    assert all(map(torch.equal, before, net.parameters()))
    train_one_epoch(net, loader, optimizers, factors=[0, 0, 0.1])  # a part of 2.0, not of the 0 that was set above
    rates = [each.param_groups[0]["lr"] for each in optimizers]
    assert rates == pytest.approx([0.2, 2.0] if optimizer == "muon" else [0.2])
    assert not any(map(torch.equal, before, net.parameters()))


@pytest.mark.parametrize("optimizer", ["muon", "sgd"])
def test_it_learns(net, loader, optimizer):
    images, labels = next(iter(loader))
    optimizers = make_optimizers(net, replace(config, optimizer=optimizer))
    losses = [train_step(net, images[:10], labels[:10], optimizers)[0].item() for _ in range(20)]
    assert losses[-1] < 0.5 < 2 < losses[0]


class OwnNet(nn.Module):
    """A network as people write them: it counts, uses a layer twice, drops values by a function."""

    def __init__(self, num_classes, dropout):
        super().__init__()
        self.dropout, self.calls = dropout, 0
        self.conv, self.relu = nn.Conv2d(3, 8, 3, stride=4), nn.ReLU()
        self.hidden, self.last = nn.Linear(8, 8), nn.Linear(8, num_classes)

    def forward(self, x):
        self.calls += 1
        x = F.dropout(self.relu(self.conv(x)), self.dropout, self.training).mean(dim=(2, 3))
        return F.log_softmax(self.last(self.relu(self.hidden(x))), dim=1)


def test_network_of_your_own_lives_as_ours_does(cli, tiny, monkeypatch, capsys):
    convolutions = set()

    def watched(*args):
        convolutions.add(torch.backends.cudnn.conv.fp32_precision)
        return utils.forward(*args)

    for module in (train, predict):
        monkeypatch.setattr(module, "Net", OwnNet)
        monkeypatch.setattr(module, "forward", watched)
    assert cli(*flags(tiny, precision="bfloat16", run_dir="run")) == 0
    accuracy = load_checkpoint("run/last.pt")["metrics"][-1]["valid_accuracy"]
    assert cli("--resume", "run") == 0
    assert cli("--evaluate", "run", "--precision", "bfloat16") == 0
    out, err = capsys.readouterr()
    assert f"Test Acc: {accuracy:.4f}" in out
    assert err == ""
    assert convolutions == {"ieee"}  # float32 is no TF32 on CUDA


def test_network_and_optimizer_of_your_own(loader):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10), nn.LogSoftmax(dim=1))
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    first = validate(net, loader)
    for _ in range(5):
        train_one_epoch(net, loader, [adam])
    assert adam.param_groups[0]["lr"] == 1e-3
    assert validate(net, loader)["loss"] < first["loss"] / 2


def test_rates_of_your_own_schedule_stay(net, loader):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    schedule, seen = torch.optim.lr_scheduler.StepLR(optimizer, 1), []
    for _ in range(3):
        train_one_epoch(net, loader, [optimizer])
        seen.append(optimizer.param_groups[0]["lr"])
        schedule.step()
    assert seen == pytest.approx([0.1, 0.01, 0.001])


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for an accelerator: that a tensor's value becomes Python's."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device(net, monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)  # the bar is looked at by the clock: at the end only, here
    optimizers, counts = make_optimizers(net, config), []
    for batches in (1, 3):
        loader = [(torch.randn(4, 3, 32, 32), torch.arange(4))] * batches
        with Waits() as waits:
            train_one_epoch(net, loader, optimizers)
            validate(net, loader)
        counts.append(waits.count)
    assert 0 < counts[0] == counts[1]


def test_loss_that_is_not_finite_ends_training_soon(monkeypatch, net, loader):
    monkeypatch.setattr(time, "monotonic", count().__next__)  # each step takes a second
    loader.dataset.tensors[0][25] = float("inf")  # in the second of three batches
    steps = []
    net.register_forward_hook(lambda *args: steps.append(1))
    with pytest.raises(RunStopped, match="Epoch 3/9: the loss is nan at step 2; a new run needs a lower --learning"):
        train_one_epoch(net, loader, make_optimizers(net, config), description="Epoch 3/9")
    assert len(steps) == 2


# --- a whole run ---


def test_run_prints_the_specifications_log_and_leaves_its_files_in_a_new_folder(cli, tiny, capsys):
    assert cli(*flags(tiny), "--no-report") == 0
    out, err = capsys.readouterr()
    assert err == ""  # no terminal, no bars
    told = r"^Device: cpu \(\d+ threads\), precision float32, 0 workers\.\nRun: (runs/[\d-]{10}_[\d-]{8}\.\d{6})$"
    run = Path(re.search(told, out, re.MULTILINE)[1])
    assert "Total params: 138,666" in out
    columns, *rows = csv.reader((run / "metrics.csv").read_text().splitlines())
    assert columns == ["epoch", "learning_rate", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy"]
    for epoch, _, *numbers in rows:
        a, b, c, d = (f"{float(number):.4f}" for number in numbers)
        assert f"\nEpoch {epoch}/2 Summary:\nTrain Loss: {a}, Train Acc: {b}\nValid Loss: {c}, Valid Acc: {d}\n" in out
    # That of config.learning_rate at the last of five steps: the middle of steps 5 and 10 of 10, of which 2 lead up.
    assert [float(row[1]) for row in rows] == pytest.approx([0.02 * 5.5 / 8, 0.02 * 0.5 / 8])

    last, recorded = load_checkpoint(run / "last.pt"), json.loads((run / "config.json").read_text())
    assert (recorded["dataset"], recorded["device"], recorded["epochs"]) == ("folder", "cpu", 2)
    assert (last["epoch"], last["config"], last["class_names"]) == (2, recorded, sorted(SHAPES))
    assert [[str(value) for value in row.values()] for row in last["metrics"]] == rows
    best = max(last["metrics"], key=lambda row: row["valid_accuracy"])
    end = f"Best Valid Acc: {best['valid_accuracy']:.4f} (epoch {best['epoch']}). Results are in {run}."
    assert out.splitlines()[-1] == end  # the test images chose the epoch: they test nothing any more
    assert load_checkpoint(run / "best.pt")["epoch"] == best["epoch"]


def test_settings_reach_the_training(cli, tiny, narrow):
    changes = [{}, {"seed": 1}, {"label_smoothing": 0.0}, {"dropout": 0.2}, {"precision": "bfloat16"}]
    changes += [{"optimizer": "sgd"}, {"learning_rate": 0.1}, {"schedule": "cosine"}, {"weight_decay": 1.0}]
    changes += [{"momentum": 0.5}, {"nesterov": False}, {"batch_size": 30}]
    losses = set()
    for number, change in enumerate(changes):
        assert cli(*flags(tiny, epochs=1, **change, run_dir=f"run {number}"), "--no-report") == 0
        losses.add(load_checkpoint(f"run {number}/last.pt")["metrics"][0]["train_loss"])
    assert len(losses) == len(changes)


def test_plateau_follows_the_validation(cli, tiny, narrow, monkeypatch):
    monkeypatch.setattr(train, "validate", lambda *args: {"loss": 1.0, "accuracy": 50.0})
    argv = flags(tiny, schedule="plateau", learning_rate=0.02, epochs=4, run_dir="run")
    assert cli(*argv, "--no-report") == 0
    rates = [row["learning_rate"] for row in load_checkpoint("run/last.pt")["metrics"]]
    assert rates == pytest.approx([0.02, 0.02, 0.02, 0.002])


def test_each_epoch_has_images_and_dropout_of_its_own(cli, tiny, narrow, monkeypatch):
    seen, forward = [], Net.forward

    def watched(net, x):
        seen.append((x.mean().item(), torch.initial_seed()))
        return forward(net, x)

    monkeypatch.setattr(Net, "forward", watched)
    assert cli(*flags(tiny, run_dir="run"), "--no-report") == 0
    means, seeds = zip(*seen[1:15], strict=True)  # after the summary: five steps and two batches of validation, twice
    assert len({*means[:5], *means[7:12]}) == 10
    assert means[5:7] == means[12:]
    assert len({*seeds[:7]}) == len({*seeds[7:]}) == 1
    assert seeds[0] != seeds[7]
