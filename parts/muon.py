"""The optimizer of most weights: open it to see how Muon makes a step orthogonal."""

from collections.abc import Callable, Sequence

import torch
from torch import nn


class Muon(torch.optim.Optimizer):
    """Muon for convolutions, whose weight (O, I, h, w) is taken as the matrix (O, I*h*w).

    Each step's matrix is replaced by a nearly orthogonal one, so that every direction in which the layer can
    change is used (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). torch.optim.Muon is the same
    for matrices, but always computes in bfloat16: several times slower on a CPU without it.
    weight_decay: a step multiplies the weights by 1 - lr * weight_decay (Loshchilov & Hutter 2019, arXiv:1711.05101).
    """

    def __init__(self, weights: Sequence[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> torch.Tensor | None:
        """Shrink each weight, and move it against its gradient, averaged over the steps with Nesterov's look-ahead."""
        loss = torch.enable_grad()(closure)() if closure else None
        for group in self.param_groups:
            for weight in (weight for weight in group["params"] if weight.grad is not None):
                if not self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
                average = self.state[weight]["momentum_buffer"]
                average.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalize(weight.grad.lerp(average, group["momentum"]).flatten(1))
                stretch = max(1, update.shape[0] / update.shape[1]) ** 0.5  # more outputs than inputs: a longer step
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(update.view_as(weight) * (group["lr"] * stretch))
        return loss


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Return the matrix with its singular values s brought near 1, by five steps of Jordan's Newton-Schulz iteration.

    x <- a x + b (x x') x + c (x x')^2 x brings s to a s + b s^3 + c s^5; x' is x.T, and a, b, c stand below.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T  # then b gram + c gram gram, and a x + that x
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if tall else x
