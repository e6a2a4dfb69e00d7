"""Train the network: ``python train.py``; ``python train.py --help`` lists the settings."""

import builtins
import signal

if __name__ == "__main__" and not hasattr(builtins, "__IPYTHON__"):  # %run leaves the notebook's own handlers
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the slow imports below ends without a traceback

import math
from collections.abc import Callable, Sequence

import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from config import Config, check
from dataset import load_datasets, make_loader
from extras import command_line
from extras.distributed import first_rank_first, share_training, sum_gradients
from extras.evaluate import report_results
from extras.muon import Muon
from extras.runs import open_run
from extras.speed import faster_step
from extras.workers import close_after
from model import Net, print_summary
from utils import DTYPES, Meter, device_name, forward, numerics, resolve, seed_torch, with_progress


def make_optimizers(net: nn.Module, config: Config) -> list[torch.optim.Optimizer]:
    """Return [Muon, SGD] if config.optimizer is "muon" and there are weights for it, else [SGD].

    Muon updates the weights of the convolutions that mix channels, except the last, the classifier; SGD the rest, at
    ten times the learning rate, or alone, at the rate itself. With either, a step shrinks convolution weights by the
    fraction learning_rate * weight_decay; biases and BatchNorm have no decay.
    """
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    mixing = [conv.weight for conv in convolutions[:-1] if conv.groups == 1 and conv.weight.requires_grad]
    muon_params = mixing if config.optimizer == "muon" else []
    sgd_params = [p for p in net.parameters() if p not in set(muon_params)]  # `in` a list would compare values
    ratio = 10 if muon_params else 1  # of SGD's learning rate to Muon's; 3 was tried: results/README.md
    # SGD adds weight_decay * weight to the gradient, and momentum adds that up to 1 / (1 - momentum) times as much.
    weight_decay = config.weight_decay * (1 - config.momentum) / ratio
    decay, no_decay = [p for p in sgd_params if p.ndim > 1], [p for p in sgd_params if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay}]
    lr = config.learning_rate
    sgd = torch.optim.SGD(groups, ratio * lr, config.momentum, nesterov=config.nesterov, fused=True)  # fused: faster
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
    return [schedule_factor(config.schedule, progress, accuracies) for progress in middles]


