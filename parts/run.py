"""A run's folder: open it to see what a run leaves on the disk, and how it is continued as if it had not stopped."""

import csv
import hashlib
import importlib.metadata
import itertools
import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import cv2
import torch
from torch import nn

from config import Config, UsageError
from parts.distributed import of_first
from utils import device_name, load_checkpoint, rank_and_size, save_checkpoint

CONFIG, METRICS, LAST, BEST = "config.json", "metrics.csv", "last.pt", "best.pt"  # a run's files
CHANGEABLE = {"num_workers", "device", "precision", "compile", "data_dir"}  # and epochs, if the schedule allows it


class Run:
    """A run in its folder: `restore` begins or continues it, `save` writes an epoch. last.pt is its only truth."""

    def __init__(self, asked: Config, config: Config, data: Sequence, net: nn.Module, origin: dict):
        """Note what the run is made of: asked, its settings as given; config, with "auto" resolved; origin."""
        self.folder, self.origin, train = Path(config.run_dir), origin, data[0]
        self.rank, processes = rank_and_size()
        arguments = (own := getattr(net, "arguments", None) or {}) | arguments_of(config, train.class_names)
        became = {"precision": config.precision, "activation": arguments.get("activation", config.activation)}
        # The same in all checkpoints of the run. No run_dir: the folder can be moved. Precision: what "auto" became.
        self.facts = {
            "config": {**asdict(asked), **became},
            **{name: getattr(train, name) for name in ("class_names", "mean", "std")},
            "images": [sha256(dataset) for dataset in data],
            "weights": origin.get("weights", ""),  # SHA-256 of the file that it began with
            "augmentation": [describe(transform) for transform in train.augmentation or ()],
            "arguments": arguments,
            "network": [f"made with {own or arguments}"]
            + [f"{name} {type(module).__name__}" for name, module in net.named_modules()]
            + [f"{name} {list(tensor.shape)}" for name, tensor in net.state_dict().items()],
            "made_by": [what_makes(config.device)],  # of the first epoch; then one of each resume
            "processes": processes,
        }
        del self.facts["config"]["run_dir"]

    def restore(self, net: nn.Module, optimizers: Sequence, scaler: torch.amp.GradScaler, resume: bool) -> list:
        """Load the last checkpoint, or begin by writing that of epoch 0; return the metrics of each epoch so far."""
        last, best = self.folder / LAST, self.folder / BEST
        checkpoint = load_checkpoint(last) if self.rank == 0 and (resume or last.exists()) else None
        if not resume:
            if self.rank == 0 and ((checkpoint and checkpoint["epoch"]) or best.exists()):
                raise UsageError(f"run_dir {self.folder} holds a run: --resume continues it, --run-dir names another")
            if self.origin:
                self._begin_with_weights(net)
            self.save([], net, optimizers, scaler)
            return []
        checkpoint = of_first(checkpoint)
        self._compare(checkpoint)
        net.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        scaler.load_state_dict(checkpoint["scaler"] or scaler.state_dict())  # empty but for float16
        print(f"Continuing after epoch {checkpoint['epoch']}")
        self.facts["made_by"] = [*checkpoint["made_by"], *self.facts["made_by"]]
        before, now = (maker["modules"] for maker in self.facts["made_by"][-2:])
        if changed := [name for name in now if now[name] != before.get(name)]:
            print(f"Note: changed since this run was begun or last continued: {', '.join(changed)}")
        if self.rank == 0:
            save_checkpoint(last, checkpoint | self.facts)  # with the settings that were changed now
            self._follow(checkpoint | self.facts)
        return checkpoint["metrics"]

    def save(self, rows: list, net: nn.Module, optimizers: Sequence, scaler, right: torch.Tensor | None = None) -> None:
        """Write the files of a finished epoch. It counts as saved once it is in last.pt; the others follow from it."""
        if self.rank > 0:
            return
        checkpoint = self.facts | {
            "epoch": len(rows),
            "metrics": rows,
            "model": {name: tensor.contiguous() for name, tensor in net.state_dict().items()},  # as safetensors wants
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "scaler": scaler.state_dict(),
            "right": right,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(self.folder / LAST, checkpoint)
        self._follow(checkpoint)

    def best_weights(self) -> dict:
        """Return the weights of the epoch with the best validation accuracy."""
        return of_first(load_checkpoint(self.folder / BEST)["model"] if self.rank == 0 else None)

    def _begin_with_weights(self, net: nn.Module) -> None:
        """Load the weights of the origin, without the last layer's if its classes are others."""
        weights, last = self.origin["model"], list(self.origin["model"])[-1].rpartition(".")[0]
        if self.origin["class_names"] != self.facts["class_names"]:
            print(f"The class names differ from those of the weights: {last} begins anew")
            weights |= {name: new for name, new in net.state_dict().items() if name.startswith(f"{last}.")}
        net.load_state_dict(weights)

    def _follow(self, checkpoint: dict) -> None:
        """Bring the other files up to last.pt, after an epoch or after a kill that came in between."""
        rows = checkpoint["metrics"]
        (self.folder / CONFIG).write_text(json.dumps(checkpoint["config"], indent=2) + "\n")
        if rows:
            if max(rows, key=lambda row: row["valid_accuracy"]) is rows[-1]:
                save_checkpoint(self.folder / BEST, checkpoint)
            with open(self.folder / METRICS, "w", newline="") as file:
                names = dict.fromkeys(itertools.chain(*rows))  # an edit may have added one since the run began
                csv.writer(file, lineterminator="\n").writerows([names, *([row.get(n) for n in names] for row in rows)])

    def _compare(self, checkpoint: dict) -> None:
        """Raise UsageError if the run cannot be continued as it is; say so if it has another number of processes."""
        made_of = ("class_names", "images", "augmentation", "network")  # in the order in which one follows from another
        before, now = (facts["config"] | {name: facts[name] for name in made_of} for facts in (checkpoint, self.facts))
        for name in (name for name in now if name not in CHANGEABLE):
            was, became = before[name], now[name]
            if was != became and (name != "epochs" or now["schedule"] not in ("plateau", "constant")):
                if isinstance(was, list):  # the first difference
                    was, became = next(pair for pair in itertools.zip_longest(was, became) if pair[0] != pair[1])
                why = f" ({now['schedule']} is spread over them)" if name == "epochs" else ""
                raise UsageError(f"{name} cannot change{why}: {was!r} when this run began, {became!r} now")
        if now["epochs"] < checkpoint["epoch"]:
            raise UsageError(f"epochs cannot become {now['epochs']}: {checkpoint['epoch']} are done already")
        if self.facts["processes"] != checkpoint["processes"]:
            print(f"Note: not bit for bit the undisturbed run, which had {checkpoint['processes']} processes")


def load_origin(config: Config, resume: bool) -> dict:
    """Return the checkpoint that config.weights names, if any, with its SHA-256; a resumed run has all in last.pt."""
    if not config.weights:
        return {}
    path = Path(config.run_dir, LAST) if resume else Path(config.weights).expanduser()
    return load_checkpoint(path) | ({} if resume else {"weights": hashlib.sha256(path.read_bytes()).hexdigest()})


def arguments_of(config: Config, class_names: Sequence[str], origin: dict | None = None) -> dict:
    """Return what to make the network with: Net (origin given), or one of your own (num_classes and dropout alone)."""
    arguments = {"num_classes": len(class_names), "dropout": float(config.dropout)}  # 0 is written like 0.0
    if origin is None:
        return arguments
    if (made := origin.get("network", ["", " Net"])[1].strip()) != "Net":  # [1]: the net itself; old files: none
        raise UsageError(f"the weights are of a network of your own ({made}): pass it to main as net=")
    table = origin.get("arguments", {"activation": config.activation})  # origin is {} if there is no --weights
    if (learnt := table.get("activation", "relu")) != config.activation:
        raise UsageError(f"activation must be {learnt}, with which the weights were learnt, not {config.activation}")
    return table | {"image_size": config.image_size} | arguments


def what_makes(device: str) -> dict:
    """Return what makes a run here and now: its modules' text, git's commit, versions, device, command line."""
    root = Path(__file__).parent.parent
    files = sorted([*root.glob("[!.]*.py"), *root.glob("parts/[!.]*.py")])
    failed, commit = subprocess.getstatusoutput(f"git -C {shlex.quote(str(root))} rev-parse HEAD")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "albumentations")}
    return {
        "modules": {str(path.relative_to(root)): path.read_text(encoding="utf-8", errors="replace") for path in files},
        "commit": "" if failed else commit,
        "versions": {"Python": platform.python_version(), "OpenCV": cv2.__version__, **versions},
        "device": device_name(torch.device(device)),
        "command": shlex.join(sys.argv),
    }


