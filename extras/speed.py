"""Faster by settings of torch and of the C library: open it to compile the network, or when memory is short."""

import ctypes
import importlib.util
import os
import platform
import shutil
import sys

from torch import nn

from config import UsageError


def compile_in_place(net: nn.Module, world_size: int = 1) -> None:
    """Have torch.compile compile the network at its first use; the names of its weights stay.

    Shapes are static: one kernel for whole batches and one for the last, in a resumed run as in a straight
    one. Raises UsageError where what torch.compile needs is missing, a compiler and on CUDA Triton, and for several
    processes, whose messages cannot be compiled.
    """
    cuda = next(net.parameters()).device.type == "cuda"
    usual = "gcc" if cuda else {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    compiler = os.environ.get("CC" if cuda else "CXX", usual)
    if world_size > 1:
        raise UsageError("compile is not for several processes: leave out --compile")
    if not shutil.which(compiler):
        raise UsageError(f"compile needs a compiler, and there is no {compiler}: install it or leave out --compile")
    if cuda and not importlib.util.find_spec("triton"):
        raise UsageError("compile needs Triton on CUDA, and it is not installed: leave out --compile")
    net.compile(dynamic=False)


def keep_freed_memory() -> None:
    """Let glibc keep for the next step what this one frees: Linux, given it back, clears it anew page by page.

    In float32 on a CPU that is a fifth of the time. Another C library is left as it is.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        if not libc.mallopt(-3, 2**30):  # M_MMAP_THRESHOLD: below 1 GiB no block is a mapping of its own
            libc.mallopt(-3, 2**25)  # the most that older versions take
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, at its highest: the heap does not shrink
