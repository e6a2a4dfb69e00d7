"""How fast the parts are, against the plain loop of most tutorials: ``python -m tools.benchmark`` prints one table.

The plain loop: per image PIL -> numpy -> the five transforms -> float32 tensor; a default DataLoader, with 2 workers
for training and validation; float32; contiguous tensors; `.item()` at every step; a process of its own. All is measured
in turn, so that what else the machine does strikes all alike; a figure is the median over the rounds, with their
spread. Augmentation has the specification's probabilities (0.3) on both sides.
"""

import argparse
import functools
import multiprocessing
import operator
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from config import UsageError, check, config
from dataset import A, ImageDataset, channel_statistics, make_augmentation, make_loader  # A: albumentations, offline
from model import Net
from parts.command_line import in_one_line
from parts.images import Split, load_source
from parts.speed import keep_freed_memory
from train import make_optimizers, train_one_epoch, train_step, validate
from utils import DTYPES, choose_device, choose_precision, choose_workers, device_name, set_numerics

BATCH_SIZE = 128
TABLE = "| {:36} | {:28} | {:34} | {:6} |"
SPECIFIED = {f"{name}_probability": 0.3 for name in ("flip", "shift_scale_rotate", "coarse_dropout")}
SPECIFIED |= {"shift_limit": 0.0625, "scale_limit": 0.1, "rotate_limit": 15.0, "hole_size": 16}


class Options(NamedTuple):
    """The command line, with its defaults."""

    dataset: str = "shapes"
    data_dir: str = "data"
    device: str = "auto"
    precision: str = "auto"
    rounds: int = 7
    images: int = 1152  # a multiple of the batch size


def load_images(options: Options) -> tuple[Split, list[str]]:
    """Return as many of the dataset's training images as are wanted, and its class names."""
    (images, labels), _, class_names = load_source(options.dataset, options.data_dir)
    if len(labels) < options.images:
        raise UsageError(f"--images must be at most {len(labels):,}, all that {options.dataset} has to train on")
    return (images[: options.images], labels[: options.images]), class_names


class PlainImages(Dataset):
    """Images as most tutorials read them."""

    def __init__(self, split: Split, training: bool):
        self.images, self.labels = split
        mean, std = channel_statistics(self.images)
        augmentation = [
            A.HorizontalFlip(p=0.3),
            A.Affine(scale=(0.9, 1.1), translate_percent=(-0.0625, 0.0625), rotate=(-15, 15), p=0.3),
            A.CoarseDropout((1, 1), (16, 16), (16, 16), fill=tuple(255 * channel for channel in mean), p=0.3),
        ]
        self.transform = A.Compose([*(augmentation if training else ()), A.Normalize(mean, std), A.ToTensorV2()])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.transform(image=np.array(Image.fromarray(self.images[index])))["image"]
        return image, int(self.labels[index])


def plain_epoch(net: nn.Module, loader: Iterable, device: str, optimizer: torch.optim.SGD | None = None) -> None:
    """Train for an epoch, or validate without an optimizer."""
    net.train(optimizer is not None)
    loss_sum = correct = 0.0
    with torch.set_grad_enabled(optimizer is not None):
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            log_probs = net(images)
            loss = F.nll_loss(log_probs, labels)
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            loss_sum += loss.item()
            correct += log_probs.argmax(dim=1).eq(labels).sum().item()


@functools.cache  # made at the first call in the plain loop's process
def plain_functions(options: Options) -> dict[str, Callable[[], None]]:
    """Return functions of the plain loop, each of which handles every image once, by the names of their rows."""
    device, (split, names) = options.device, load_images(options)
    augmented, plain = PlainImages(split, training=True), PlainImages(split, training=False)
    loader = DataLoader(augmented, BATCH_SIZE, shuffle=True, num_workers=2)
    test_loader = DataLoader(plain, BATCH_SIZE, num_workers=2)
    pipeline, plain_pipeline = DataLoader(augmented, BATCH_SIZE, shuffle=True), DataLoader(plain, BATCH_SIZE)
    net = Net(num_classes=len(names)).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    return {
        "training": lambda: plain_epoch(net, loader, device, optimizer),
        "validation": lambda: plain_epoch(net, test_loader, device),
        "augmented input": lambda: sum(1 for _ in pipeline),
        "input without augmentation": lambda: sum(1 for _ in plain_pipeline),
    }


