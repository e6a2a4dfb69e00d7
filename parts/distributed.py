"""One run in several processes, started by torchrun: open it when one GPU is not enough."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed.nn  # before there is a group: imported later, it would hold the group beyond its end
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from config import UsageError


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join torchrun's other processes, if there are any; on CUDA, each takes a device of its own."""
    if not dist.is_torchelastic_launched():
        yield
        return
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if device not in ("auto", "cpu", "cuda") or 0 < gpus < int(os.environ["LOCAL_WORLD_SIZE"]):
        raise UsageError(f"device {device!r} is not for these processes: give --device cuda, a GPU for each, or cpu")
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(minutes=30))  # for downloads
    yield
    dist.destroy_process_group()  # only after a clean end: nccl would wait for a process that has failed


def of_first(value: object) -> object:
    """Return the first process's value, in all of them."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


def share_training(net: nn.Module, batch_size: int) -> nn.Module:
    """Return the network to train: itself, or of several processes one that averages their gradients at each step.

    On CUDA, BatchNorm2d becomes SyncBatchNorm, which refuses CPUs. Without find_unused_parameters, torch reorders
    the sums of gradients after the first step, and a resumed run of three processes would differ in the last bits.
    """
    if not dist.is_initialized():
        return net
    if batch_size % dist.get_world_size():
        raise UsageError(f"batch_size {batch_size} must be a multiple of the number of processes")
    warnings.filterwarnings("ignore", message="find_unused_parameters")  # says that none is unused
    if next(net.parameters()).device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    return DistributedDataParallel(net, find_unused_parameters=True)


def share_statistics(net: nn.Module) -> None:
    """Give all processes the first one's running averages of BatchNorm, for validation."""
    if dist.is_initialized():
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)
