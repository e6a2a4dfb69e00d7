"""Train the network: ``python train.py``; ``python train.py --help`` lists the settings."""

import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta

import torch
from torch import nn
from torch.nn import functional as F

from config import Config, check
from dataset import load_datasets, make_loader
from model import Net, print_summary
from parts.distributed import share_statistics, share_training
from parts.muon import Muon
from parts.run import Run, arguments_of, load_origin
from parts.speed import faster_step, keep_freed_memory
from utils import DTYPES, Meter, device_name, forward, rank_and_size, resolve, seed_torch, set_numerics, with_progress


def make_optimizers(net: nn.Module, config: Config) -> list[torch.optim.Optimizer]:
    """Return [Muon, SGD] if config.optimizer is "muon" and there are weights for it, else [SGD].

    Muon gets the weights of the convolutions that mix channels, but not of the last layer. SGD gets the rest,
    at ten times the learning rate; without Muon, everything, at the rate itself. Biases and BatchNorm have no decay.
    """
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d) and module.groups == 1]
    last = [None, *(p for p in net.parameters() if p.ndim > 1)][-1]  # the classifier's weights: those registered last
    mixing = [conv.weight for conv in convolutions if conv.weight is not last and conv.weight.requires_grad]
    muon_params = {"muon": mixing, "sgd": []}[config.optimizer]  # KeyError: an optimizer without a branch here
    sgd_params = [p for p in net.parameters() if p not in set(muon_params)]  # `in` a list would compare values
    ratio = 10 if muon_params else 1  # of SGD's learning rate to Muon's; 3 was tried: results/README.md
    decay, no_decay = [p for p in sgd_params if p.ndim > 1], [p for p in sgd_params if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": config.sgd_weight_decay}, {"params": no_decay, "weight_decay": 0}]
    lr = config.learning_rate
    fused = config.precision != "float16"  # faster; but a first step that overflows leaves its momentum uninitialized
    sgd = torch.optim.SGD(groups, ratio * lr, config.momentum, nesterov=config.nesterov, fused=fused)
    return [Muon(muon_params, lr, weight_decay=config.weight_decay), sgd] if muon_params else [sgd]


def schedule_factor(schedule: str, progress: float, accuracies: Sequence[float] = ()) -> float:
    """Return the learning rate, as a fraction of its highest value, after the fraction `progress` of all steps.

    onecycle: linear up over the first fifth, then linear down to zero (Smith & Topin 2018, arXiv:1708.07120).
    cosine: half a cosine down to zero (Loshchilov & Hutter 2017, arXiv:1608.03983).
    constant: always 1.
    plateau: divided by 10 whenever the best of the validation `accuracies` has not risen for two epochs.
    """
    if schedule == "onecycle":
        return min(progress / 0.2, (1 - progress) / 0.8)
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    if schedule == "constant":
        return 1.0
    assert schedule == "plateau", f"schedule {schedule!r} has no branch here"
    factor, best, stalled = 1.0, -math.inf, 0
    for accuracy in accuracies:
        best, stalled = (accuracy, 0) if accuracy > best else (best, stalled + 1)
        if stalled == 2:
            factor, stalled = factor / 10, 0
    return factor


def epoch_factors(config: Config, epoch: int, steps: int, accuracies: Sequence[float] = ()) -> list[float]:
    """Return schedule_factor for each step of an epoch (from 1), at the middle of the step, where it is never 0."""
    middles = [(epoch - 1 + (step + 0.5) / steps) / config.epochs for step in range(steps)]
    return [float(schedule_factor(config.schedule, progress, accuracies)) for progress in middles]  # not numpy's


def train_step(
    net: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    optimizers: Sequence[torch.optim.Optimizer],
    dtype: torch.dtype = torch.float32,
    scaler: torch.amp.GradScaler | None = None,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take one step on a batch; return its mean loss (without smoothing) and outputs (N, num_classes), before the step.

    net returns log-probabilities or logits: cross_entropy is right for both, for it normalizes, which leaves
    log-probabilities as they are. Its layers are computed in dtype; scaler is for float16.
    label_smoothing: fraction of each label that is spread over all classes (Szegedy et al. 2016, arXiv:1512.00567).
    """
    scaler = scaler or torch.amp.GradScaler(images.device.type, enabled=False)
    outputs = forward(net, images, dtype)
    loss = F.cross_entropy(outputs, labels, label_smoothing=label_smoothing)
    net.zero_grad()
    scaler.scale(loss).backward()
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    outputs = outputs.detach()
    return F.cross_entropy(outputs, labels), outputs


def train_one_epoch(
    net: nn.Module,
    loader: Iterable,
    optimizers: Sequence[torch.optim.Optimizer],
    factors: Sequence[float] | None = None,
    step: Callable = train_step,
    description: str = "Training",
) -> dict[str, float]:
    """Take a step for each batch; return {"loss", "accuracy" in percent, "seconds", "images_per_second", "waited"}.

    factors: each step's fraction of the optimizers' initial learning rates; if not given, the rates stay as they are.
    step: train_step, or what takes the same step in less time or with other options.
    Loss and accuracy are averages over the images, augmented, each before its step; waited is the fraction of the time
    that went into waiting for images. Raises FloatingPointError for a loss that is not finite.
    """
    net.train()
    meter = Meter(description, len(loader), next(net.parameters()).device)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for number, (images, labels) in enumerate(with_progress(loader, meter)):  # on the device
        if factors is not None:
            for group in groups:
                group["lr"] = factors[number] * group.setdefault("initial_lr", group["lr"])  # as torch's schedulers do
        loss, outputs = step(net, images, labels, optimizers)
        meter.update(loss, outputs, labels)
    return meter.average()


@torch.inference_mode()
def validate(
    net: nn.Module, loader: Iterable, dtype: torch.dtype = torch.float32, description: str = "Validation"
) -> dict[str, float]:
    """Return the same numbers as train_one_epoch, of the network in evaluation mode, and "right", (N,) uint8: whether
    each image's likeliest class was right. Raises FloatingPointError for a loss that is not finite.
    """
    net.eval()
    meter = Meter(description, len(loader), next(net.parameters()).device)
    for images, labels in with_progress(loader, meter):  # on the device
        outputs = forward(net, images, dtype)
        meter.update(F.cross_entropy(outputs, labels), outputs, labels)
    return {**meter.average(), "right": meter.right_of_all()}


def summarize(config: Config, epoch: int, factor: float, train: dict, valid: dict) -> dict:
    """Print an epoch's results as the specification does, and how long it took; return them as a row of metrics.csv."""
    seconds = train["seconds"] + valid["seconds"]
    left = timedelta(seconds=round(seconds * (config.epochs - epoch)))
    print(f"\nEpoch {epoch}/{config.epochs} Summary:")
    print(f"Train Loss: {train['loss']:.4f}, Train Acc: {train['accuracy']:.4f}")
    print(f"Valid Loss: {valid['loss']:.4f}, Valid Acc: {valid['accuracy']:.4f}")
    waited = f"{100 * train['waited']:.0f} % waiting for images"
    if train["waited"] > 1 / 3 and config.num_workers < (os.cpu_count() or 1) - 1:
        waited += ": more --num-workers help"
    print(f"Time: {seconds:.1f} s, {train['images_per_second']:,.0f} images/s ({waited}), {left} left", flush=True)
    return {
        "epoch": epoch,
        "learning_rate": factor * config.learning_rate,
        "train_loss": train["loss"],
        "train_accuracy": train["accuracy"],
        "valid_loss": valid["loss"],
        "valid_accuracy": valid["accuracy"],
        "seconds": seconds,
        "images_per_second": train["images_per_second"],
    }


def main(config: Config, resume: bool = False, net: Callable | None = None) -> list[dict]:
    """Train as the config says; return the rows of metrics.csv. resume: continue the run. net: makes the network."""
    check(config)
    asked, config = config, resolve(config)  # device, precision, workers are facts from here on
    device, dtype, (rank, world_size) = torch.device(config.device), DTYPES[config.precision], rank_and_size()
    print(f"Device: {device_name(device)}, precision {config.precision}, {config.num_workers} workers.")
    print(f"Run: {config.run_dir}", flush=True)
    keep_freed_memory()
    set_numerics(config.deterministic)
    seed_torch(config.seed)

    origin = load_origin(config, resume)  # the checkpoint whose weights the run begins with, if any
    data = load_datasets(config, origin.get("mean"), origin.get("std"))
    batches = functools.partial(make_loader, batch_size=config.batch_size, rank=rank, world_size=world_size)
    loader = batches(data.train, shuffle=True, num_workers=config.num_workers)
    valid_loader = batches(data.valid)  # not augmented: workers would gain nothing
    if len(loader) == 1:
        print("An epoch is one step: a smaller --batch-size learns faster.")

    net = (net or Net)(**arguments_of(config, data.train.class_names, None if net else origin))
    print_summary(net.to(device, memory_format=torch.channels_last), config.image_size)
    optimizers = make_optimizers(net, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
    step = functools.partial(train_step, dtype=dtype, scaler=scaler, label_smoothing=config.label_smoothing)
    step = faster_step(step, net, config) if config.compile else step

    run = Run(asked, config, data, net, origin)
    shared = share_training(net, config.batch_size)  # net itself, unless there are several processes
    history = run.restore(net, optimizers, scaler, resume)  # the metrics of each finished epoch; empty in a new run
    for epoch in range(len(history) + 1, config.epochs + 1):
        seed_torch(config.seed, epoch, rank)
        data.train.set_epoch(epoch)
        factors = epoch_factors(config, epoch, len(loader), [row["valid_accuracy"] for row in history])
        name = f"Epoch {epoch}/{config.epochs}"
        train = train_one_epoch(shared, loader, optimizers, factors, step, f"{name} - Training")
        share_statistics(net)
        valid = validate(net, valid_loader, dtype, f"{name} - Validation")
        history.append(summarize(config, epoch, factors[-1], train, valid))
        run.save(history, net, optimizers, scaler, valid["right"])
    best = max(history, key=lambda row: row["valid_accuracy"])  # the first of equals
    print(f"\nBest Valid Acc: {best['valid_accuracy']:.4f} (epoch {best['epoch']}). Results are in {config.run_dir}.")
    if config.valid_split > 0:  # chosen on held-out images: now the test images, once
        net.load_state_dict(run.best_weights())
        test = validate(net, batches(data.test), dtype, "Test")
        print(f"Test Loss: {test['loss']:.4f}, Test Acc: {test['accuracy']:.4f}")
    return history


if __name__ == "__main__":
    from parts.command_line import run

    def draw_report(run_dir: str) -> None:
        """Import the drawing only once the run has ended: it is slow, and no part of it."""
        from tools.report import report

        report(run_dir)

    run(main, draw_report)
