"""What a run leaves on the disk, whole at every moment: its folder, its checkpoints, its metrics file."""

import contextlib
import csv
import hashlib
import io
import json
import os
import shlex
import warnings
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import IO

import torch

from config import Config, ConfigError, check

CONFIG, METRICS, LAST, BEST = "config.json", "metrics.csv", "last.pt", "best.pt"  # a run's files

# --- a run's folder -----------------------------------------------------------------------------------


class RunError(Exception):
    """A run's folder or a checkpoint that cannot be used; the message is one line for the user."""


class WriteError(Exception):
    """A result that cannot be written; what was there before is untouched. The message is one line for the user."""


def new_run_dir() -> str:
    """Return the name of a new run's folder: runs/ and the date and time."""
    return datetime.now().strftime("runs/%Y-%m-%d_%H-%M-%S")


def refuse_second_use(run_dir: str) -> None:
    """Raise RunError if the folder holds a run already."""
    if any(Path(run_dir, name).exists() for name in (CONFIG, LAST)):
        raise RunError(f"run_dir {run_dir} holds a run already: --resume continues it, --run-dir names another folder")


def open_run_dir(run_dir: str, resume: bool) -> IO:
    """Create a new run's folder, or take one to resume; return its lock, which is held until it is closed.

    Raises RunError if the folder cannot be written, is in use, or holds a run when a new one is wanted.
    """
    folder = Path(run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise RunError(f"run_dir {folder} cannot be written ({error.strerror})") from None
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            # A record lock: unlike flock, it is not kept by the workers that outlive a killed run by seconds.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise RunError(f"run_dir {folder} is in use by another run: wait for its end, or name another folder") from None
    except OSError:
        pass  # a filesystem without locks: the run matters more than the guard
    if not resume:
        refuse_second_use(run_dir)
    for leftover in folder.glob("*.tmp"):  # of a run that was killed while it wrote
        leftover.unlink(missing_ok=True)
    return lock


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file by a whole new one: whoever reads it, at any moment, finds the old or the new content.

    Raises WriteError.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # --evaluate may report into a run's folder
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise WriteError(f"{path} cannot be written ({error.strerror})") from None
    finally:
        with contextlib.suppress(OSError):  # it has its name by now, or cannot be removed
            temporary.unlink()
    with contextlib.suppress(OSError):  # Windows and some filesystems cannot do this with a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name is on the disk only when its folder is
        finally:
            os.close(folder)


def write_config(folder: Path, config: dict) -> None:
    """Write config.json."""
    write_atomically(folder / CONFIG, json.dumps(config, indent=2).encode() + b"\n")


def write_epoch(folder: Path, checkpoint: dict) -> None:
    """Write the files of a finished epoch. It counts as saved when it is in last.pt, from which the others follow."""
    save_checkpoint(folder / LAST, checkpoint)
    follow_last(folder, checkpoint)


def follow_last(folder: Path, checkpoint: dict) -> None:
    """Bring best.pt and metrics.csv up to last.pt, after an epoch or after a kill that came in between."""
    rows = checkpoint["metrics"]
    if best_row(rows) is rows[-1]:
        save_checkpoint(folder / BEST, checkpoint)
    write_metrics(folder, rows)


def write_metrics(folder: Path, rows: list[dict]) -> None:
    """Write metrics.csv, a row for each epoch."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / METRICS, text.getvalue().encode())


def best_row(rows: list[dict]) -> dict:
    """Return the metrics of the epoch with the best validation accuracy, the first of equals."""
    return max(rows, key=lambda row: row["valid_accuracy"])


def read_settings(run_dir: str) -> dict:
    """Return a run's settings. Raises RunError if the folder holds no run, or none that can be read."""
    folder = Path(run_dir)
    try:
        settings = json.loads((folder / CONFIG).read_text())
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
        return settings
    except FileNotFoundError:
        raise RunError(f"{folder} holds no run: there is no {CONFIG}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{folder / CONFIG} cannot be read ({error})") from None


def read_config(settings: dict, where: str) -> Config:
    """Return the Config of saved settings, without those that this version does not have.

    Raises RunError, naming where they were, for one that cannot be used.
    """
    names = {field.name for field in fields(Config)}
    config = Config(**{name: value for name, value in settings.items() if name in names})
    try:
        check(config)
    except ConfigError as error:
        raise RunError(f"the settings saved in {where} cannot be used ({error})") from None
    return config


def read_last(run_dir: str) -> dict | None:
    """Return a run's last checkpoint, None if no epoch is finished yet. Raises RunError if it is damaged."""
    last = Path(run_dir, LAST)
    return load_checkpoint(last) if last.exists() else None


def describe_progress(run_dir: str, resumable: bool, launcher: str) -> str:
    """Return what is saved of a run that ended early, and the command that continues it if that makes sense.

    launcher: what comes before train.py in that command.
    """
    if not Path(run_dir, CONFIG).exists():
        return "nothing was written"
    try:
        last = read_last(run_dir)
    except RunError as error:
        return str(error)
    saved = f"epoch {last['epoch']} is saved" if last else "no epoch is finished yet"
    return f"{saved}; to continue: {launcher} train.py --resume {shlex.quote(run_dir)}" if resumable else saved


# --- checkpoints --------------------------------------------------------------------------------------

FORMAT = "s8erav3-2"


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a dict of tensors and plain values with torch.save, its SHA-256 (32 bytes) appended.

    torch checks no sum of what it reads, and finds a zip archive's end with bytes behind it, so plain
    torch.load reads these files too.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "torch": str(torch.__version__), **checkpoint}, buffer)
    data = buffer.getvalue()
    write_atomically(path, data + hashlib.sha256(data).digest())


def save_weights(path: Path, checkpoint: dict) -> None:
    """Write what evaluation and prediction need of a checkpoint: all but the optimizer's state, at half the size."""
    save_checkpoint(path, {name: part for name, part in checkpoint.items() if name not in ("optimizers", "scaler")})


def load_checkpoint(path: str | Path) -> dict:
    """Read what save_checkpoint wrote, on the CPU; nothing in the file can run (weights_only).

    Raises RunError for a file that is missing, damaged or of another format.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise RunError(f"checkpoint {path} cannot be read ({error.strerror})") from None
    data, digest = content[:-32], content[-32:]
    if hashlib.sha256(data).digest() != digest:
        raise RunError(f"checkpoint {path} is damaged, or not one of this program: its SHA-256 does not match")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the unpickler's, on files of other programs
            checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # whatever the unpickler meets in a file that this program did not write
        raise RunError(f"checkpoint {path} holds more than tensors and plain values: it is not loaded") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise RunError(f"checkpoint {path} is not of format {FORMAT}: another version of this program wrote it")
    return checkpoint


def load_weights(net: torch.nn.Module, checkpoint: dict) -> None:
    """Load a checkpoint's weights; raise RunError, the network unchanged, if they are another network's."""
    ours, theirs = net.state_dict(), checkpoint["model"]
    if {name: t.shape for name, t in ours.items()} != {name: t.shape for name, t in theirs.items()}:
        raise RunError("the checkpoint is of another architecture than the one in model.py")
    net.load_state_dict(theirs)
