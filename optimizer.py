"""How the weights are moved: the optimizers, and the learning rate over a run."""

import math
from collections.abc import Sequence

import torch
from torch import nn


def schedule_factor(schedule: str, progress: float, accuracies: list[float]) -> float:
    """Return the part of the highest learning rate that is taken when `progress` (0 to 1) of all steps are done.

    onecycle: linear up over the first fifth, then linear down to zero (Smith & Topin 2018, arXiv:1708.07120).
    cosine: half a cosine down to zero (Loshchilov & Hutter 2017, arXiv:1608.03983).
    plateau: divided by 10 whenever two epochs in a row did not raise the best of the validation `accuracies`.
    constant: always 1.
    """
    if schedule == "onecycle":
        return min(progress / 0.2, (1 - progress) / 0.8)
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    factor, best, stalled = 1.0, -math.inf, 0
    if schedule == "constant":
        return factor
    for accuracy in accuracies:
        best, stalled = (accuracy, 0) if accuracy > best else (best, stalled + 1)
        if stalled == 2:
            factor, stalled = factor / 10, 0
    return factor


class Muon(torch.optim.Optimizer):
    """Muon for convolutions, whose weight (O, I, h, w) is taken as the matrix (O, I*h*w).

    Each step's matrix is replaced by a nearly orthogonal one, so that every direction in which the layer can
    change is used (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). torch.optim.Muon is the same
    for matrices, but computes in bfloat16 always: several times slower on a CPU that has none.

    weight_decay: a step multiplies the weights by 1 - lr * weight_decay (Loshchilov & Hutter 2019, arXiv:1711.05101).
    """

    def __init__(self, weights: Sequence[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(weights, {"lr": lr, "initial_lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Shrink each weight, and move it against its gradient, averaged over the steps with Nesterov's look ahead."""
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                average = state["momentum_buffer"]
                average.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalize(weight.grad.lerp(average, group["momentum"]).flatten(1))
                height, width = update.shape
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update.view_as(weight), alpha=-group["lr"] * max(1, height / width) ** 0.5)


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Return the matrix with all its singular values brought near 1: five steps of Jordan's Newton-Schulz iteration."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if tall else x


def make_optimizers(
    net: nn.Module,
    *,
    learning_rate: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    muon_learning_rate: float = 0.0,
    muon_weight_decay: float = 0.0,
) -> list[torch.optim.Optimizer]:
    """Return [SGD]; with a muon_learning_rate [Muon, SGD].

    Muon moves the weights of the convolutions that mix channels, but for the last, the classifier; SGD the rest.
    SGD decays convolution weights only: biases and BatchNorm have one dimension, and are spared.
    """
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    mixing = [conv.weight for conv in convolutions[:-1] if conv.groups == 1] if muon_learning_rate else []
    rest = [p for p in net.parameters() if not any(p is weight for weight in mixing)]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay, "initial_lr": learning_rate},
        {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0, "initial_lr": learning_rate},
    ]
    sgd = torch.optim.SGD(groups, learning_rate, momentum=momentum, nesterov=nesterov)
    return [Muon(mixing, muon_learning_rate, weight_decay=muon_weight_decay), sgd] if mixing else [sgd]
