"""How a checkpoint does on the test images, at the end of a run or with --evaluate."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F

from config import Config, UsageError, check
from dataset import Datasets, ImageDataset, make_augmentation, make_loader
from extras.failures import only_warn
from extras.predict import compute_log_probs, load_network
from extras.runs import best_row, checkpoint_to_test, read_config
from extras.sources import load_source
from utils import DTYPES, choose_device, choose_precision, numerics


def print_accuracy(title: str, log_probs: torch.Tensor, dataset: ImageDataset) -> None:
    """Print loss and accuracy of log-probabilities (N, num_classes) of a dataset's images."""
    loss = F.nll_loss(log_probs.double(), dataset.labels).item()
    accuracy = 100 * (log_probs.argmax(dim=1) == dataset.labels).double().mean().item()
    print(f"{title} Loss: {loss:.4f}, {title} Acc: {accuracy:.4f}")


def draw_report(folder: Path, net: torch.nn.Module, checkpoint: dict, data: tuple, log_probs: torch.Tensor) -> None:
    """Write the pictures of a checkpoint and report.md into the folder; a failure there is only a warning."""
    with only_warn("the report"):
        from extras.report import PAGE, write_report  # here: matplotlib is slow to import

        write_report(folder, net, checkpoint, *data, log_probs)
        print(f"A report with pictures is in {folder / PAGE}")


def evaluate(path: str, given: dict, report: bool, tta: bool) -> None:
    """Print a checkpoint's loss and accuracy on the test images, with its own settings except those given now.

    given: at least "device" and "precision", since those of the training may be missing here.
    report: whether to write its pictures and report.md beside it. tta: whether to print the accuracy with mirrored
    images too. Raises UsageError.
    """
    net, checkpoint = load_network(path)
    config = replace(read_config(checkpoint["config"], path), **given)
    check(config)
    device = choose_device(config.device)
    dtype = DTYPES[choose_precision(config.precision, device)]
    source = load_source(config.dataset, config.data_dir, test_only=not report)
    if list(source.class_names) != checkpoint["class_names"]:
        raise UsageError(f"checkpoint {path} was trained on other classes than those of the images")
    common = {name: checkpoint[name] for name in ("class_names", "mean", "std")}
    test = ImageDataset(*source.test, **common)
    loader = make_loader(test, config.batch_size)
    with numerics(config.deterministic):
        log_probs = compute_log_probs(net.to(device), loader, dtype, description="Test")
        print_accuracy("Test", log_probs, test)
        if tta:
            mirrored = compute_log_probs(net, loader, dtype, mirrored=True, description="Mirrored Test")
            mean = torch.logaddexp(log_probs, mirrored) - math.log(2)  # of the probabilities, as a logarithm again
            print_accuracy("Averaged Test", mean, test)
    if report:
        augmentation = make_augmentation(config, checkpoint["mean"])
        train = ImageDataset(*source.train, **common, augmentation=augmentation, seed=config.seed)
        draw_report(Path(path).parent, net, checkpoint, (train, test), log_probs)


def report_results(config: Config, data: Datasets, report: bool) -> None:
    """Print a run's best accuracy; test the best epoch's network if images were held out to choose it; draw pictures.

    The pictures are of the network that was tested or, without held-out images, of the last epoch's.
    """
    net, checkpoint = load_network(checkpoint_to_test(config.run_dir))
    best = best_row(checkpoint["metrics"])
    print(f"\nBest Valid Acc: {best['valid_accuracy']:.4f} (epoch {best['epoch']}). Results are in {config.run_dir}.")
    if config.valid_split == 0 and not report:
        return
    loader = make_loader(data.test, config.batch_size)
    log_probs = compute_log_probs(net.to(config.device), loader, DTYPES[config.precision], description="Test")
    if config.valid_split > 0:
        print_accuracy("Test", log_probs, data.test)
    if report:
        draw_report(Path(config.run_dir), net, checkpoint, (data.train, data.test), log_probs)
