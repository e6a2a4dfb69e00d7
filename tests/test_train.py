"""The loop: a step, an epoch, a whole run; what moves the weights, and how fast."""

import copy
import csv
import functools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import train
from config import UsageError, config
from model import Net
from tests.conftest import equal, flags
from tools.evaluate import evaluate
from tools.predict import predict
from tools.report import report
from train import epoch_factors, make_optimizers, schedule_factor, train_one_epoch, train_step, validate
from utils import load_checkpoint


@pytest.fixture
def loader():
    """Three batches of 20, 20 and 3 images: a loader is any iterable with a length."""
    rng = torch.Generator().manual_seed(0)
    images, labels = torch.randn(43, 3, 32, 32, generator=rng), torch.randint(10, (43,), generator=rng)
    return list(zip(images.split(20), labels.split(20), strict=True))


def test_first_losses_are_what_they_always_were(net, loader, tiny):
    optimizers, batches = make_optimizers(net, tiny), [*loader[:2], *loader[:2]]
    losses = [train_step(net, *batch, optimizers, label_smoothing=0.1)[0].item() for batch in batches]
    assert losses == pytest.approx([2.3476, 2.3361, 2.0588, 2.0199], abs=5e-3)


def test_step_follows_smoothed_labels_and_returns_the_loss_without(net, loader):
    (images, labels), reference = loader[0], copy.deepcopy(net)
    outputs = reference(images)
    F.cross_entropy(outputs, labels, label_smoothing=0.3).backward()
    loss, log_probs = train_step(net, images, labels, make_optimizers(net, config), label_smoothing=0.3)
    for ours, expected in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-3, atol=1e-6)
    assert loss.item() == pytest.approx(F.cross_entropy(outputs, labels).item())
    torch.testing.assert_close(log_probs, outputs.detach())


def test_network_optimizer_and_schedule_of_your_own_with_logits_or_log_probabilities(loader):
    results = []
    for last in (nn.Identity(), nn.LogSoftmax(dim=1)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10), last)
        adam, first = torch.optim.Adam(net.parameters(), lr=1e-3), validate(net, loader)["loss"]
        schedule = torch.optim.lr_scheduler.StepLR(adam, 1)
        for _ in range(3):
            train_one_epoch(net, loader, [adam])
            schedule.step()
        results.append([validate(net, loader)["loss"], adam.param_groups[0]["lr"]])
    assert results[0] == pytest.approx([results[1][0], 1e-6], rel=1e-3)
    assert results[0][0] < 0.7 * first


def test_averages_are_over_images_and_validation_changes_nothing(net, loader):
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))

    def averages(result, log_probs):
        loss, hits = F.nll_loss(log_probs, labels).item(), (log_probs.argmax(1) == labels).float()
        return [result["loss"], result["accuracy"]] == pytest.approx([loss, 100 * hits.mean().item()], rel=1e-5)

    log_probs = torch.cat([net(batch) for batch, _ in loader])  # BatchNorm's statistics are each batch's
    assert averages(train_one_epoch(net, loader, make_optimizers(net, config), factors=[0, 0, 0]), log_probs)
    before = copy.deepcopy(net.state_dict())
    result = validate(net, loader)
    assert averages(result, net.eval()(images))
    assert torch.equal(result["right"], (net(images).argmax(1) == labels).to(torch.uint8))  # image by image
    assert equal(net.state_dict(), before)


def test_muon_moves_what_mixes_channels_and_sgd_the_rest(net, tiny):
    net.blocks[0].requires_grad_(False)
    net.scale = nn.Parameter(torch.ones(()))
    names = {weight: name for name, weight in net.named_parameters()}
    (mixing,), (decayed, spared) = (optimizer.param_groups for optimizer in make_optimizers(net, tiny))
    assert (mixing["lr"], mixing["weight_decay"], mixing["momentum"]) == (0.02, 0.05, 0.95)
    for group, decay in ((decayed, 5e-4), (spared, 0)):
        assert [group[name] for name in ("lr", "weight_decay", "momentum", "nesterov")] == [0.2, decay, 0.9, True]
    assert all(weight.ndim < 2 for weight in spared["params"])
    moved = [names.pop(weight) for group in (mixing, decayed, spared) for weight in group["params"]]
    assert names == {}  # each is moved by one of them: a second pop would fail
    # Not the frozen ones, the depthwise and the classifier.
    places = ["1.1", "1.4", "1.7", "2.1", "2.4", "2.7", "3.0", "3.3", "3.6"]
    assert moved[: len(mixing["params"])] == [f"blocks.{place}.weight" for place in places]


