import numpy as np
import pytest
import torch

from model import Net
from optimizer import Muon, make_optimizers, schedule_factor

USUAL = {"learning_rate": 1.0, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0}


def names_of(net, params):
    return {name for name, p in net.named_parameters() if any(p is q for q in params)}


def test_weight_decay_spares_biases_and_batchnorm():
    net = Net()
    (sgd,) = make_optimizers(net, **{**USUAL, "weight_decay": 0.01})
    decayed, spared = sgd.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0)
    assert names_of(net, decayed["params"]) == {
        name + ".weight" for name, module in net.named_modules() if isinstance(module, torch.nn.Conv2d)
    }
    assert sum(p.numel() for group in (decayed, spared) for p in group["params"]) == 138_666


def test_muon_has_the_weights_that_mix_channels_and_sgd_the_rest():
    net = Net()
    muon, sgd = make_optimizers(net, **USUAL, muon_learning_rate=0.02)
    mixing, decayed, spared = (g["params"] for optimizer in (muon, sgd) for g in optimizer.param_groups)
    assert names_of(net, decayed) == {"blocks.1.0.weight", "blocks.2.0.weight", "classifier.weight"}
    assert all(p.ndim == 4 for p in mixing)
    assert sum(p.numel() for params in (mixing, decayed, spared) for p in params) == 138_666


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [(5, 7), (2, 60)], ids=["wide", "tall"])
def test_muon_is_torchs_on_the_flattened_weights(memory_format, channels):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(*channels, 3).to(memory_format=memory_format)
    before = conv.weight.detach().flatten(1).clone()
    matrix = torch.nn.Parameter(before.clone())
    ours = Muon([conv.weight], 0.02, weight_decay=2.0)
    torchs = torch.optim.Muon([matrix], 0.02, weight_decay=2.0)
    for _ in range(3):
        conv.weight.grad = torch.randn_like(conv.weight)
        matrix.grad = conv.weight.grad.flatten(1)
        ours.step()
        torchs.step()
        ours.load_state_dict(ours.state_dict())
    difference = (conv.weight.flatten(1) - matrix).norm() / (matrix - before).norm()
    assert difference < 0.02  # torch's is computed in bfloat16
    assert conv.weight.is_contiguous(memory_format=memory_format)


def test_schedules():
    def factors(schedule, accuracies=()):
        return [schedule_factor(schedule, progress, list(accuracies)) for progress in (0, 0.1, 0.2, 0.6, 1)]

    assert factors("onecycle") == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert factors("cosine") == pytest.approx([1, 0.9755283, 0.9045085, 0.3454915, 0], abs=1e-6)
    assert factors("constant") == [1] * 5
    published = [83.28, 83.09, 82.68]  # epochs 22 to 24 of the specification's log: the rate fell at epoch 25
    assert factors("plateau", published[:2]) == [1] * 5
    assert factors("plateau", published) == [0.1] * 5


def test_plateau_is_torchs():
    accuracies = np.random.default_rng(0).integers(0, 20, 60).cumsum() * 0.2 + np.random.default_rng(1).normal(0, 9, 60)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=0.1, patience=1, threshold=0, eps=0
    )
    for epoch, accuracy in enumerate(accuracies, start=1):
        scheduler.step(accuracy)
        ours = schedule_factor("plateau", 0.5, accuracies[:epoch].tolist())
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"])
