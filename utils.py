"""What the training loop needs and nobody wants to read first: device, meter, bars, checkpoints, metrics file."""

import csv
import hashlib
import io
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

# --- device and precision -----------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class UsageError(Exception):
    """Something that the user asked for and that cannot be done; the message is one line for the user."""


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is CUDA, else another accelerator that torch reports, else the CPU.

    Raises UsageError for a device that is not there.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used here ({reason}): try --device cpu or leave it out") from None
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """Return the precision to compute in; "auto" is bfloat16 where the hardware has it, else float32.

    Native bfloat16: CUDA from compute capability 8.0 on, CPUs with AVX512-BF16 or AMX. Raises UsageError
    for float16 off CUDA: only there does the loss get scaled, without which gradients underflow.
    """
    if name == "float16" and device.type != "cuda":
        raise UsageError(f"precision float16 needs a CUDA device, not {device}: try --precision bfloat16 or float32")
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
    """Return how many processes augment; -1 is one on the CPU, which computes meanwhile, else up to eight."""
    if num_workers >= 0:
        return num_workers
    return 1 if device.type == "cpu" else max(1, min(8, (os.cpu_count() or 1) - 1))


def seed_torch(seed: int, epoch: int) -> None:
    """Set torch's generators for this epoch, so that they never have to be saved to continue a run."""
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]))


# --- metrics ------------------------------------------------------------------------------------------


class NonFiniteLoss(Exception):
    """The loss became infinite or NaN; `step` counts from 1."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class Meter:
    """Loss and accuracy over the images so far, gathered on the device: only `result` waits for it."""

    def __init__(self, description: str, steps: int, device: torch.device):
        self.description = description
        self.losses = torch.zeros(steps, device=device)  # mean of each batch
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.sizes = []

    def update(self, loss: torch.Tensor, log_probs: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch: its mean loss, log_probs (N, num_classes), labels (N,)."""
        self.losses[len(self.sizes)] = loss.detach()
        self.correct += (log_probs.argmax(dim=1) == labels).sum()
        self.sizes.append(len(labels))

    def result(self) -> dict[str, float]:
        """Return {"loss", "accuracy" in percent}; raise NonFiniteLoss if the loss of any batch is not finite."""
        losses = self.losses[: len(self.sizes)].cpu().double()
        if not losses.isfinite().all():
            first = int((~losses.isfinite()).nonzero()[0])
            raise NonFiniteLoss(f"{self.description}: the loss is {losses[first]} at step {first + 1}", first + 1)
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        return {
            "loss": ((losses * sizes).sum() / sizes.sum()).item(),
            "accuracy": 100 * self.correct.item() / sum(self.sizes),
        }


def with_progress(batches: Iterable, meter: Meter, interval: float = 0.25) -> Iterator:
    """Yield the batches under a tqdm bar that shows the meter's result, fetched every `interval` seconds at most.

    Without a terminal or a notebook there is no bar; the meter is looked at all the same, so that a loss
    that is not finite is found early.
    """
    shown = sys.stderr.isatty() or "ipykernel" in sys.modules
    with tqdm(total=len(batches), desc=meter.description, disable=not shown, dynamic_ncols=True) as bar:
        looked = time.monotonic()
        for batch in batches:
            yield batch
            bar.update()
            if time.monotonic() - looked > interval:
                _show(bar, meter)
                looked = time.monotonic()
        _show(bar, meter)


def _show(bar: tqdm, meter: Meter) -> None:
    result = meter.result()
    bar.set_postfix(accuracy=f"{result['accuracy']:.3f}", loss=f"{result['loss']:.4f}")


# --- a run's folder -----------------------------------------------------------------------------------


def make_run_dir(run_dir: str) -> Path:
    """Create and return the run's folder, a new dated one under runs/ if the name is empty.

    Raises UsageError if the folder holds a run already or cannot be written.
    """
    folder = Path(run_dir or datetime.now().strftime("runs/%Y-%m-%d_%H-%M-%S"))
    if (folder / "config.json").exists():
        raise UsageError(f"run_dir {folder} holds a run already: name another with --run-dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"run_dir {folder} cannot be written ({error.strerror}): name another, --run-dir") from None
    return folder


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file by a whole new one: whoever reads it, at any moment, finds the old or the new content."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_metrics(path: Path, rows: list[dict[str, float]]) -> None:
    """Write metrics.csv: a row for each epoch."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


# --- checkpoints --------------------------------------------------------------------------------------

FORMAT = "s8erav3-1"


class CheckpointError(Exception):
    """A file that is no usable checkpoint; the message is one line for the user."""


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a dict of tensors and plain values with torch.save, its SHA-256 (32 bytes) appended.

    torch checks no sum of what it reads, and finds a zip archive's end with bytes behind it, so plain
    torch.load reads these files too.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "torch": str(torch.__version__), **checkpoint}, buffer)
    data = buffer.getvalue()
    write_atomically(path, data + hashlib.sha256(data).digest())


def load_checkpoint(path: str | Path) -> dict:
    """Read what save_checkpoint wrote, on the CPU; nothing in the file can run (weights_only).

    Raises CheckpointError for a file that is missing, damaged or of another format.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read ({error.strerror})") from None
    data, digest = content[:-32], content[-32:]
    if hashlib.sha256(data).digest() != digest:
        raise CheckpointError(f"checkpoint {path} is damaged, or not one of this program: its SHA-256 does not match")
    try:
        checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # whatever the unpickler meets in a file that this program did not write
        raise CheckpointError(f"checkpoint {path} holds more than tensors and plain values: it is not loaded") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path} is not of format {FORMAT}: another version of this program wrote it")
    return checkpoint


def load_weights(net: torch.nn.Module, checkpoint: dict, path: str | Path) -> None:
    """Load a checkpoint's weights; raise CheckpointError, the network unchanged, if they are another network's."""
    ours, theirs = net.state_dict(), checkpoint["model"]
    if {name: t.shape for name, t in ours.items()} != {name: t.shape for name, t in theirs.items()}:
        raise CheckpointError(f"checkpoint {path} is of another architecture than the one in model.py")
    net.load_state_dict(theirs)
