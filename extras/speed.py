"""Faster by settings of torch and of the C library: open it to see what --compile does, or when memory is short."""

import ctypes
import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from config import Config, UsageError


def compiled(step: Callable, net: nn.Module, config: Config, world_size: int = 1) -> Callable:
    """Return what trains with --compile in place of `step`, train.train_step: on CUDA a RecordedStep.

    Elsewhere `step` itself, and torch.compile compiles the network at its first use; the names of its weights stay.
    Shapes are static: one kernel for whole batches and one for the last, in a resumed run as in a straight one.
    Raises UsageError where the compiler that torch.compile needs is missing, for float16, whose step waits for the
    CPU, and for several processes, whose messages cannot be compiled.
    """
    if world_size > 1:
        raise UsageError("compile is not for several processes: leave out --compile")
    if next(net.parameters()).device.type == "cuda":
        if config.precision == "float16":
            raise UsageError("compile is for float32 and bfloat16 on CUDA, not for float16: leave out --compile")
        return RecordedStep(step)
    compiler = os.environ.get("CXX", {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++"))
    if not shutil.which(compiler):
        raise UsageError(f"compile needs a compiler, and there is no {compiler}: install it or leave out --compile")
    net.compile(dynamic=False)
    return step


class RecordedStep:
    """A training step that is recorded as a CUDA graph, then replayed: one launch by the CPU instead of some hundreds.

    The first dozen are taken as they are, while CUDA's libraries make their choices, and so is each batch of another
    size, an epoch's last. What a call returns is overwritten by the next (Ng et al. 2021,
    https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs).
    """

    def __init__(self, step: Callable):
        self.step, self.steps_before = step, 12
        self.images = self.graph = None

    def __call__(self, net: nn.Module, images: Tensor, labels: Tensor, optimizers: Sequence, *options) -> tuple:
        """Take the step; return its loss and log_probs, without their history."""
        if self.images is None:
            self.images, self.labels = images.clone(), labels.clone()
        with torch.cuda.device(images.device):
            if images.shape != self.images.shape:
                return self.step(net, images, labels, optimizers, *options)
            if self.steps_before > 0:
                self.steps_before -= 1
                return self.warm_up(net, images, labels, optimizers, *options)
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            if self.graph is None:
                self.record(groups, net, self.images, self.labels, optimizers, *options)
            self.images.copy_(images)
            self.labels.copy_(labels)
            for rate, group in zip(self.rates, groups, strict=True):
                rate.fill_(group["lr"])
            self.graph.replay()
            return self.result

    def warm_up(self, *args) -> tuple:
        """Take the step on a stream beside the usual one, as what is to be recorded must be."""
        usual, beside = torch.cuda.current_stream(), torch.cuda.Stream()
        beside.wait_stream(usual)
        with torch.cuda.stream(beside):
            # With its history it would keep nodes of this stream alive, and torch would warn.
            result = tuple(tensor.detach() for tensor in self.step(*args))
        usual.wait_stream(beside)
        return result

    def record(self, groups: list[dict], net: nn.Module, *args) -> None:
        """Record the step on self.images and self.labels, with learning rates that are tensors; nothing is computed.

        Raises UsageError for a network whose step waits for the CPU.
        """
        numbers = [group["lr"] for group in groups]
        self.rates = [torch.tensor(rate, device=self.images.device) for rate in numbers]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate
        net.zero_grad()  # the gradients become the graph's own
        self.graph = torch.cuda.CUDAGraph()
        mode = "thread_local"  # the loader's thread, which pins memory, may go on
        try:
            with torch.cuda.graph(self.graph, stream=torch.cuda.Stream(), capture_error_mode=mode):
                self.result = tuple(tensor.detach() for tensor in self.step(net, *args))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"this network's step cannot be recorded ({reason}): leave out --compile") from None
        for group, number in zip(groups, numbers, strict=True):
            group["lr"] = number


def keep_freed_memory() -> None:
    """Let glibc keep for the next step what this one frees: Linux, given it back, clears it anew page by page.

    In float32 on a CPU that is a fifth of the time. Another C library is left as it is.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        if not libc.mallopt(-3, 2**30):  # M_MMAP_THRESHOLD: below 1 GiB no block is a mapping of its own
            libc.mallopt(-3, 2**25)  # the most that older versions take
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, at its highest: the heap does not shrink
