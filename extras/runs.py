"""A run's folder: open it to see what a run leaves on the disk, and how it is continued as if it had not stopped."""

import contextlib
import hashlib
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import nn

from config import Config, UsageError, check
from dataset import Datasets
from extras.architecture import describe_network, load_weights
from extras.distributed import of_first_process, wait_for_all
from extras.failures import only_warn, warn
from extras.files import write_atomically
from utils import load_checkpoint, save_checkpoint

CONFIG, METRICS, LAST, BEST = "config.json", "metrics.csv", "last.pt", "best.pt"  # a run's files
LOCK_TIMEOUT = 10  # seconds; the workers of a killed run live for five, and may keep its lock
# What may change when a run is continued.
CHANGEABLE = {"epochs", "num_workers", "device", "precision", "compile", "data_dir"}


class Run:
    """An open run: `restore` continues it, `save` writes an epoch. Of several processes, only rank 0 writes."""

    def __init__(self, config: Config, data: Datasets, report: bool, rank: int, world_size: int):
        self.config, self.folder, self.rank, self.report = config, Path(config.run_dir), rank, report
        self.drawn = -math.inf  # when the curves were last drawn
        digest = hashlib.sha256()
        for dataset in data:
            digest.update(dataset.images.numpy())
            digest.update(dataset.labels.numpy())
        # The same in all checkpoints of the run.
        self.facts = {
            "config": asdict(config),
            "class_names": data.train.class_names,
            "mean": data.train.mean,
            "std": data.train.std,
            "images": digest.hexdigest(),
            "processes": world_size,
        }

    def restore(
        self, net: nn.Module, optimizers: Sequence[torch.optim.Optimizer], scaler: torch.amp.GradScaler
    ) -> list:
        """Load the last checkpoint, if any epoch is finished; return the metrics of each epoch so far.

        Raises UsageError for a checkpoint of other images or settings, of another network or other optimizers.
        """
        rows = []
        self.facts["network"] = describe_network(net)  # now: a module that counts its calls will change
        if (self.folder / LAST).exists():
            checkpoint = load_checkpoint(self.folder / LAST)
            self._compare(checkpoint)
            load_weights(net, checkpoint, self.folder / LAST)
            try:
                for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
                    optimizer.load_state_dict(state)
            except ValueError as error:
                raise UsageError(f"the optimizers are not those that this run began with ({error})") from None
            if checkpoint["scaler"]:  # empty but for float16
                scaler.load_state_dict(checkpoint["scaler"])
            rows = checkpoint["metrics"]
            print(f"Continuing after epoch {len(rows)}")
            if self.rank == 0:
                self._follow_last(checkpoint)
                checkpoint_to_test(self.folder)  # warns if best.pt is needed and gone
        elif (self.folder / BEST).exists():
            raise UsageError(f"{self.folder / LAST} is gone, and the run cannot be continued without it")
        if self.facts["processes"] > 1 and of_first_process(len(rows)) != len(rows):
            raise UsageError(f"run_dir {self.folder} is not the same for all processes: name one that all see")
        if self.rank == 0:
            write_atomically(self.folder / CONFIG, json.dumps(asdict(self.config), indent=2).encode() + b"\n")
        return rows

    def save(self, rows: list, net: nn.Module, optimizers: Sequence, scaler: torch.amp.GradScaler) -> None:
        """Write the files of a finished epoch. It counts as saved once it is in last.pt; the others follow from that.

        Raises RunStopped if they cannot be written.
        """
        if self.rank > 0:
            return
        states = {
            "model": net.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "scaler": scaler.state_dict(),
        }
        checkpoint = {**self.facts, "epoch": len(rows), "metrics": rows, **states}
        save_checkpoint(self.folder / LAST, checkpoint)
        self._follow_last(checkpoint)
        if self.report and time.monotonic() - self.drawn > 5:  # on a GPU an epoch is faster than its picture
            with only_warn("curves.png"):
                from extras.report import CURVES, plot_curves, save_figure  # here: matplotlib is slow to import

                save_figure(plot_curves(rows), self.folder / CURVES)
            self.drawn = time.monotonic()

    def _compare(self, checkpoint: dict) -> None:
        """Raise UsageError if the run cannot be continued as it is; say so if it has another number of processes."""
        done, before, now = checkpoint["epoch"], checkpoint["processes"], self.facts["processes"]
        if any(self.facts[name] != checkpoint[name] for name in ("class_names", "images")):
            where = self.config.data_dir
            raise UsageError(f"the images in {where} are not those that this run began with: give --data-dir")
        epochs, schedule = checkpoint["config"]["epochs"], self.config.schedule
        if self.config.epochs != epochs and schedule in ("onecycle", "cosine"):
            raise UsageError(f"epochs cannot change: the {schedule} schedule was laid out for {epochs}")
        if self.config.epochs < done:
            raise UsageError(f"epochs cannot become {self.config.epochs}: {done} are done already")
        for name in sorted(self.facts["config"].keys() - CHANGEABLE - {"run_dir"}):
            begun, here = checkpoint["config"][name], self.facts["config"][name]
            if begun != here:
                raise UsageError(f"{name} is {here!r} in {CONFIG}, and this run began with {begun!r}: put that back")
        if before != now:
            print(f"Note: processes: {before} before, {now} now: no longer bit for bit the undisturbed run")

    def _follow_last(self, checkpoint: dict) -> None:
        """Bring best.pt and metrics.csv up to last.pt, after an epoch or after a kill that came in between."""
        rows = checkpoint["metrics"]
        if best_row(rows) is rows[-1]:
            save_checkpoint(self.folder / BEST, checkpoint)
        lines = [rows[0].keys(), *(row.values() for row in rows)]
        text = "".join(",".join(map(str, line)) + "\n" for line in lines)  # numbers only: nothing to quote
        write_atomically(self.folder / METRICS, text.encode())


