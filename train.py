"""Train the network: ``python train.py``; ``python train.py --help`` lists the settings."""

import signal

if __name__ == "__main__":  # until run() takes over: Ctrl-C during the slow imports ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import errno
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

from checkpoint import (
    BEST,
    LAST,
    RunError,
    WriteError,
    best_row,
    describe_progress,
    follow_last,
    load_checkpoint,
    load_weights,
    new_run_dir,
    open_run_dir,
    read_config,
    read_last,
    read_settings,
    refuse_second_use,
    write_config,
    write_epoch,
)
from config import Config, check, parse_args
from dataset import Data, FixedBatches, load_data, make_normalization
from model import Net, print_summary
from optimizer import make_optimizers, schedule_factor
from predict import Mirrored, load_network, print_predictions
from processes import (
    first_rank_first,
    first_to_fail,
    launcher,
    on_first_rank,
    process_group,
    rank,
    share_statistics,
    sum_gradients,
    sum_over_processes,
    world_size,
)
from sources import DataError
from utils import (
    DTYPES,
    Meter,
    NonFiniteLoss,
    Stop,
    UsageError,
    choose_device,
    choose_precision,
    choose_workers,
    compile_network,
    describe_device,
    ignore_signals,
    keep_freed_memory,
    make_deterministic,
    seed_torch,
    stop_on_signals,
    with_progress,
)