def test_sgd_alone_is_torchs_with_torchs_decay_but_for_biases_and_batchnorm(net, loader):
    settings = {"momentum": 0.8, "nesterov": False}
    theirs, (images, labels) = copy.deepcopy(net), loader[0]
    decayed, spared = ([p for p in theirs.parameters() if (p.ndim > 1) is many] for many in (True, False))
    reference = torch.optim.SGD([{"params": decayed, "weight_decay": 0.5}, {"params": spared}], 0.01, **settings)
    ours = make_optimizers(net, replace(config, optimizer="sgd", learning_rate=0.01, sgd_weight_decay=0.5, **settings))
    for _ in range(3):
        train_step(net, images, labels, ours)
        train_step(theirs, images, labels, [reference])
    torch.testing.assert_close(net.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [("onecycle", [0, 0.5, 1, 0.5, 0]), ("cosine", [1, 0.9755, 0.9045, 0.3455, 0]), ("constant", [1, 1, 1, 1, 1])],
)
def test_schedule_goes_up_and_down_and_is_one_curve_over_all_epochs(schedule, factors):
    assert [schedule_factor(schedule, done) for done in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx(factors, abs=1e-4)
    settings = replace(config, epochs=4, schedule=schedule)
    curve = [factor for epoch in (1, 2, 3, 4) for factor in epoch_factors(settings, epoch, steps=5)]
    assert curve == epoch_factors(replace(settings, epochs=1), epoch=1, steps=20)
    assert min(curve) > 0


def test_run_prints_the_specifications_log_and_leaves_its_numbers_in_a_new_folder(cli, tiny, capsys):
    assert cli(*flags(tiny), "--no-report") == 0
    out, err = capsys.readouterr()
    assert err == ""  # no terminal, no bars
    run = Path(re.search(r"^Run: (runs/[\d-]{10}_[\d-]{8}\.\d{6})$", out, re.MULTILINE)[1])
    assert {path.name for path in run.iterdir()} == {"last.pt", "best.pt", "config.json", "metrics.csv"}
    assert "Total params: 138,666" in out
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    for row in rows:
        epoch, _, *losses, seconds, speed = map(float, row.values())
        a, b, c, d = (f"{number:.4f}" for number in losses)
        told = f"\nEpoch {epoch:.0f}/2 Summary:\nTrain Loss: {a}, Train Acc: {b}\nValid Loss: {c}, Valid Acc: {d}\n"
        assert f"{told}Time: {seconds:.1f} s, {speed:,.0f} images/s (" in out
    # That of config.learning_rate at the last of five steps: the middle of steps 5 and 10 of 10, of which 2 lead up.
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx([0.02 * 5.5 / 8, 0.02 * 0.5 / 8])
    best = max(load_checkpoint(run / "last.pt")["metrics"], key=lambda row: row["valid_accuracy"])
    end = f"Best Valid Acc: {best['valid_accuracy']:.4f} (epoch {best['epoch']}). Results are in {run}."
    assert out.splitlines()[-1] == end  # the test images chose the epoch: they test nothing any more


def test_settings_reach_the_training(cli, tiny, narrow, capsys):
    changes = [{}, {"seed": 1}, {"label_smoothing": 0.0}, {"dropout": 0.2}, {"precision": "bfloat16"}]
    changes += [{"optimizer": "sgd"}, {"learning_rate": 0.1}, {"schedule": "cosine"}, {"weight_decay": 1.0}]
    changes += [{"sgd_weight_decay": 0.5}, {"momentum": 0.5}, {"nesterov": False}, {"batch_size": 150}]
    losses = set()
    for number, change in enumerate(changes):
        assert cli(*flags(tiny, epochs=1, **change, run_dir=f"run {number}"), "--no-report") == 0
        losses.add(load_checkpoint(f"run {number}/last.pt")["metrics"][0]["train_loss"])
    assert len(losses) == len(changes)
    assert "An epoch is one step: a smaller --batch-size learns faster." in capsys.readouterr().out  # all 150 images


def test_plateau_is_torchs_by_the_validation(cli, tiny, narrow, monkeypatch):
    accuracies = [10.0, 20, 20, 15, 30, 29, 31, 31, 29, 30, 32, 32, 32, 32]
    sgd, results = torch.optim.SGD([torch.zeros(1)], lr=0.02), iter(accuracies)
    options = {"mode": "max", "factor": 0.1, "patience": 1, "threshold": 0, "eps": 0}
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(sgd, **options)
    numbers = {"loss": 1.0, "accuracy": 50.0, "seconds": 1.0, "images_per_second": 1.0, "waited": 0.0, "right": None}
    monkeypatch.setattr(train, "train_one_epoch", lambda *args: numbers)
    monkeypatch.setattr(train, "validate", lambda *args: {**numbers, "accuracy": next(results)})
    assert cli(*flags(tiny, schedule="plateau", learning_rate=0.02, epochs=14, run_dir="run"), "--no-report") == 0
    for row, accuracy in zip(load_checkpoint("run/last.pt")["metrics"], accuracies, strict=True):
        assert row["learning_rate"] == pytest.approx(sgd.param_groups[0]["lr"])
        scheduler.step(accuracy)


def test_each_epoch_has_images_and_dropout_of_its_own(cli, tiny, narrow, monkeypatch):
    seen = []

    def watched(net, images, *args, **options):
        seen.append((images.mean().item(), torch.initial_seed()))
        return train_step(net, images, *args, **options)

    monkeypatch.setattr(train, "train_step", watched)
    assert cli(*flags(tiny, run_dir="run"), "--no-report") == 0
    means, seeds = zip(*seen, strict=True)
    assert len(means) == len(set(means)) == 10  # five steps, twice
    assert [len(set(seeds[:5])), len(set(seeds[5:])), len(set(seeds))] == [1, 1, 2]


def test_network_that_returns_probabilities_is_refused(loader):
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 14), nn.Softmax(dim=1))
    nn.init.zeros_(net[1].weight), nn.init.zeros_(net[1].bias)  # 14 times 1/14 is 0.998 in bfloat16
    step = functools.partial(train_step, dtype=torch.bfloat16)
    with pytest.raises(UsageError, match="the network returns probabilities"):
        train_one_epoch(net, loader, make_optimizers(net, config), step=step)