@contextlib.contextmanager
def open_run(
    config: Config, data: Datasets, resume: bool = False, report: bool = True, rank: int = 0, world_size: int = 1
) -> Iterator[Run]:
    """Create a run's folder, or open that of a run to resume, and lock it. report: whether to draw curves.

    Raises UsageError if the folder cannot be written, is in use, or holds another run.
    """
    run = Run(config, data, report, rank, world_size)
    if rank > 0:
        wait_for_all()
        yield run
        return
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run.folder / ".lock").acquire(timeout=LOCK_TIMEOUT if resume else 0)
    except Timeout:
        raise UsageError(f"run_dir {run.folder} is in use by another run: wait for its end, or name another") from None
    except OSError as error:
        raise UsageError(f"run_dir {run.folder} cannot be written ({error.strerror})") from None
    with lock:
        if not resume and any((run.folder / name).exists() for name in (CONFIG, LAST, BEST)):
            raise UsageError(f"run_dir {run.folder} holds a run: --resume continues it, --run-dir names another")
        for name in (CONFIG, METRICS, LAST, BEST, "*.png", "report.md"):
            for leftover in run.folder.glob(f"{name}.*.tmp"):  # of a run that was killed while it wrote
                leftover.unlink(missing_ok=True)
        if world_size > 1:
            wait_for_all()  # the others read the run only now: until it was locked, another might have gone on with it
        yield run


def best_row(rows: Sequence[dict]) -> dict:
    """Return the metrics of the epoch with the best validation accuracy, the first of equals."""
    return max(rows, key=lambda row: row["valid_accuracy"])


def checkpoint_to_test(run_dir: str | Path) -> Path:
    """Return a run's checkpoint to test: best.pt if held-out images chose it and it can be read, else last.pt."""
    last, best = Path(run_dir, LAST), Path(run_dir, BEST)
    if load_checkpoint(last)["config"]["valid_split"] > 0:
        try:
            load_checkpoint(best)
            return best
        except UsageError:
            warn(f"{best} is gone or damaged: {LAST} is tested in its place, until an epoch is better")
    return last


def read_config(settings: dict, where: str | Path) -> Config:
    """Return the Config of saved settings, ignoring those that this version does not have.

    Raises UsageError, naming where they were, for one that cannot be used.
    """
    names = {field.name for field in fields(Config)}
    config = Config(**{name: value for name, value in settings.items() if name in names})
    try:
        check(config)
    except UsageError as error:
        raise UsageError(f"the settings saved in {where} cannot be used ({error})") from None
    return config


def resumed_config(run_dir: str, given: dict) -> Config:
    """Return the settings of the run in run_dir, changed by those given now. Raises UsageError if it cannot go on."""
    path = Path(run_dir, CONFIG)
    try:
        settings = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        if not Path(run_dir, LAST).exists():
            raise UsageError(f"{run_dir} holds no run: {CONFIG} cannot be read ({error})") from None
        settings = load_checkpoint(Path(run_dir, LAST))["config"]
    if others := sorted(settings.keys() ^ {field.name for field in fields(Config)}):
        raise UsageError(f"{run_dir} was begun by another version ({others[0]} differs): resume the run with that one")
    return replace(read_config(settings, path), run_dir=run_dir, **given)


def describe_progress(run_dir: str, resumable: bool, launcher: str) -> str:
    """Return what is saved of a run that ended early and, if it makes sense, the command that continues it.

    launcher: what comes before train.py in that command.
    """
    if not Path(run_dir, CONFIG).exists():
        return "nothing was written"
    try:
        saved = f"epoch {load_checkpoint(Path(run_dir, LAST))['epoch']} is saved"
    except UsageError as error:
        saved = str(error) if Path(run_dir, LAST).exists() else "no epoch is finished yet"
    quote = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return f"{saved}; to continue: {launcher} {quote([sys.argv[0], '--resume', run_dir])}" if resumable else saved
