"""How a checkpoint does on the test images: ``python -m tools.evaluate runs/<name> [--tta]``."""

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import get_args, get_type_hints

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from config import Config, UsageError
from dataset import ImageDataset, make_loader
from model import Net
from parts.command_line import in_one_line
from parts.images import load_source
from parts.run import BEST, LAST
from utils import DTYPES, choose_device, choose_precision, forward, load_checkpoint, set_numerics


def load_network(path: str | Path, net: Callable | None = None) -> tuple[nn.Module, dict]:
    """Return a checkpoint's network, made with the arguments that it was trained with, and the checkpoint.

    path: of the checkpoint, or of a run, whose best.pt is taken if held-out images chose it, otherwise last.pt.
    net: makes it (default: Net). It is in evaluation mode, on the CPU. Raises UsageError, also for weights of another
    network, of a run without a finished epoch, or that are NaN.
    """
    path, settings = Path(path).expanduser(), {}
    if path.is_dir():
        last = load_checkpoint(path / LAST)
        settings = {"config": last["config"]}  # a resume may have changed some since the best
        path /= BEST if last["config"]["valid_split"] > 0 and last["metrics"] else LAST
    checkpoint = load_checkpoint(path) | settings
    if checkpoint.get("metrics") == []:
        raise UsageError(f"{path}: no epoch is finished yet")
    code = [maker["modules"].get("model.py") for maker in checkpoint.get("made_by", ())][-1:]  # shipped weights: none
    if net is None and code and code[0] != Path(__file__).parents[1].joinpath("model.py").read_text(encoding="utf-8"):
        print(f"Note: model.py has changed since {path} was made: it may mean another network", file=sys.stderr)
    try:
        # The first weights, drawn in vain, must not move a notebook's generator.
        with torch.random.fork_rng(devices=[]):
            arguments = checkpoint["arguments"]
            if net is None and (made := checkpoint.get("network", ["", " Net"])[1].strip()) != "Net":
                raise ValueError(f"{made}: give net={made}")
            if net:  # as in the training
                arguments = {name: arguments[name] for name in ("num_classes", "dropout")}
            net = (net or Net)(**arguments)
        net.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UsageError(f"checkpoint {path} is of another network than model.py makes ({reason})") from None
    if not all(tensor.isfinite().all() for tensor in net.state_dict().values()):
        raise UsageError(f"checkpoint {path} has weights that are not finite: its training failed")
    return net.to(memory_format=torch.channels_last).eval(), checkpoint


@torch.inference_mode()
def compute_outputs(
    net: nn.Module, loader: Iterable, dtype: torch.dtype = torch.float32, mirrored: bool = False, description: str = ""
) -> torch.Tensor:
    """Return the network's log-probabilities (N, num_classes) of all the loader's images, float32 on the CPU.

    mirrored: of their mirror images instead. description: the progress bar's, in a terminal; without it, no bar.
    """
    net.eval()
    device, outputs = next(net.parameters()).device, []
    for images, _ in tqdm(loader, description, disable=None if description else True, dynamic_ncols=True):
        images = (images.flip(3) if mirrored else images).to(device, memory_format=torch.channels_last)
        outputs.append(forward(net, images, dtype).log_softmax(dim=1).cpu())
    return torch.cat(outputs)


def choose_dtype(checkpoint: dict, device: torch.device, precision: str | None = None) -> torch.dtype:
    """Return what to compute in: the precision given, else that of the training; for float16 off CUDA, "auto"."""
    trained = checkpoint["config"]["precision"]
    fits = trained != "float16" or device.type == "cuda"
    return DTYPES[choose_precision(precision or (trained if fits else "auto"), device)]


def check_classes(checkpoint: dict, class_names: list[str]) -> None:
    """Raise UsageError, with the first difference, if a checkpoint was trained on other classes than these."""
    for learnt, given in itertools.zip_longest(checkpoint["class_names"], class_names):
        if learnt != given:
            raise UsageError(f"the network was trained on other classes: {learnt!r}, where the images have {given!r}")


def load_test_images(checkpoint: dict, dataset: str | None = None, data_dir: str | None = None) -> ImageDataset:
    """Return a dataset's test images, by default of the one trained on. Raises UsageError for other classes."""
    settings = checkpoint["config"]
    place, size = data_dir or settings["data_dir"], settings.get("image_size", 32)
    _, split, class_names = load_source(dataset or settings["dataset"], place, size, test_only=True)
    test = ImageDataset(*split, class_names, checkpoint["mean"], checkpoint["std"])
    check_classes(checkpoint, test.class_names)
    if test.images.shape[1] != size:
        raise UsageError(f"the network was trained on {size}x{size} pixels: these images have {test.images.shape[1]}")
    return test


def print_accuracy(title: str, log_probs: torch.Tensor, labels: torch.Tensor) -> None:
    """Print loss and accuracy of log-probabilities (N, num_classes)."""
    loss = F.nll_loss(log_probs.double(), labels).item()
    accuracy = 100 * (log_probs.argmax(dim=1) == labels).double().mean().item()
    print(f"{title} Loss: {loss:.4f}, {title} Acc: {accuracy:.4f}")


def evaluate(
    path: str | Path,
    tta: bool = False,
    dataset: str | None = None,
    data_dir: str | None = None,
    precision: str | None = None,
    device: str = "auto",
    net: Callable | None = None,
) -> None:
    """Print a checkpoint's loss and accuracy on the test images, in the precision of its training unless one is given.

    tta: also when each image's probabilities are averaged with those of its mirror image. dataset, data_dir: other
    images of the same classes. net: makes the network. Raises UsageError.
    """
    net, checkpoint = load_network(path, net)
    device = choose_device(device)
    dtype = choose_dtype(checkpoint, device, precision)
    test = load_test_images(checkpoint, dataset, data_dir)
    set_numerics(deterministic=False)
    loader = make_loader(test, checkpoint["config"]["batch_size"])
    log_probs = compute_outputs(net.to(device), loader, dtype, description="Test")
    print_accuracy("Test", log_probs, test.labels)
    if tta:
        mirrored = compute_outputs(net, loader, dtype, mirrored=True, description="Mirrored Test")
        mean = torch.logaddexp(log_probs, mirrored) - math.log(2)  # of the probabilities, as a logarithm again
        print_accuracy("Averaged Test", mean, test.labels)


def main(argv: list[str] | None = None) -> None:
    """Evaluate as the command line says."""
    parser = argparse.ArgumentParser("python -m tools.evaluate", description="Test a checkpoint, or that of a run.")
    parser.add_argument("path", metavar="RUN_DIR|CHECKPOINT")
    parser.add_argument("--tta", action="store_true", help="average over mirrored images as well")
    datasets = get_args(get_type_hints(Config)["dataset"])
    parser.add_argument("--dataset", choices=datasets, help="(default: as in the training)")
    parser.add_argument("--data-dir", help="where the images are (default: as in the training)")
    parser.add_argument("--precision", choices=["auto", *DTYPES], help="(default: as in the training)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps, ... (default: %(default)s)")
    evaluate(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    in_one_line("tools.evaluate", main)