def train_step(
    net: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    optimizers: Sequence[torch.optim.Optimizer],
    dtype: torch.dtype = torch.float32,
    scaler: torch.amp.GradScaler | None = None,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take one step on a batch, the network's layers computed in dtype.

    label_smoothing: fraction of each label that is spread over all classes (Szegedy et al. 2016, arXiv:1512.00567).
    scaler: for float16. Returns (mean loss, without smoothing, and log_probs (N, num_classes)).
    """
    scaler = scaler or torch.amp.GradScaler(images.device.type, enabled=False)
    log_probs = forward(net, images, dtype)
    loss = F.nll_loss(log_probs, labels)
    smoothed = torch.lerp(loss, -log_probs.mean(), label_smoothing)  # as F.cross_entropy does with logits
    net.zero_grad()
    scaler.scale(smoothed).backward()
    if dist.is_initialized():
        sum_gradients(net)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    return loss, log_probs


def train_one_epoch(
    net: nn.Module,
    loader: DataLoader,
    optimizers: Sequence[torch.optim.Optimizer],
    factors: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    scaler: torch.amp.GradScaler | None = None,
    label_smoothing: float = 0.0,
    description: str = "Training",
    take_step: Callable = train_step,
) -> dict[str, float]:
    """Take a step for each batch; return {"loss", "accuracy" in percent}, averages over the images.

    net: any network that returns log-probabilities; logits would give a wrong loss, without an error.
    factors: each step's fraction of the optimizers' initial learning rates; if not given, the rates stay as they are.
    take_step: train_step, or what takes the same step in less time.
    Loss and accuracy are of augmented images, each before its step. Raises RunStopped for a loss that is not finite.
    """
    net.train()
    meter = Meter(description, len(loader), next(net.parameters()).device)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for step, (images, labels) in enumerate(with_progress(loader, meter)):  # on the device
        if factors is not None:
            for group in groups:
                group["lr"] = factors[step] * group.setdefault("initial_lr", group["lr"])  # as torch's schedulers do
        loss, log_probs = take_step(net, images, labels, optimizers, dtype, scaler, label_smoothing)
        meter.update(loss, log_probs, labels)
    return meter.average()


@torch.inference_mode()
def validate(
    net: nn.Module, loader: DataLoader, dtype: torch.dtype = torch.float32, description: str = "Validation"
) -> dict[str, float]:
    """Return {"loss", "accuracy" in percent} of a network that returns log-probabilities, averages over the images.

    Raises RunStopped for a loss that is not finite.
    """
    net.eval()
    meter = Meter(description, len(loader), next(net.parameters()).device)
    for images, labels in with_progress(loader, meter):  # on the device
        log_probs = forward(net, images, dtype)
        meter.update(F.nll_loss(log_probs, labels), log_probs, labels)
    return meter.average()


def summarize(config: Config, epoch: int, factor: float, train: dict, valid: dict) -> dict:
    """Print an epoch's results as the specification does; return them as a row of metrics.csv."""
    print(f"\nEpoch {epoch}/{config.epochs} Summary:")
    print(f"Train Loss: {train['loss']:.4f}, Train Acc: {train['accuracy']:.4f}")
    print(f"Valid Loss: {valid['loss']:.4f}, Valid Acc: {valid['accuracy']:.4f}", flush=True)
    return {
        "epoch": epoch,
        "learning_rate": factor * config.learning_rate,
        "train_loss": train["loss"],
        "train_accuracy": train["accuracy"],
        "valid_loss": valid["loss"],
        "valid_accuracy": valid["accuracy"],
    }


def main(config: Config, resume: bool = False, report: bool = True) -> None:
    """Train as the config says; leave the results in config.run_dir, or continue the run that is there.

    report: whether pictures are drawn: the curves as the run goes on, the others at its end.
    """
    check(config)
    config = resolve(config)
    device, dtype = torch.device(config.device), DTYPES[config.precision]
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    print(f"Device: {device_name(device)}, precision {config.precision}, {config.num_workers} workers.")
    print(f"Run: {config.run_dir}", flush=True)
    seed_torch(config.seed)

    process = {"rank": rank, "world_size": world_size}
    data = load_datasets(config) if world_size == 1 else first_rank_first(load_datasets, config)  # rank 0 downloads
    loader = make_loader(data.train, config.batch_size, shuffle=True, num_workers=config.num_workers, **process)
    valid_loader = make_loader(data.valid, config.batch_size, **process)  # not augmented: workers would gain nothing

    net = Net(num_classes=len(data.train.class_names), dropout=config.dropout)
    net.to(device, memory_format=torch.channels_last)
    print_summary(net)
    optimizers = make_optimizers(net, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
    if world_size > 1:
        share_training(net, min(config.batch_size, len(data.train)))
    take_step = faster_step(train_step, net, config, world_size) if config.compile else train_step

    with numerics(config.deterministic), close_after(loader), open_run(config, data, resume, report, **process) as run:
        history = run.restore(net, optimizers, scaler)  # the metrics of each finished epoch; empty in a new run
        for epoch in range(len(history) + 1, config.epochs + 1):
            seed_torch(config.seed, epoch, rank)
            data.train.set_epoch(epoch)
            factors = epoch_factors(config, epoch, len(loader), [row["valid_accuracy"] for row in history])
            name = f"Epoch {epoch}/{config.epochs}"
            train = train_one_epoch(
                net, loader, optimizers, factors, dtype, scaler, config.label_smoothing, f"{name} - Training", take_step
            )
            valid = validate(net, valid_loader, dtype, f"{name} - Validation")
            history.append(summarize(config, epoch, factors[-1], train, valid))
            run.save(history, net, optimizers, scaler)
        if rank == 0:
            report_results(config, data, report)


if __name__ == "__main__":
    command_line.run(main)  # calls main with the settings given, or does what --evaluate or --predict ask