def plain_seconds(name: str, options: Options) -> float:
    """Return the seconds that a function of the plain loop takes."""
    return seconds(plain_functions(options)[name], options.device)


def our_functions(options: Options) -> dict[str, Callable[[], None]]:
    """Return the same of this project, and "bare steps": on batches that are on the device already."""
    settings, (split, names), device = replace(config, **SPECIFIED), load_images(options), torch.device(options.device)
    mean, std = channel_statistics(split[0])
    plain = ImageDataset(*split, names, mean, std)
    augmented = ImageDataset(*split, names, mean, std, make_augmentation(settings, mean))
    loader = make_loader(augmented, BATCH_SIZE, shuffle=True, num_workers=choose_workers(-1, device))
    pipeline, plain_pipeline = make_loader(augmented, BATCH_SIZE, shuffle=True), make_loader(plain, BATCH_SIZE)
    net = Net(num_classes=len(names)).to(device, memory_format=torch.channels_last)
    optimizers, dtype = make_optimizers(net, settings), DTYPES[options.precision]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step = functools.partial(train_step, dtype=dtype, scaler=scaler)
    placed = [(images.to(device, memory_format=torch.channels_last), y.to(device)) for images, y in plain_pipeline]
    return {
        "training": lambda: train_one_epoch(net, loader, optimizers, step=step),
        "bare steps": lambda: [step(net, *batch, optimizers) for batch in placed],  # net is still in training mode
        "validation": lambda: validate(net, plain_pipeline, dtype),
        "augmented input": lambda: sum(1 for _ in pipeline),
        "input without augmentation": lambda: sum(1 for _ in plain_pipeline),
    }


def seconds(function: Callable[[], None], device: str) -> float:
    """Return the seconds that a call takes, work queued on the device included."""
    begin = time.perf_counter()
    function()
    if device != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - begin


def rate(count: int, times: Iterable[float]) -> str:
    """Return images per second: the median and its spread."""
    rates = sorted(count / time for time in times)
    return f"{statistics.median(rates):,.0f} ({rates[0]:,.0f} to {rates[-1]:,.0f})"


def throughput(options: Options, plain: ProcessPoolExecutor) -> Iterator[tuple[str, ...]]:
    """Yield rows: ours, plain, and the median of their ratios; also the steps alone, and the loop around them."""
    timed, compared = {}, {}
    for name, function in our_functions(options).items():
        compared[name] = ("whole loop", "training") if name == "bare steps" else ("plain", f"{name}, plain")
        if name != "bare steps":
            timed[f"{name}, plain"] = lambda name=name: plain.submit(plain_seconds, name, options).result()
        timed[name] = lambda function=function: seconds(function, options.device)
    rounds = [{name: function() for name, function in timed.items()} for _ in range(options.rounds + 1)]
    times = {name: [times[name] for times in rounds[1:]] for name in timed}  # the first one was to warm up
    for name, (label, other) in compared.items():
        ratio = statistics.median(map(operator.truediv, times[other], times[name]))
        here, there = rate(options.images, times[name]), rate(options.images, times[other])
        yield f"{name}, images/s", here, f"{label}: {there}", f"{ratio:.2f}x"


def main(argv: list[str] | None = None) -> None:
    """Measure as the command line says; print the table."""
    parser = argparse.ArgumentParser("python -m tools.benchmark", description="Measure speed against a plain loop.")
    for name, default in Options()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"({default})")
    options = Options(**vars(parser.parse_args(argv)))
    if min(options.rounds, options.images) < 1:
        raise UsageError("--rounds and --images must be above 0")
    check(replace(config, dataset=options.dataset, data_dir=options.data_dir, precision=options.precision))
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as plain:
        plain.submit(os.getpid).result()  # forked here, before torch has threads or CUDA, or the memory is kept
        keep_freed_memory()
        set_numerics(deterministic=False)
        device = choose_device(options.device)
        options = options._replace(device=str(device), precision=choose_precision(options.precision, device))
        print(f"{device_name(device)}, {options.precision}, torch {torch.__version__}, {options.dataset}\n")
        print(TABLE.format("", "here", "compared with", "ratio"))
        print(TABLE.format("", "", "", "").replace(" ", "-"))
        for row in throughput(options, plain):
            print(TABLE.format(*row), flush=True)


if __name__ == "__main__":
    in_one_line("tools.benchmark", main)
