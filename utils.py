"""What the training loop needs and nobody wants to read first: device, precision, seeds, meter, checkpoints."""

import builtins
import io
import multiprocessing
import os
import sys
import time
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist
from torch import nn
from tqdm import tqdm

from config import Config, UsageError

FORMAT = "s8erav3-3"  # of the checkpoints
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """Return the device called `name`, or raise UsageError; "auto" is torch's accelerator (CUDA, ...), else the CPU."""
    if name == "auto":
        cpu = dist.is_initialized() and not torch.cuda.is_available()  # gloo knows no other accelerator
        name = "cpu" if cpu else str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).cpu()  # try it
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0][:100]  # torch's first sentence
        raise UsageError(f"device {name!r} cannot be used here ({reason}): name another with --device") from None
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """Return the precision to compute in; "auto" is bfloat16 where the hardware has it, else float32.

    Native bfloat16: CUDA from compute capability 8.0 on; CPUs with AVX512-BF16 or AMX, of which torch tells from 2.11
    on. Raises UsageError for float16 off CUDA: its gradients underflow unless the loss is scaled, as only CUDA's is.
    """
    if name == "float16" and device.type != "cuda":
        raise UsageError(f"precision float16 needs a CUDA device, not {device}: name another with --precision")
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        features = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        native = features.get("avx512_bf16", False) or features.get("amx_bf16", False)
    return "bfloat16" if native else "float32"


def choose_workers(num_workers: int, device: torch.device) -> int:
    """Return how many processes augment; -1: as many as pay off, of the cores that each training process has.

    On the CPU they compete with the training: none on two cores, one on more. Beside an accelerator, up to eight.
    """
    if num_workers >= 0:
        return num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cpu":
        return int(cores > 2)
    most = 8 if multiprocessing.get_all_start_methods()[0] == "fork" else 2  # others take 590 MB each
    return max(1, min(most, cores - 1))


def new_run_dir() -> str:
    """Return the name of a new run's folder: runs/ and the time to the microsecond, so that no other has it."""
    return datetime.now().strftime("runs/%Y-%m-%d_%H-%M-%S.%f")


def resolve(config: Config) -> Config:
    """Return the config with what it left open filled in: device, precision, workers, the run's folder."""
    device = choose_device(config.device)
    return replace(
        config,
        device=str(device),
        precision=choose_precision(config.precision, device),
        num_workers=choose_workers(config.num_workers, device),
        run_dir=os.path.expanduser(config.run_dir or new_run_dir()),
    )


def device_name(device: torch.device) -> str:
    """Return the device's name for people: "cuda (NVIDIA H100)", "cpu (2 threads)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def set_numerics(deterministic: bool) -> None:
    """Compute float32 as float32 on CUDA, not as TF32 (10 bits), torch's default for convolutions.

    deterministic: allow only operations that give the same bits every time; those of the CPU always do.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = not deterministic  # try cuDNN's algorithms, and keep the fastest
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it, before its first use
    torch.use_deterministic_algorithms(deterministic)


def rank_and_size() -> tuple[int, int]:
    """Return this process's number and how many processes share the run: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def seed_torch(seed: int, epoch: int = 0, rank: int = 0) -> None:
    """Seed torch's generators for this epoch and process, so that their states need not be saved to continue a run."""
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1, np.uint64)[0]))


