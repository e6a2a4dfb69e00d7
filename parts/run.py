"""A run's folder: open it to see what a run leaves on the disk, and how it is continued as if it had not stopped."""

import hashlib
import json
import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import nn

from config import Config, UsageError
from parts.distributed import of_first, rank_and_size
from utils import load_checkpoint, save_checkpoint

CONFIG, METRICS, LAST, BEST = "config.json", "metrics.csv", "last.pt", "best.pt"  # a run's files
# What may change when a run is continued; epochs too, where the schedule does not depend on them.
CHANGEABLE = {"num_workers", "device", "precision", "compile", "data_dir"}


class Run:
    """A run in its folder: `restore` continues or begins it, `save` writes an epoch.

    last.pt is the only truth: what resumes reads nothing else, and the other files follow from it. Of several
    processes, only the first one reads and writes.
    """

    def __init__(self, asked: Config, config: Config, data: Sequence, net: nn.Module):
        """Note what the run is made of: data (train, valid, test), net as it is before the training changes it.

        asked: the settings as they were given, of which a device "auto" is kept; config: as they became.
        """
        self.folder, self.schedule, (self.rank, processes) = Path(config.run_dir), config.schedule, rank_and_size()
        train = data[0]
        made_with = {"num_classes": len(train.class_names), "dropout": config.dropout}  # a network of one's own
        # The same in all checkpoints of the run. No run_dir: the folder can be moved.
        self.facts = {
            "config": {**asdict(asked), "precision": config.precision},
            "class_names": train.class_names,
            "mean": train.mean,
            "std": train.std,
            "images": {part: digest(split) for part, split in zip(("train", "valid", "test"), data, strict=True)},
            "augmentation": describe_augmentation(train.augmentation),
            "network": getattr(net, "arguments", made_with),
            "modules": [f"{name} {type(module).__name__}" for name, module in net.named_modules()],
            "processes": processes,
        }
        del self.facts["config"]["run_dir"]

    def restore(self, net: nn.Module, optimizers: Sequence, scaler: torch.amp.GradScaler, resume: bool) -> list:
        """Load the last checkpoint, or begin a run by writing that of epoch 0; return the metrics of each epoch so far.

        Raises UsageError for a folder that holds another run, and for a checkpoint of other images or settings, of
        another augmentation, network or optimizers.
        """
        path = self.folder / LAST
        checkpoint = of_first(load_checkpoint(path) if self.rank == 0 and (resume or path.exists()) else None)
        if not resume:
            if self.rank == 0 and ((checkpoint and checkpoint["metrics"]) or (self.folder / BEST).exists()):
                raise UsageError(f"run_dir {self.folder} holds a run: --resume continues it, --run-dir names another")
            if self.rank == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
            self.save([], net, optimizers, scaler)
            return []
        self._compare(checkpoint, net)
        net.load_state_dict(checkpoint["model"])
        try:
            for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        except ValueError as error:
            raise UsageError(f"the optimizers are not those that this run began with ({error})") from None
        if checkpoint["scaler"]:  # empty but for float16
            scaler.load_state_dict(checkpoint["scaler"])
        print(f"Continuing after epoch {checkpoint['epoch']}")
        if self.rank == 0:
            self._follow(checkpoint | self.facts)
            if self.facts["config"]["valid_split"] > 0 and checkpoint["metrics"]:
                load_checkpoint(self.folder / BEST)  # it is tested at the run's end: now is the time to miss it
        return checkpoint["metrics"]

    def save(self, rows: list, net: nn.Module, optimizers: Sequence, scaler: torch.amp.GradScaler) -> None:
        """Write the files of a finished epoch. It counts as saved once it is in last.pt; the others follow from that."""
        if self.rank > 0:
            return
        states = {
            "model": {name: tensor.contiguous() for name, tensor in net.state_dict().items()},  # as safetensors wants
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "scaler": scaler.state_dict(),
        }
        checkpoint = {**self.facts, "epoch": len(rows), "metrics": rows, **states}
        save_checkpoint(self.folder / LAST, checkpoint)
        self._follow(checkpoint)

    def best_weights(self) -> dict:
        """Return the weights of the epoch with the best validation accuracy."""
        return of_first(load_checkpoint(self.folder / BEST)["model"] if self.rank == 0 else None)

    def _follow(self, checkpoint: dict) -> None:
        """Bring the other files up to last.pt, after an epoch or after a kill that came in between."""
        rows = checkpoint["metrics"]
        (self.folder / CONFIG).write_text(json.dumps(checkpoint["config"], indent=2) + "\n")
        if rows:
            if best_row(rows) is rows[-1]:
                save_checkpoint(self.folder / BEST, checkpoint)
            lines = [rows[0].keys(), *(row.values() for row in rows)]
            text = "".join(",".join(map(str, line)) + "\n" for line in lines)  # numbers only: nothing to quote
            (self.folder / METRICS).write_text(text)

    def _compare(self, checkpoint: dict, net: nn.Module) -> None:
        """Raise UsageError if the run cannot be continued as it is; say so if it has another number of processes."""
        done, begun, here = checkpoint["epoch"], checkpoint["config"], self.facts["config"]
        for part, sha in self.facts["images"].items():
            if sha != checkpoint["images"][part] or self.facts["class_names"] != checkpoint["class_names"]:
                raise UsageError(f"the {part} images are not those that this run began with: give --data-dir")
        for name in sorted(here.keys() - CHANGEABLE - {"epochs"}):
            if begun[name] != here[name]:
                raise UsageError(f"{name} is {here[name]!r} now, and this run began with {begun[name]!r}: keep that")
        if here["epochs"] != begun["epochs"] and here["schedule"] in ("onecycle", "cosine"):
            raise UsageError(f"epochs cannot change: the {here['schedule']} schedule is laid out for {begun['epochs']}")
        if here["epochs"] < done:
            raise UsageError(f"epochs cannot become {here['epochs']}: {done} are done already")
        if self.facts["augmentation"] != checkpoint["augmentation"]:
            raise UsageError("make_augmentation makes another pipeline than the one that this run began with")
        shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
        same = all(self.facts[name] == checkpoint[name] for name in ("network", "modules"))
        if not same or shapes != {name: tensor.shape for name, tensor in checkpoint["model"].items()}:
            raise UsageError("model.py makes another network than the one that this run began with")
        if self.facts["processes"] != checkpoint["processes"]:
            before, now = checkpoint["processes"], self.facts["processes"]
            print(f"Note: processes: {before} before, {now} now: no longer bit for bit the undisturbed run")


