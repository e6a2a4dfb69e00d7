import csv
import json
import os
import re
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import train
from config import RunStopped, config
from extras.sources import SHAPES
from model import Net
from tests.conftest import equal, flags, outcome
from train import epoch_factors, make_optimizers, schedule_factor, train_one_epoch, train_step, validate
from utils import load_checkpoint


@pytest.fixture
def loader():
    """Three batches of 20, 20 and 3 images, always in the same order."""
    rng = torch.Generator().manual_seed(0)
    images, labels = torch.randn(43, 3, 32, 32, generator=rng), torch.randint(10, (43,), generator=rng)
    return DataLoader(TensorDataset(images, labels), batch_size=20)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


# --- optimizers ---


def test_recipe_of_the_default_settings(net):
    muon, sgd = make_optimizers(net, config)
    assert [(group["lr"], group["weight_decay"]) for group in muon.param_groups] == [(0.02, 0.05)]
    assert [group["lr"] for group in sgd.param_groups] == pytest.approx([0.2, 0.2])
    assert [group["weight_decay"] for group in sgd.param_groups] == pytest.approx([5e-4, 0])
    assert [(group["momentum"], group["nesterov"]) for group in sgd.param_groups] == [(0.9, True)] * 2


def test_muon_has_the_weights_that_mix_channels_and_sgd_the_rest(net):
    names = {weight: name for name, weight in net.named_parameters()}
    muon, sgd = make_optimizers(net, config)
    (mixing,), (decayed, spared) = ([group["params"] for group in each.param_groups] for each in (muon, sgd))
    assert {names[weight] for weight in decayed} == {"blocks.1.0.weight", "blocks.2.0.weight", "classifier.weight"}
    assert all(weight.ndim == 1 for weight in spared)
    assert sum(weight.numel() for weight in mixing) == 138_666 - 2_042
    assert sum(weight.numel() for weight in decayed + spared) == 2_042


def test_sgd_alone_has_all_weights_and_the_learning_rate_itself(net):
    (sgd,) = make_optimizers(net, replace(config, optimizer="sgd", learning_rate=0.3))
    assert [group["lr"] for group in sgd.param_groups] == [0.3, 0.3]
    assert sum(weight.numel() for group in sgd.param_groups for weight in group["params"]) == 138_666


@pytest.mark.parametrize("optimizer", ["muon", "sgd"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_step_shrinks_convolutions_by_rate_times_decay_whoever_moves_them(optimizer, nesterov):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).double()  # rounding would add up
    settings = {"learning_rate": 0.01, "weight_decay": 0.1, "momentum": 0.8, "nesterov": nesterov}
    optimizers = make_optimizers(net, replace(config, optimizer=optimizer, **settings))
    for _ in range(100):  # SGD's momentum needs some steps to add up
        before = [p.detach().clone() for p in net.parameters()]
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        for each in optimizers:
            each.step()
    for p, old in zip(net.parameters(), before, strict=True):
        shrinks = p.ndim > 1  # biases and BatchNorm are spared
        torch.testing.assert_close(p.detach(), old * (1 - 0.01 * 0.1) if shrinks else old, rtol=1e-5, atol=0)


# --- schedules ---


def test_schedules():
    def factors(schedule, accuracies=()):
        return [schedule_factor(schedule, progress, accuracies) for progress in (0, 0.1, 0.2, 0.6, 1)]

    assert factors("onecycle") == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert factors("cosine") == pytest.approx([1, 0.9755283, 0.9045085, 0.3454915, 0], abs=1e-6)
    assert factors("constant") == [1] * 5
    published = [83.28, 83.09, 82.68]  # epochs 22 to 24 of the specification's log: the rate fell at epoch 25
    assert factors("plateau", published[:2]) == [1] * 5
    assert factors("plateau", published) == [0.1] * 5


def test_plateau_is_torchs():
    rng = np.random.default_rng(0)
    accuracies = (rng.integers(0, 20, 60).cumsum() * 0.2 + rng.normal(0, 9, 60)).tolist()
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    options = {"mode": "max", "factor": 0.1, "patience": 1, "threshold": 0, "eps": 0}
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **options)
    for epoch, accuracy in enumerate(accuracies, start=1):
        scheduler.step(accuracy)
        ours = schedule_factor("plateau", 0.5, accuracies[:epoch])
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"])


def test_factors_of_all_epochs_are_one_curve_and_never_zero():
    settings = replace(config, epochs=4, schedule="cosine")
    factors = [factor for epoch in (1, 2, 3, 4) for factor in epoch_factors(settings, epoch, steps=5)]
    assert factors == epoch_factors(replace(settings, epochs=1), epoch=1, steps=20)
    assert all(1 > factor > later > 0 for factor, later in pairwise(factors))


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


def test_validation_averages_are_over_images_and_change_nothing(net, loader):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    images, labels = loader.dataset.tensors
    with torch.no_grad():
        log_probs = net.eval()(images)
    result = validate(net.train(), loader)
    assert result["loss"] == pytest.approx(F.nll_loss(log_probs, labels).item(), rel=1e-5)
    assert result["accuracy"] == pytest.approx(100 * (log_probs.argmax(1) == labels).float().mean().item())
    assert equal(before, dict(net.state_dict()))


def test_training_averages_are_over_images(net, loader):
    log_probs = torch.cat([net(images) for images, _ in loader])  # BatchNorm's statistics are each batch's
    labels = loader.dataset.tensors[1]
    result = train_one_epoch(net, loader, make_optimizers(net, config), factors=[0, 0, 0])
    assert result["loss"] == pytest.approx(F.nll_loss(log_probs, labels).item(), rel=1e-5)
    assert result["accuracy"] == pytest.approx(100 * (log_probs.argmax(1) == labels).float().mean().item())


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