def train_step(
    net: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    optimizers: Sequence[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    dtype: torch.dtype,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take one step on a batch, of which each process has a part, its layers computed in dtype.

    label_smoothing: part of each label that is spread over all classes (Szegedy et al. 2016, arXiv:1512.00567).
    Return (sum of the losses, without smoothing, and log_probs (N, num_classes)), both of this process's images.
    """
    # A process that a small last batch leaves without an image computes in float32: SyncBatchNorm sends its zeros
    # in the layer's type, where the others send and expect float32.
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32 and len(images) > 0):
        log_probs = net(images)
        loss = F.nll_loss(log_probs, labels, reduction="sum")
    count = sum_over_processes(torch.full((), len(labels), device=loss.device))
    smoothed = torch.lerp(loss, -log_probs.mean(dim=1).sum(), label_smoothing)
    net.zero_grad()
    scaler.scale(smoothed / count).backward()
    sum_gradients(net)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    return loss, log_probs


def train_one_epoch(
    net: nn.Module,
    batches: Iterable,
    optimizers: Sequence[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    factors: Sequence[float],
    device: torch.device,
    dtype: torch.dtype,
    label_smoothing: float = 0.0,
    description: str = "Training",
) -> dict[str, float]:
    """Take a step for each batch, at that factor of the optimizers' rates; return {"loss", "accuracy" in percent}.

    Both are averages over the images as they were trained on: augmented, with dropout, before their step. The loss
    is the same as in `validate`, without smoothing.
    Raises NonFiniteLoss; the network is of no use then.
    """
    net.train()
    meter = Meter(description, len(batches), device)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for factor, (images, labels) in zip(factors, with_progress(batches, meter), strict=True):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        for group in groups:
            group["lr"] = factor * group["initial_lr"]
        loss, log_probs = train_step(net, images, labels, optimizers, scaler, dtype, label_smoothing)
        meter.update(loss, log_probs, labels)
    return meter.total()


@torch.inference_mode()
def validate(
    net: nn.Module, batches: Iterable, device: torch.device, dtype: torch.dtype, description: str = "Validation"
) -> dict[str, float]:
    """Return {"loss", "accuracy" in percent}, averages over the images. Raises NonFiniteLoss."""
    net.eval()
    meter = Meter(description, len(batches), device)
    for images, labels in with_progress(batches, meter):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            log_probs = net(images)
        meter.update(F.nll_loss(log_probs, labels, reduction="sum"), log_probs, labels)
    return meter.total()


def epoch_factors(config: Config, epoch: int, steps: int, accuracies: list[float]) -> list[float]:
    """Return each step's part of the highest learning rate, taken in the middle of the step: never 0."""
    done = [(epoch - 1 + (step + 0.5) / steps) / config.epochs for step in range(steps)]
    return [schedule_factor(config.schedule, progress, accuracies) for progress in done]


def main(config: Config, resume: bool = False, report: bool = True) -> None:
    """Train as the config says; leave the results in config.run_dir, or continue the run that is there.

    report: whether pictures are drawn, each epoch's curves and what is on report.md.
    """
    check(config)
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    num_workers = choose_workers(config.num_workers, device)
    make_deterministic(config.deterministic)
    run_dir = config.run_dir or on_first_rank(new_run_dir)
    config = replace(config, device=str(device), precision=precision, run_dir=run_dir)
    if not resume:
        on_first_rank(refuse_second_use, config.run_dir)  # before a download, which can take minutes
    with first_rank_first():
        data = load_data(config, num_workers)
    seed_torch(config.seed, epoch=0)
    net = Net(num_classes=len(data.class_names), dropout=config.dropout)
    net.load_state_dict(on_first_rank(net.state_dict))  # another kind of machine might have drawn others
    compiled = compile_network(net.to(device, memory_format=torch.channels_last), config.compile)
    with open_run_dir(config.run_dir, resume) if rank() == 0 else contextlib.nullcontext():
        print_summary(net)
        share_statistics(net, device)
        where = f"{describe_device(device)}, precision {precision}, {num_workers} workers"
        processes = f", {world_size()} processes" if world_size() > 1 else ""
        print(f"Device: {where}{processes}. Run: {config.run_dir}", flush=True)
        checkpoint = on_first_rank(read_last, config.run_dir) if resume else None
        if checkpoint:
            check_images(data, checkpoint, config.data_dir)
        fit(config, data, net, compiled, device, checkpoint, report)
        finish(config, data, net, device, report)


def check_images(data: Data, checkpoint: dict, data_dir: str) -> None:
    """Raise RunError if the classes, or the training images' mean and deviation, are not those of the checkpoint."""
    same_statistics = torch.allclose(
        torch.tensor([data.mean, data.std]), torch.tensor([checkpoint["mean"], checkpoint["std"]])
    )
    if list(data.class_names) != checkpoint["class_names"] or not same_statistics:
        raise RunError(f"the images in {data_dir} are not those that this run began with: give --data-dir")


def fit(
    config: Config,
    data: Data,
    net: nn.Module,
    compiled: nn.Module,
    device: torch.device,
    checkpoint: dict | None,
    report: bool,
) -> None:
    """Train the network, from the checkpoint on if there is one, and write each epoch's results.

    compiled: what is called, `net` itself or its compiled form; the weights are those of `net`.
    """
    dtype, run_dir = DTYPES[config.precision], Path(config.run_dir)
    optimizers = make_optimizers(
        net,
        learning_rate=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        muon_learning_rate=config.muon_learning_rate,
        muon_weight_decay=config.muon_weight_decay,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
    rows = []
    if checkpoint:
        load_weights(net, checkpoint)  # first: it refuses another network's before anything is changed
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        if checkpoint["scaler"]:  # none of another precision than float16
            scaler.load_state_dict(checkpoint["scaler"])
        on_first_rank(follow_last, run_dir, checkpoint)
        rows = checkpoint["metrics"]
        print(f"Continuing after epoch {len(rows)}")
        before = checkpoint.get("processes", 1)
        if before != world_size():
            print(f"Note: processes: {before} before, {world_size()} now: no longer bit for bit the undisturbed run")
    on_first_rank(write_config, run_dir, asdict(config))

    for epoch in range(len(rows) + 1, config.epochs + 1):
        title = f"Epoch {epoch}/{config.epochs}"
        factors = epoch_factors(config, epoch, len(data.train), [row["valid_accuracy"] for row in rows])
        seed_torch(config.seed, epoch, rank())
        data.train.sampler.set_epoch(epoch)
        train = train_one_epoch(
            compiled,
            data.train,
            optimizers,
            scaler,
            factors,
            device,
            dtype,
            config.label_smoothing,
            f"{title} - Training",
        )
        valid = validate(compiled, data.valid, device, dtype, f"{title} - Validation")
        print(f"\n{title} Summary:")
        print(f"Train Loss: {train['loss']:.4f}, Train Acc: {train['accuracy']:.4f}")
        print(f"Valid Loss: {valid['loss']:.4f}, Valid Acc: {valid['accuracy']:.4f}", flush=True)
        row = {"epoch": epoch, "learning_rate": factors[-1] * config.learning_rate}
        row |= {f"{name}_{key}": part[key] for name, part in (("train", train), ("valid", valid)) for key in part}
        rows.append(row)
        on_first_rank(
            write_epoch,
            run_dir,
            {
                "config": asdict(config),
                "class_names": list(data.class_names),
                "mean": data.mean,
                "std": data.std,
                "processes": world_size(),
                "epoch": epoch,
                "metrics": rows,
                "model": net.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "scaler": scaler.state_dict(),
            },
        )

        if report and rank() == 0:
            from report import CURVES, plot_curves, save_figure  # here: matplotlib is slow to import

            save_figure(plot_curves(rows), run_dir / CURVES)


def finish(config: Config, data: Data, net: nn.Module, device: torch.device, report: bool) -> None:
    """Print a run's best accuracy, test the best epoch's network if images were held out to choose it, draw pictures.

    The pictures are those of the network that was tested; without held-out images, of the last epoch's.
    """
    dtype, run_dir = DTYPES[config.precision], Path(config.run_dir)
    checkpoint = on_first_rank(load_checkpoint, run_dir / (BEST if config.valid_split > 0 else LAST))
    best = best_row(checkpoint["metrics"])
    print(f"\nBest Valid Acc: {best['valid_accuracy']:.4f} (epoch {best['epoch']}). Results are in {run_dir}.")
    load_weights(net, checkpoint)
    if config.valid_split > 0:
        test = validate(net, data.test, device, dtype, "Test")
        print(f"Test Loss: {test['loss']:.4f}, Test Acc: {test['accuracy']:.4f}")
    if report and rank() == 0:
        from report import write_report

        write_report(run_dir, net, checkpoint, data.train.dataset, data.test, device, dtype)


def resume(run_dir: str, given: dict, report: bool) -> None:
    """Continue the run in run_dir with its own settings, but for those given now.

    Raises UsageError or RunError.
    """
    settings = on_first_rank(read_settings, run_dir)
    others = sorted(settings.keys() ^ {field.name for field in fields(Config)})
    if others:
        raise RunError(f"{run_dir} was begun by another version ({others[0]} differs): resume the run with that one")
    saved = read_config(settings, run_dir)
    config = replace(saved, run_dir=run_dir, **given)
    last = on_first_rank(read_last, run_dir)
    if config.epochs != saved.epochs and config.schedule in ("onecycle", "cosine"):
        raise RunError(f"epochs cannot change: the {config.schedule} schedule was laid out for {saved.epochs}")
    if last and config.epochs < last["epoch"]:
        raise RunError(f"epochs cannot become {config.epochs}: {last['epoch']} are done already")
    main(config, resume=True, report=report)


def evaluate(path: str, device: str, given: dict, report: bool, tta: bool) -> None:
    """Print a checkpoint's loss and accuracy on the test images, with its own settings but for those given now.

    report: whether its pictures and report.md are written beside it. tta: whether the accuracy with mirrored
    images is printed too.
    """
    net, checkpoint = on_first_rank(load_network, path)
    config = replace(read_config(checkpoint["config"], path), **{"device": device, **given})
    device = choose_device(config.device)
    dtype = DTYPES[choose_precision(config.precision, device)]
    with first_rank_first():
        data = load_data(config, num_workers=0)
    if list(data.class_names) != checkpoint["class_names"]:
        raise RunError(f"checkpoint {path} was trained on other classes than those of the images")
    net.to(device)
    normalization = make_normalization(checkpoint["mean"], checkpoint["std"])
    batches = FixedBatches(data.test.split, normalization, config.batch_size, rank(), world_size())
    networks = {"Test": net} | ({"Mirrored Test": Mirrored(net)} if tta else {})
    for title, network in networks.items():
        test = validate(network, batches, device, dtype, title)
        print(f"{title} Loss: {test['loss']:.4f}, {title} Acc: {test['accuracy']:.4f}")
    if report and rank() == 0:
        from report import PAGE, write_report

        write_report(Path(path).parent, net, checkpoint, data.train.dataset, batches, device, dtype)
        print(f"A report with pictures is in {Path(path).parent / PAGE}")


def describe_failure(error: BaseException) -> tuple[int, str] | None:
    """Return exit code and message for a user's mistake or what befell the run; None for a mistake of ours."""
    text = str(error).partition("\n")[0]
    if isinstance(error, (UsageError, DataError, RunError)):
        return 2, f"error: {text}"
    if isinstance(error, Stop):
        return 128 + error.signum, f"stopped by {signal.Signals(error.signum).name}"
    if isinstance(error, NonFiniteLoss):
        return 1, f"stopped: {text}; a new run needs a lower --learning-rate or --muon-learning-rate"
    if isinstance(error, WriteError):
        return 1, f"stopped: {text}"
    out_of_memory = re.search("out of memory|not enough memory|can't allocate memory", text)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and out_of_memory):
        return 1, "stopped: out of memory; a new run needs a smaller --batch-size"
    if isinstance(error, BrokenPipeError):
        return 1, "stopped: nobody reads the output any more"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return 1, "stopped: the output cannot be written, there is no space left"
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in text):
        return 1, "stopped: another process of the run died or does not answer"
    worker_died = isinstance(error, RuntimeError) and text.startswith("DataLoader worker")
    if worker_died or isinstance(error, (ConnectionError, EOFError)):  # the latter, while its batch is received
        return 1, f"stopped: a process that augments images died ({text or 'its batch broke off'})"
    return None


@process_group()
def run() -> None:
    """Do what the command line asks; an end before time is one line on stderr and an exit code that is not 0.

    One line in all, if several processes share the run.
    """
    arguments = parse_args()
    config = arguments.config
    run_dir = arguments.resume if arguments.resume is not None else config.run_dir or on_first_rank(new_run_dir)
    stop_on_signals()
    keep_freed_memory()
    try:
        if arguments.predict:
            return print_predictions(arguments.evaluate, arguments.predict)
        if arguments.evaluate is not None:
            return evaluate(arguments.evaluate, config.device, arguments.given, arguments.report, arguments.tta)
        if arguments.resume is not None:
            return resume(run_dir, arguments.given, arguments.report)
        return main(replace(config, run_dir=run_dir), report=arguments.report)
    except BaseException as error:
        ignore_signals()
        if not first_to_fail():
            sys.exit(1)
        failure = describe_failure(error)
        if failure is None:
            raise
        resumable = not isinstance(error, NonFiniteLoss)  # it would come again
    # Only here, where the exception is gone, are the bars closed and the workers ended that its frames held.
    code, message = failure
    if code != 2 and arguments.evaluate is None:
        message += f"; {describe_progress(run_dir, resumable, launcher())}"
    print(f"train.py: {message}\n", end="", file=sys.stderr)  # one piece: torchrun writes there too
    sys.exit(code)


if __name__ == "__main__":
    run()