def digest(split) -> str:
    """Return the SHA-256 of a dataset's images and labels."""
    sha = hashlib.sha256(split.images.numpy())
    sha.update(split.labels.numpy())
    return sha.hexdigest()


def describe_augmentation(augmentation) -> list[str]:
    """Return a line for each transform of a pipeline: its repr or, if it has none, its class's name."""
    lines = []
    for transform in augmentation or ():
        try:
            lines.append(re.sub(" at 0x[0-9a-f]+", "", repr(transform)))  # a function's address is new in each process
        except Exception:  # of an A.Lambda without a name, or a class of one's own
            lines.append(type(transform).__name__)
    return lines


def best_row(rows: Sequence[dict]) -> dict:
    """Return the metrics of the epoch with the best validation accuracy, the first of equals."""
    return max(rows, key=lambda row: row["valid_accuracy"])


def resumed_config(run_dir: str, given: dict) -> Config:
    """Return the settings of the run in run_dir, changed by those given now. Raises UsageError if it holds none."""
    path = Path(run_dir, LAST)
    if not path.exists():
        raise UsageError(f"{run_dir} holds no run: there is no {LAST}")
    settings = load_checkpoint(path)["config"] | {"run_dir": run_dir}
    if others := sorted(settings.keys() ^ {field.name for field in fields(Config)}):
        raise UsageError(f"{path} is of another version of config.py: the setting {others[0]} differs")
    return Config(**(settings | given))


def describe_progress(run_dir: str, launcher: str, resumable: bool = True) -> str:
    """Return what is saved of a run that ended early and, if it makes sense, the command that continues it.

    launcher: what comes before train.py in that command.
    """
    path = Path(run_dir, LAST)
    if not path.exists():
        return "nothing is saved"
    try:
        checkpoint = load_checkpoint(path)
    except UsageError as error:
        return str(error)
    saved = f"epoch {checkpoint['epoch']} of {checkpoint['config']['epochs']} is saved in {run_dir}"
    quote = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return f"{saved}; to continue: {launcher} {quote(['train.py', '--resume', str(run_dir)])}" if resumable else saved
