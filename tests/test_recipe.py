"""What moves the weights, and how fast: make_optimizers and the schedules of train.py."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from config import config
from tests.conftest import RECIPE
from train import epoch_factors, make_optimizers, schedule_factor

# --- optimizers ---


def test_what_each_optimizer_moves_and_how(net):
    names = {weight: name for name, weight in net.named_parameters()}
    muon, sgd = make_optimizers(net, replace(config, **RECIPE))
    (mixing,), (decayed, spared) = muon.param_groups, sgd.param_groups
    assert (mixing["lr"], mixing["weight_decay"]) == (0.02, 0.05)
    assert sum(weight.numel() for weight in mixing["params"]) == 138_666 - 2_042
    for group, weight_decay in ((decayed, 5e-4), (spared, 0)):
        assert (group["lr"], group["weight_decay"]) == pytest.approx((0.2, weight_decay))
        assert (group["momentum"], group["nesterov"]) == (0.9, True)
    sgds = {names[weight] for weight in decayed["params"]}
    assert sgds == {"blocks.1.0.weight", "blocks.2.0.weight", "classifier.weight"}
    assert all(weight.ndim == 1 for weight in spared["params"])


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


def test_every_parameter_is_moved_by_one_optimizer(net):
    net.scale = nn.Parameter(torch.ones(()))
    groups = [group for optimizer in make_optimizers(net, config) for group in optimizer.param_groups]
    moved = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(moved) == sorted(map(id, net.parameters()))


def test_frozen_weights_are_not_for_muon(net):
    net.blocks.requires_grad_(False)
    assert [type(optimizer).__name__ for optimizer in make_optimizers(net, config)] == ["SGD"]


# --- schedules ---


def test_schedules():
    def factors(schedule):
        return [schedule_factor(schedule, progress) for progress in (0, 0.1, 0.2, 0.6, 1)]

    assert factors("onecycle") == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert factors("cosine") == pytest.approx([1, 0.9755283, 0.9045085, 0.3454915, 0], abs=1e-6)
    assert factors("constant") == [1] * 5


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
