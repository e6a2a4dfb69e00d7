"""How the weights are moved: the optimizers, and the learning rate over a run."""

import math
from collections.abc import Sequence

import torch
from torch import nn


def schedule_factor(schedule: str, progress: float, accuracies: list[float]) -> float:
    """Return the part of the highest learning rate to take when `progress` (0 to 1) of all steps are done.

    onecycle: linear up over the first fifth, then linear down to zero (Smith & Topin 2018, arXiv:1708.07120).
    cosine: half a cosine down to zero (Loshchilov & Hutter 2017, arXiv:1608.03983).
    plateau: divided by 10 whenever two epochs in a row did not raise the best of the validation `accuracies`.
    """
    if schedule == "onecycle":
        return min(progress / 0.2, (1 - progress) / 0.8)
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    factor, best, stalled = 1.0, -math.inf, 0
    for accuracy in accuracies if schedule == "plateau" else ():
        best, stalled = (accuracy, 0) if accuracy > best else (best, stalled + 1)
        if stalled == 2:
            factor, stalled = factor / 10, 0
    return factor


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon, which takes matrices only, for convolution weights: (O, I, h, w) is (O, I*h*w) to it.

    Muon makes the singular values of each step's matrix nearly equal, so that every direction in which the
    layer can change is used (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).
    """

    def __init__(self, weights: Sequence[nn.Parameter], lr: float):
        super().__init__(weights, {"lr": lr, "initial_lr": lr})
        self.matrices = [nn.Parameter(weight.detach().flatten(1).clone()) for weight in weights]
        self.muon = torch.optim.Muon(self.matrices, lr, weight_decay=0.0)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take a step; the weights may have been loaded or moved since the last one."""
        (group,) = self.param_groups
        for matrix, weight in zip(self.matrices, group["params"], strict=True):
            matrix.copy_(weight.flatten(1))
            matrix.grad = weight.grad.flatten(1)
        self.muon.param_groups[0]["lr"] = group["lr"]
        self.muon.step()
        for matrix, weight in zip(self.matrices, group["params"], strict=True):
            weight.copy_(matrix.view_as(weight))

    def state_dict(self) -> dict:
        return self.muon.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        self.muon.load_state_dict(state_dict)


def make_optimizers(
    net: nn.Module,
    *,
    learning_rate: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    muon_learning_rate: float = 0.0,
) -> list[torch.optim.Optimizer]:
    """Return [SGD]; with a muon_learning_rate [Muon for the convolutions that mix channels, SGD for what is left].

    SGD decays convolution weights only: biases and BatchNorm have one dimension, and are spared.
    """
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    mixing = [conv.weight for conv in convolutions[:-1] if conv.groups == 1] if muon_learning_rate else []
    rest = [p for p in net.parameters() if not any(p is weight for weight in mixing)]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
    ]
    sgd = torch.optim.SGD(groups, learning_rate, momentum=momentum, nesterov=nesterov)
    for group in sgd.param_groups:
        group["initial_lr"] = learning_rate
    return [Muon(mixing, muon_learning_rate), sgd] if mixing else [sgd]