def test_network_and_optimizer_of_your_own(loader):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10), nn.LogSoftmax(dim=1))
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    first = validate(net, loader)
    for _ in range(5):
        train_one_epoch(net, loader, [adam])
    assert adam.param_groups[0]["lr"] == 1e-3
    assert validate(net, loader)["loss"] < first["loss"] / 2


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


@pytest.mark.parametrize("look", [0.0, 1.0], ids=["at the end", "at each step"])
def test_loss_that_is_not_finite_ends_training_with_the_step_that_had_it(monkeypatch, loader, look):
    clock = iter(np.arange(100) * look)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10), nn.LogSoftmax(dim=1))
    loader.dataset.tensors[0][25] = float("inf")  # in the second batch
    steps = []
    net.register_forward_hook(lambda *args: steps.append(1))
    with pytest.raises(RunStopped, match="Epoch 3/9: the loss is nan at step 2; a new run needs a lower --learning"):
        train_one_epoch(net, loader, [torch.optim.SGD(net.parameters(), 0.1)], description="Epoch 3/9")
    assert len(steps) == (2 if look else 3)


# --- a whole run ---


def test_run_prints_the_specifications_log_and_leaves_its_files(cli, tiny, capsys):
    assert cli(*flags(tiny, run_dir="run"), "--no-report") == 0
    out, err = capsys.readouterr()
    assert err == ""  # no terminal, no bars
    assert re.search(r"^Device: cpu \(\d+ threads\), precision float32, 0 workers\.\nRun: run$", out, re.MULTILINE)
    assert "Total params: 138,666" in out
    number = r"(\d+\.\d{4})"
    losses = [rf"{name} Loss: {number}, {name} Acc: {number}\n" for name in ("Train", "Valid")]
    printed = re.findall(rf"\nEpoch (\d)/2 Summary:\n{losses[0]}{losses[1]}", out)
    assert [row[0] for row in printed] == ["1", "2"]

    assert sorted(os.listdir("run")) == [".lock", "best.pt", "config.json", "last.pt", "metrics.csv"]
    with open("run/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    columns = ["epoch", "learning_rate", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy"]
    for row, values in zip(rows, printed, strict=True):
        assert list(row) == columns
        assert [f"{float(row[name]):.4f}" for name in columns[2:]] == list(values[1:])
    # That of config.learning_rate at the last of five steps: the middle of steps 5 and 10 of 10, of which 2 lead up.
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx([0.02 * 5.5 / 8, 0.02 * 0.5 / 8])

    with open("run/config.json") as file:
        recorded = json.load(file)
    assert (recorded["dataset"], recorded["device"], recorded["epochs"]) == ("folder", "cpu", 2)
    last = load_checkpoint("run/last.pt")
    assert (last["epoch"], last["config"], last["class_names"]) == (2, recorded, sorted(SHAPES))
    assert [{name: str(value) for name, value in row.items()} for row in last["metrics"]] == rows
    best = max(last["metrics"], key=lambda row: row["valid_accuracy"])
    assert f"Best Valid Acc: {best['valid_accuracy']:.4f} (epoch {best['epoch']}). Results are in run." in out
    assert load_checkpoint("run/best.pt")["epoch"] == best["epoch"]


def test_same_seed_same_run_with_workers_and_without_pictures(finished, tiny, tmp_path):
    train.main(replace(tiny, run_dir=str(tmp_path / "run"), num_workers=2), report=False)
    assert equal(outcome(tmp_path / "run"), outcome(finished))


def test_settings_reach_the_training(cli, tiny, narrow):
    changes = [{}, {"seed": 1}, {"label_smoothing": 0.0}, {"dropout": 0.2}, {"precision": "bfloat16"}]
    losses = set()
    for number, change in enumerate(changes):
        assert cli(*flags(tiny, epochs=1, **change, run_dir=f"run {number}"), "--no-report") == 0
        losses.add(load_checkpoint(f"run {number}/last.pt")["metrics"][0]["train_loss"])
    assert len(losses) == len(changes)


def test_each_epoch_has_images_and_dropout_of_its_own(cli, tiny, narrow, monkeypatch):
    seen, make = [], train.Net

    def watched(**options):
        net = make(**options)
        net.register_forward_pre_hook(lambda net, args: seen.append((args[0].mean().item(), torch.initial_seed())))
        return net

    monkeypatch.setattr(train, "Net", watched)
    assert cli(*flags(tiny, run_dir="run"), "--no-report") == 0
    first, second = seen[-14:-7], seen[-7:]  # five steps and two batches of validation in each epoch
    assert len({mean for mean, seed in first[:5] + second[:5]}) == 10
    assert [mean for mean, seed in first[5:]] == [mean for mean, seed in second[5:]]
    assert len({seed for mean, seed in first}) == len({seed for mean, seed in second}) == 1
    assert first[0][1] != second[0][1]


def test_default_run_dir_is_a_new_dated_one(cli, tiny, narrow, tmp_path):
    assert cli(*flags(tiny, epochs=1), "--no-report") == 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", os.listdir(tmp_path / "runs")[0])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--device", "cud"], "device 'cud' cannot be used here"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["--device", "cpu", "--precision", "float16"], "float16 needs a CUDA device"),
        (["--epochs", "0"], "epochs must be between 1"),
        (["--dataset", "shapes", "--valid-split", "0.001"], "valid_split"),
    ],
)
def test_wrong_setting_leaves_nothing_behind(cli, argv, words, refusal, tmp_path):
    assert cli(*argv) == 2
    assert words in refusal()
    assert os.listdir(tmp_path) == []