def forward(net: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the network's outputs for the images as float32, its layers computed in dtype."""
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
        return net(images).float()


class Meter:
    """Loss and accuracy over the images so far, gathered on the device: only the averages wait for it."""

    def __init__(self, description: str, steps: int, device: torch.device):
        self.description, self.device = description, device
        self.losses = torch.zeros(steps, device=device)  # sum of each batch
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)  # of images
        self.right = [torch.zeros(0, dtype=torch.bool, device=device)]  # for each batch, whether an image was right
        self.step, self.begun, self.waited = 0, time.monotonic(), 0.0  # waited: seconds, for images

    def update(self, loss: torch.Tensor, outputs: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch: the mean of its losses, outputs (N, num_classes), labels (N,).

        Raises UsageError if the first outputs are probabilities: a network learns badly from them, without a word.
        """
        if self.step == 0 and outputs.min() >= 0 and (outputs.sum(dim=1) - 1).abs().max() < 1e-2:
            raise UsageError("the network returns probabilities: return their logarithms, or logits (no softmax)")
        right = outputs.argmax(dim=1) == labels
        self.losses[self.step] = loss.detach() * len(labels)
        self.correct += right.sum()
        self.count += len(labels)
        self.right.append(right)
        self.step += 1

    def local_average(self) -> dict[str, float]:
        """Return {"loss", "accuracy" in percent}; raise FloatingPointError if the loss of any batch is not finite."""
        losses = self.losses.cpu().double()
        if not losses.isfinite().all():
            first = int((~losses.isfinite()).nonzero()[0])
            where = f"{self.description}: the loss is {losses[first]} at step {first + 1}"
            raise FloatingPointError(f"{where}; a new run needs a lower --learning-rate")
        count = max(self.count.item(), 1)  # this process may have had no image
        return {"loss": losses.sum().item() / count, "accuracy": 100 * self.correct.item() / count}

    def average(self) -> dict[str, float]:
        """Sum over all processes (call it once); return also "seconds", "images_per_second", "waited" (a fraction)."""
        if dist.is_initialized():
            for part in (self.losses, self.correct, self.count):
                dist.all_reduce(part)
        average, seconds = self.local_average(), time.monotonic() - self.begun
        rate = self.count.item() / seconds
        return {**average, "seconds": seconds, "images_per_second": rate, "waited": self.waited / seconds}

    def right_of_all(self) -> torch.Tensor:
        """Return for each image of all processes whether it was right, (N,) uint8; call `average` before."""
        rank, size = rank_and_size()
        right = torch.zeros(self.count.item(), dtype=torch.uint8, device=self.device)
        right[rank::size] = torch.cat(self.right).to(torch.uint8)  # as EpochBatchSampler deals the images
        if size > 1:
            dist.all_reduce(right)
        return right.cpu()


def with_progress(loader: Iterable, meter: Meter) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the batches on the meter's device, under a tqdm bar that shows its average four times a second at most.

    Without a terminal or a notebook there is no bar, but a loss that is not finite still ends the epoch early. The
    average is this process's alone: processes come here at different times, so none may wait for another.
    """
    shown = (sys.stderr and sys.stderr.isatty()) or hasattr(builtins, "__IPYTHON__")
    form = "{desc}: {percentage:3.0f}%|{bar}| {n}/{total} {remaining}{postfix}"  # fits 80 columns
    non_blocking = meter.device.type == "cuda"  # elsewhere the memory may be given back before it is copied
    steps = len(meter.losses)
    with tqdm(total=steps, desc=meter.description, disable=not shown, dynamic_ncols=True, bar_format=form) as bar:
        looked = waiting = time.monotonic()
        for step, (images, labels) in enumerate(loader, start=1):
            meter.waited += time.monotonic() - waiting
            images = images.to(meter.device, memory_format=torch.channels_last, non_blocking=non_blocking)
            yield images, labels.to(meter.device, non_blocking=non_blocking)
            bar.update()  # the caller has updated the meter by now
            if time.monotonic() - looked > 0.25 or step == steps:
                average = meter.local_average()
                bar.set_postfix_str(f"loss {average['loss']:.4f}, acc {average['accuracy']:.2f}")
                looked = time.monotonic()
            waiting = time.monotonic()


def save_checkpoint(path: str | Path, checkpoint: dict) -> None:
    """Replace the file by a dict of tensors and plain values, by torch.save: at every moment the old one or the new.

    Raises OSError if it cannot be written; the old file is still there then.
    """
    temporary = Path(f"{path}.{os.getpid()}.tmp")  # not that of another process that continues the same run
    torch.save({"format": FORMAT, "torch": str(torch.__version__), **checkpoint}, content := io.BytesIO())
    torch.load(io.BytesIO(content.getvalue()), map_location="cpu", weights_only=True)  # fails at, say, a numpy number
    try:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())  # torch.save into a file turns a full disk, and Ctrl-C, into a RuntimeError
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> dict:
    """Read what save_checkpoint wrote, on the CPU; nothing in the file can run (weights_only).

    Raises UsageError for a file that is missing, damaged (by the zip archive's checksums) or of another format.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UsageError(f"checkpoint {path} is not there, or not a file")
    try:
        with warnings.catch_warnings(), zipfile.ZipFile(path) as archive:
            warnings.simplefilter("ignore")  # the unpickler's, on files of other programs
            damaged = archive.testzip()
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"checkpoint {path} cannot be read ({error.strerror})") from None
    except Exception:  # whatever zipfile and the unpickler meet in a file that this program did not write
        raise UsageError(f"checkpoint {path} is damaged, or not one of this program") from None
    if damaged or not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        reason = f"is damaged ({damaged})" if damaged else f"is not of format {FORMAT}: of another version or program"
        raise UsageError(f"checkpoint {path} {reason}")
    return checkpoint