def sha256(dataset) -> str:
    """Return the SHA-256 of a dataset's images, and that of its labels."""
    return " ".join(hashlib.sha256(part.numpy()).hexdigest() for part in (dataset.images, dataset.labels))


def describe(transform) -> str:
    """Return a transform's repr or, if that fails, as of an A.Lambda or a class of one's own, its class's name."""
    try:
        return re.sub(" at 0x[0-9a-f]+", "", repr(transform))  # a function's address is new in each process
    except Exception:
        return type(transform).__name__


def resumed_config(run_dir: str, given: dict) -> Config:
    """Return the settings of the run in run_dir, changed by those given now. Raises UsageError if it holds none."""
    path = Path(run_dir, LAST)
    settings = load_checkpoint(path)["config"] | {"run_dir": run_dir}
    if others := settings.keys() ^ {field.name for field in fields(Config)}:
        raise UsageError(f"{path} is of another version of config.py: the setting {min(others)} differs")
    return Config(**(settings | given))


def describe_progress(run_dir: str, launcher: str, resumable: bool) -> str:
    """Return what is saved of a run that ended early and, if it makes sense, the command that continues it."""
    path = Path(run_dir, LAST)
    try:
        checkpoint = load_checkpoint(path)
    except UsageError as error:
        return str(error) if path.exists() else "nothing is saved"
    saved = f"epoch {checkpoint['epoch']} of {checkpoint['config']['epochs']} is saved in {run_dir}"
    return f"{saved}; to continue: {launcher} train.py --resume {shlex.quote(run_dir)}" if resumable else saved
