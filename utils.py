"""What the training loop needs and nobody wants to read first: device, precision, meter, bars, signals."""

import builtins
import ctypes
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from tqdm import tqdm

from processes import local_rank, sum_over_processes, world_size

# --- device and precision -----------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class UsageError(Exception):
    """Something that the user asked for and that cannot be done; the message is one line for the user."""


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is CUDA, else another accelerator that torch reports, else the CPU.

    Of several processes each gets its own CUDA device, under the name "cuda" all the same.
    Raises UsageError for a device that is not there.
    """
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if world_size() > 1 and name not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not for {world_size()} processes: give --device cuda, one each, or cpu")
    try:
        if world_size() > 1 and name == "cuda":
            torch.cuda.set_device(local_rank())
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used here ({reason}): name another with --device") from None
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """Return the precision to compute in; "auto" is bfloat16 where the hardware has it, else float32.

    Native bfloat16: CUDA from compute capability 8.0 on, CPUs with AVX512-BF16 or AMX. Raises UsageError
    for float16 off CUDA: only there does the loss get scaled, without which gradients underflow.
    """
    if name == "float16" and device.type != "cuda":
        raise UsageError(f"precision float16 needs a CUDA device, not {device}: name another with --precision")
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        cpu = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        native = cpu.get("avx512_bf16", False) or cpu.get("amx_bf16", False)
    return "bfloat16" if native else "float32"


def describe_device(device: torch.device) -> str:
    """Return the device's name for people: "cuda (NVIDIA H100)", "cpu (2 threads)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return f"{device} ({platform.machine()})"


def choose_workers(num_workers: int, device: torch.device) -> int:
    """Return how many processes augment; -1 finds out what pays off.

    On the CPU they take from the training what they give: none on two cores, one on more. Beside an
    accelerator the cores are free: up to eight. Training processes on one machine divide its cores.
    """
    if num_workers >= 0:
        return num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return int(cores > 2) if device.type == "cpu" else max(1, min(8, cores - 1))


def compile_network(net: torch.nn.Module, compile: bool) -> torch.nn.Module:
    """Return the network, compiled at its first use if `compile`; weights stay the given network's.

    Shapes are static: one kernel for whole batches and one for the last, in a resumed run as in a straight
    one. Raises UsageError where there is no C++ compiler, which torch.compile needs on the CPU.
    """
    if not compile:
        return net
    compiler = os.environ.get("CXX", {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++"))
    if next(net.parameters()).device.type == "cpu" and not shutil.which(compiler):
        raise UsageError(
            f"compile needs a C++ compiler, and there is no {compiler}: install it, or leave out --compile"
        )
    return torch.compile(net, dynamic=False)


def keep_freed_memory() -> None:
    """Let glibc keep for the next step what this one frees: Linux, given it back, clears it anew page by page.

    In float32 on a CPU that is a fifth of the time. Another C library is left as it is.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        if not libc.mallopt(-3, 2**30):  # M_MMAP_THRESHOLD: below 1 GiB no block is a mapping of its own
            libc.mallopt(-3, 2**25)  # the most that older versions take
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, at its highest: the heap does not shrink


def make_deterministic(deterministic: bool) -> None:
    """Make torch use only operations that give the same bits every time; on the CPU, with equal threads, all do."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it, before its first use
        torch.use_deterministic_algorithms(True)


def seed_torch(seed: int, epoch: int, rank: int = 0) -> None:
    """Set torch's generators for this epoch and process, so that they never have to be saved to continue a run."""
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1, np.uint64)[0]))


# --- metrics ------------------------------------------------------------------------------------------


class NonFiniteLoss(Exception):
    """The loss became infinite or NaN; the message says at which step, counted from 1."""


class Meter:
    """Loss and accuracy over the images so far, gathered on the device: only `result` waits for it."""

    def __init__(self, description: str, steps: int, device: torch.device):
        self.description = description
        self.losses = torch.zeros(steps, device=device)  # sum of each batch
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.count = torch.zeros((), dtype=torch.int64)
        self.step = 0

    def update(self, loss: torch.Tensor, log_probs: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch: the sum of its losses, log_probs (N, num_classes), labels (N,)."""
        self.losses[self.step] = loss.detach()
        self.correct += (log_probs.argmax(dim=1) == labels).sum()
        self.count += len(labels)
        self.step += 1

    def result(self) -> dict[str, float]:
        """Return {"loss", "accuracy" in percent}; raise NonFiniteLoss if the loss of any batch is not finite."""
        losses = self.losses.cpu().double()
        if not losses.isfinite().all():
            first = int((~losses.isfinite()).nonzero()[0])
            raise NonFiniteLoss(f"{self.description}: the loss is {losses[first]} at step {first + 1}")
        count = max(self.count.item(), 1)  # the images may be fewer than the processes
        return {"loss": losses.sum().item() / count, "accuracy": 100 * self.correct.item() / count}

    def total(self) -> dict[str, float]:
        """Return the result over the images of all processes, or raise NonFiniteLoss, in all of them alike."""
        for part in (self.losses, self.correct, self.count):
            sum_over_processes(part)
        return self.result()


def with_progress(batches: Iterable, meter: Meter) -> Iterator:
    """Yield the batches under a tqdm bar that shows the meter's result, fetched four times a second at most.

    Without a terminal or a notebook there is no bar; the meter is looked at all the same, so that a loss
    that is not finite is found early. The result is that of this process alone: when it is looked at
    depends on the clock, so nobody may have to wait for it.
    """
    shown = sys.stderr.isatty() or hasattr(builtins, "__IPYTHON__")
    with tqdm(total=len(batches), desc=meter.description, disable=not shown, dynamic_ncols=True) as bar:
        looked = time.monotonic()
        for batch in batches:
            yield batch
            bar.update()
            if time.monotonic() - looked > 0.25:
                _show(bar, meter)
                looked = time.monotonic()
        _show(bar, meter)


def _show(bar: tqdm, meter: Meter) -> None:
    result = meter.result()
    bar.set_postfix(accuracy=f"{result['accuracy']:.3f}", loss=f"{result['loss']:.4f}")


# --- signals ------------------------------------------------------------------------------------------


class Stop(BaseException):
    """Ctrl-C or SIGTERM; no Exception, so that no library takes it for an error that it can handle."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


def stop_on_signals() -> None:
    """From now on raise Stop, instead of what Python does, at Ctrl-C and SIGTERM."""

    def stop(signum, frame):
        raise Stop(signum)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def ignore_signals() -> None:
    """From now on ignore Ctrl-C, SIGTERM, and torch's alarm at the end of a worker: the program is ending already."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if hasattr(signal, "SIGCHLD"):  # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