def linear(num_classes, dropout):
    """A network of your own, for images of 40x40 pixels."""
    return nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(3 * 40 * 40, num_classes))


def tuned(num_classes, dropout):
    net = Net(base_channels=2, num_classes=7, dropout=dropout)
    net.classifier = nn.Conv2d(4, num_classes, 1)
    return net


@pytest.mark.parametrize(("net", "size", "activation"), [(linear, 40, "silu"), (tuned, 32, "relu")])
def test_network_of_your_own_trains_resumes_and_is_judged(net, size, activation, tiny, tmp_path, capsys):
    settings = replace(tiny, run_dir=str(tmp_path), schedule="constant", image_size=size)
    train.main(settings, net=net)
    assert [row["epoch"] for row in train.main(replace(settings, epochs=3), resume=True, net=net)] == [1, 2, 3]
    assert load_checkpoint(tmp_path / "last.pt")["config"]["activation"] == activation  # the network's, if it has one
    evaluate(tmp_path, net=net)
    report(tmp_path, net=net)
    assert "warning" not in capsys.readouterr().err  # each picture is drawn, of a network without blocks too
    assert (tmp_path / "report.md").read_text().startswith("# folder: ")
    (said,) = predict(tmp_path, [np.zeros((50, 50, 3), dtype=np.uint8)], net=net)
    assert sum(said.probabilities.values()) == pytest.approx(1)
    if size != 32:
        with pytest.raises(UsageError, match="trained on 40x40 pixels: these images have 32"):
            evaluate(tmp_path, dataset="shapes", net=net)
