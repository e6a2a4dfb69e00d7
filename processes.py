"""One run in several processes, started by torchrun; in a run of one process, all of this does nothing."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

# Of a wait for another process: longer than rank 0 takes to download the images.
TIMEOUT = timedelta(minutes=30)


def rank() -> int:
    """Return this process's number among those of the run: 0 in a run of one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return how many processes share the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Return this process's number among those of the run on this machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def launcher() -> str:
    """Return what to start train.py with, to have as many processes again; for several machines only "torchrun ..."."""
    if world_size() == 1:
        return "python"
    return f"torchrun --nproc-per-node {world_size()}" if os.environ["GROUP_WORLD_SIZE"] == "1" else "torchrun ..."


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Share a run with the other processes that torchrun started; in a process that it did not start, do nothing.

    Processes other than rank 0 say nothing, until first_to_fail lets one.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    # gloo carries what is on the CPU, the messages of a run on CUDA too: it notices at once when a peer is gone
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    if rank() > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        yield
    finally:
        dist.destroy_process_group()


def first_to_fail() -> bool:
    """Whether this process is the first of the run to fail, and so the one that says why; it can be heard then.

    The others fail because it did. torchrun's own process keeps the count, so a killed rank 0 changes nothing.
    """
    if not dist.is_initialized():
        return True
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        first = dist.TCPStore(*address, timeout=timedelta(seconds=5)).add(f"failures of attempt {attempt}", 1) == 1
    except dist.DistError:  # torchrun is gone too
        first = True
    if first:
        sys.stderr = sys.__stderr__
    return first


def on_first_rank(function: Callable, *args):
    """Return function(*args), which rank 0 alone calls; the others wait for what it returns, and fail if it fails."""
    values = [function(*args) if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


@contextlib.contextmanager
def first_rank_first() -> Iterator[None]:
    """Let rank 0 through the with-block first, then the first process of every other machine, then the rest.

    So what one has put on a disk that others see, they find there. They fail if it fails.
    """
    turn = (rank() > 0) + (local_rank() > 0)
    for _ in range(turn):
        sum_over_processes(torch.zeros(()))  # a barrier
    yield
    for _ in range(2 - turn):
        sum_over_processes(torch.zeros(()))


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """Replace a tensor's values by their sums over all processes, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(net: nn.Module) -> None:
    """Replace the gradients by their sums over all processes.

    They are one message in one order. DistributedDataParallel regroups them after its first step, and the sums
    of three processes or more are rounded differently then: a resumed run would not be the same run. What it
    gains by sending the first gradients during backward needs more than this network's 0.55 MB.
    """
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in net.parameters()]
    sums = sum_over_processes(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, sums.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def share_statistics(net: nn.Module, device: torch.device) -> None:
    """Make BatchNorm use the mean and variance of the images of all processes; parameters and names stay."""
    if world_size() == 1:
        return
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = SharedBatchNorm2d
        if isinstance(module, (SharedBatchNorm2d, nn.SyncBatchNorm)):
            module.forward = torch.compiler.disable(module.forward)  # torch.compile takes the messages for arithmetic


class SharedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d over the images of all processes, for the CPU, which nn.SyncBatchNorm refuses."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        with torch.no_grad():
            count = torch.full((1,), x.numel() / x.shape[1], dtype=torch.float64)
            mean = var = count.new_zeros(x.shape[1])
            if count:
                # Those of this process's images; with momentum 0 nothing is updated.
                mean, var = torch.batch_norm_update_stats(x, self.running_mean, self.running_var, 0.0)
                mean, var = mean.double(), var.double()  # for the difference of squares below
            sums = sum_over_processes(torch.cat([count * mean, count * (var + mean**2), count]))
            mean, square = (sums[:-1] / sums[-1]).chunk(2)
            var = square - mean**2
            unbiased = var * sums[-1] / (sums[-1] - 1)
            mean, var, unbiased, count = (part.to(self.weight.dtype) for part in (mean, var, unbiased, sums[-1]))
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
        return _Normalize.apply(x, self.weight, self.bias, mean, var, count, self.eps)


class _Normalize(torch.autograd.Function):
    """BatchNorm's arithmetic with given mean and variance (C,) of `count` values of x, some in other processes."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, count, eps):
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, var, count = ctx.saved_tensors
        grad_weight = grad_bias = torch.zeros_like(weight)
        if len(x):  # the function below crashes without an image
            _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
                grad, x, weight, mean, var, None, None, False, ctx.eps, [False, True, True]
            )
        # Each x also moves the mean and the variance, and with them everybody's output.
        by_var, by_mean = sum_over_processes(torch.stack([grad_weight, grad_bias])) / count
        inverse_std = torch.rsqrt(var + ctx.eps)
        scale = weight * inverse_std
        slope = -scale * inverse_std * by_var
        shift = -scale * by_mean - slope * mean
        scale, slope, shift = (values[:, None, None] for values in (scale, slope, shift))
        grad_x = torch.addcmul(shift, x, slope).addcmul_(grad, scale).to(x.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None
