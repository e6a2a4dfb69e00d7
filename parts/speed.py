"""Faster steps by settings of torch and of the C library: open it to see what --compile does."""

import ctypes
import platform
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist

from config import Config, UsageError


def faster_step(step: Callable, net: nn.Module, config: Config) -> Callable:
    """Return a faster way to take the same training step as `step` (train.train_step): on CUDA, a RecordedStep.

    Elsewhere torch.compile compiles net in place, at first use. Raises UsageError for float16 and several processes.
    """
    if dist.is_initialized() or config.precision == "float16":
        raise UsageError("compile is not for several processes, and not for float16: give --compile false")
    if next(net.parameters()).device.type == "cuda":
        return RecordedStep(step)
    print("The first steps compile the network: that can take minutes.", flush=True)
    net.compile(dynamic=False)
    return step


class RecordedStep:
    """A training step that is recorded as a CUDA graph, then replayed: one launch by the CPU instead of some hundreds.

    It is recorded once, for one network; Python code in it runs only that once. The first dozen steps, in which CUDA's
    libraries make their choices, and batches of another size are not recorded. The next step overwrites the result.
    Source: Nguyen et al. 2021, https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs.
    """

    def __init__(self, step: Callable, steps_before: int = 12):
        self.step, self.steps_before, self.taken = step, steps_before, 0
        self.images = self.labels = self.rates = self.stream = self.graph = self.result = None

    def __call__(self, net: nn.Module, images: Tensor, labels: Tensor, optimizers: Sequence) -> tuple:
        """Take the step; return its loss and outputs."""
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        numbers = [group["lr"] for group in groups]
        with torch.cuda.device(images.device):
            if self.images is None:
                self.images, self.labels = images.clone(), labels.clone()
                self.rates = [torch.tensor(number, device=images.device) for number in numbers]
                self.stream = torch.cuda.Stream()  # what is to be recorded must not be on the usual one
            # A graph reads its learning rates from tensors; the steps before it do too, for the same bits.
            for group, rate, number in zip(groups, self.rates, numbers, strict=True):
                group["lr"] = rate.fill_(number)
            try:
                return self.take(net, images, labels, optimizers)
            finally:
                for group, number in zip(groups, numbers, strict=True):
                    group["lr"] = number

    def take(self, net: nn.Module, images: Tensor, labels: Tensor, optimizers: Sequence) -> tuple:
        """Take the step as it is, or replay the recorded one, recording it first if that is due."""
        self.taken += 1
        if images.shape != self.images.shape or self.taken <= self.steps_before:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.step(net, images, labels, optimizers)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.graph is None:  # record it; nothing is computed
            net.zero_grad()  # to None: the graph allocates gradients of its own
            self.graph, mode = torch.cuda.CUDAGraph(), "thread_local"  # the loader's thread, which pins memory, goes on
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode=mode):
                self.result = self.step(net, self.images, self.labels, optimizers)
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.result


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next: given back, it is cleared again, a fifth of the time on a CPU."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: no block below 32 MiB is a mapping of its own,
        libc.mallopt(-3, 2**30)  # nor one below 1 GiB, where glibc accepts so much
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, at its highest: the heap does not shrink
