"""One run in several processes, started by torchrun: open it when one GPU is not enough."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed.nn  # before there is a group: see process_group
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

from config import UsageError

# How long a process waits for another: rank 0 may be downloading the images.
TIMEOUT = timedelta(minutes=30)


def launcher() -> str:
    """Return the command that runs train.py in as many processes again; on several machines, just "torchrun ..."."""
    if not dist.is_initialized():
        return "python"
    one_machine = os.environ["GROUP_WORLD_SIZE"] == "1"
    return f"torchrun --nproc-per-node {dist.get_world_size()}" if one_machine else "torchrun ..."


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join torchrun's other processes; on CUDA, each takes a device of its own."""
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    # gloo carries what is on the CPU, even in a run on CUDA: it notices at once when a peer is gone
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device {device!r} is not for several processes: give --device cuda, one each, or cpu")
    if device != "cpu" and torch.cuda.is_available() and not cuda:
        raise UsageError("several processes on CUDA need nccl, which this torch lacks: give --device cpu")
    if device != "cpu" and cuda:
        number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= count:
            raise UsageError(f"more processes than CUDA devices, {count}: start fewer, or give --device cpu")
        torch.cuda.set_device(number)
    yield
    # Only after a clean end: after a failure, nccl would wait for processes that wait for this one. The group's end
    # also ends gloo's threads: one that asked for a tensor's Python object while Python shuts down would abort the
    # process. A group that something holds does not end, and torch.distributed.nn, which the first step would import,
    # holds the group that it finds. So it is imported above, while there is none.
    wait_for_all()
    dist.destroy_process_group()


def first_to_fail() -> bool:
    """Return whether this process is the run's first to fail; if so, let it print, for it is the one to say why.

    The others fail because it did. torchrun's own process keeps the count, so a killed rank 0 changes nothing.
    """
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        first = dist.TCPStore(*address, timeout=timedelta(seconds=5)).add(f"failures of attempt {attempt}", 1) == 1
    except dist.DistError:  # torchrun is gone too
        first = True
    if first:
        sys.stderr = sys.__stderr__
    return first


def of_first_process(value: object) -> object:
    """Return rank 0's value, a plain one, in all processes."""
    values = [value]
    dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


def first_rank_first(function: Callable, *args):
    """Return function(*args), called by rank 0 first, then by the first process of every other machine, then the rest.

    So the others find what one has downloaded to a disk that they see too. If it fails, they fail.
    """
    turn = (dist.get_rank() > 0) + (int(os.environ["LOCAL_RANK"]) > 0)
    for number in range(3):
        if number == turn:
            result = function(*args)
        wait_for_all()
    return result


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """Replace a tensor's values by their sums over all processes (an all-reduce), and return it."""
    dist.all_reduce(tensor)
    return tensor


def wait_for_all() -> None:
    """Wait until all processes are here. dist.barrier would use nccl, which waits for ever for one that is gone."""
    sum_over_processes(torch.zeros(()))


def share_training(net: nn.Module, batch_size: int) -> None:
    """Make several processes train as one would: rank 0's weights, BatchNorm over all images of a batch.

    Each image counts the same: a process's mean loss is weighted by its share of the batch's images. The gradients
    are summed by sum_gradients. Names and parameters stay. Raises UsageError for a batch with fewer images than
    processes, a CUDA device that is not the process's own, and a BatchNorm2d without weights or running averages.
    """
    device = next(net.parameters()).device
    own = device.type == "cpu" or (device.type == "cuda" and device.index == torch.cuda.current_device())
    if not own:
        raise UsageError(f"device {device} is not for several processes: give --device cuda, one each, or cpu")
    if batch_size < dist.get_world_size():
        raise UsageError(f"a batch has {batch_size} images, too few for {dist.get_world_size()} processes: start fewer")
    for tensor in net.state_dict().values():
        dist.broadcast(tensor, 0)  # another kind of machine might have drawn others
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            if None in (module.weight, module.running_mean, module.momentum):
                raise UsageError(f"{name} has no weights, running averages or momentum, which several processes need")
            module.__class__ = SharedBatchNorm2d
    net.register_forward_hook(_weigh_by_images)


def _weigh_by_images(net: nn.Module, args: tuple, log_probs: torch.Tensor) -> None:
    if log_probs.requires_grad:
        own = torch.full((), len(log_probs), dtype=torch.float32, device=log_probs.device)
        part = own / sum_over_processes(own.clone())
        log_probs.register_hook(lambda gradient: gradient * part)


def sum_gradients(net: nn.Module) -> None:
    """Replace the gradients by their sums over all processes.

    They travel as one message, in one order. DistributedDataParallel regroups them after its first step (unless told
    find_unused_parameters=True), so that sums over three or more processes are rounded differently: a resumed run
    would not be the same run. Sending the first gradients during backward, as it does, gains something only for more
    than this network's 0.55 MB.
    """
    gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    sums = sum_over_processes(torch.cat([gradient.flatten() for gradient in gradients]))
    parts = sums.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)])


class SharedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d over the images of all processes; nn.SyncBatchNorm refuses the CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        with torch.no_grad():
            count = torch.full((1,), x.numel() / x.shape[1], dtype=torch.float64, device=x.device)
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
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, None, None, False, ctx.eps, [False, True, True]
        )
        # Each x also moves the mean and the variance, and with them every output.
        by_var, by_mean = sum_over_processes(torch.stack([grad_weight, grad_bias])) / count
        inverse_std = torch.rsqrt(var + ctx.eps)
        scale = weight * inverse_std
        slope = -scale * inverse_std * by_var
        shift = -scale * by_mean - slope * mean
        scale, slope, shift = (values[:, None, None] for values in (scale, slope, shift))
        grad_x = torch.addcmul(shift, x, slope).addcmul_(grad, scale).to(x.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None
