"""A run in pictures: ``python -m tools.report runs/<name>``, also of a run that is going on or was stopped.

Each plot_ function returns a matplotlib Figure, which needs no screen.
"""

import argparse
import contextlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from config import UsageError
from dataset import ImageDataset, load_datasets, make_loader
from parts.command_line import in_one_line
from parts.run import LAST, resumed_config
from tools.evaluate import check_classes, choose_dtype, compute_outputs, load_network
from utils import choose_device, load_checkpoint, set_numerics

PICTURES = {  # of report.md, with their titles
    "curves.png": "Curves",
    "confusion_matrix.png": "Confusion matrix",
    "predictions.png": "Predictions",
    "misclassified.png": "Most confident mistakes",
    "augmentations.png": "Augmentations",
}
CURVES, CONFUSION, PREDICTIONS, MISTAKES, AUGMENTATIONS = PICTURES
PAGE = "report.md"
MANY = 100  # classes: more have no confusion matrix


@contextlib.contextmanager
def only_warn(what: str) -> Iterator[None]:
    """Let a picture fail: it costs a line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        reason = str(error).partition("\n")[0][:150]
        print(f"warning: {what} cannot be drawn ({type(error).__name__}: {reason})", file=sys.stderr)


names_as_they_are = mpl.rc_context({"text.parse_math": False})  # a class may be called "Ba$$in"


def short(name: str, length: int = 20) -> str:
    """Return a class name, perhaps a folder's with any bytes in it, in a form that fits into a picture."""
    name = name.encode(errors="backslashreplace").decode()
    return name if len(name) <= length else f"{name[: length - 1]}…"


def plot_curves(rows: Sequence[dict]) -> Figure:
    """Return loss, accuracy and learning rate over the epochs, from the rows of metrics.csv."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = {"loss": "Loss", "accuracy": "Accuracy (%)", "learning_rate": "Learning rate at the end of the epoch"}
    for axes, (name, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for column in (column for column in rows[0] if column.endswith(name)):
            values = {row["epoch"]: row[column] for row in rows}
            axes.plot(values.keys(), values.values(), label=column.replace("_", " "), marker="o", markersize=3)
        axes.set(title=title, xlabel="Epoch", xlim=(0.5, len(rows) + 0.5))
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def count_confusions(labels: torch.Tensor, predictions: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Return how many images (N,) of each class (row) were taken for each class (column)."""
    pairs = labels * num_classes + predictions
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


@names_as_they_are
def plot_confusions(counts: torch.Tensor, class_names: Sequence[str]) -> Figure:
    """Return the confusion matrix (true, predicted) with each class's accuracy; colour shows shares of a row."""
    count, few = len(class_names), len(class_names) <= 30  # then each cell has room for a number
    rates = (100 * counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    side, font = (max(4.5, 0.55 * count), 9) if few else (0.16 * count, 6)
    figure = Figure(figsize=(side + 2, side + 1), layout="constrained")
    axes = figure.subplots()
    axes.imshow(rates, cmap="Blues", norm=PowerNorm(0.5, 0, 100))  # a few in a hundred can be seen too
    for row, column in counts.nonzero().tolist() if few else ():
        color = "white" if rates[row, column] > 30 else "black"
        axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=color, fontsize=font)
    names = [short(name) for name in class_names]
    axes.set_xticks(range(count), names, fontsize=font, rotation=90)
    labels = [f"{name}  {rate:.1f} %" for name, rate in zip(names, rates.diagonal(), strict=True)]
    axes.set_yticks(range(count), labels, fontsize=font)
    axes.set(title="Images by true and predicted class", xlabel="Predicted", ylabel="True, with its accuracy")
    return figure


def explain(net: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return how far each part of normalized images (N, 3, H, W) supports the target classes: (N, H, W), 0 to 1.

    Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) by captum, at the last block's output.
    """
    from captum.attr import LayerAttribution, LayerGradCam  # here: it is slow to import

    parts = LayerGradCam(net.eval(), net.blocks[-1]).attribute(images, targets, relu_attributions=True).detach()
    parts = LayerAttribution.interpolate(parts, tuple(images.shape[2:]), "bilinear")[:, 0]
    return parts / parts.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)


@names_as_they_are
def plot_predictions(
    net: nn.Module, test: ImageDataset, log_probs: torch.Tensor, chosen: Sequence[int], title: str
) -> Figure:
    """Return the chosen test images with the network's answers, each beside a heat map of the evidence.

    log_probs: (N, num_classes) of the test images. A network without `blocks` has no heat maps.
    """
    names, (confidence, predictions) = [short(name) for name in test.class_names], log_probs.exp().max(dim=1)
    rows, explained = math.ceil(len(chosen) / 5), hasattr(net, "blocks") and len(chosen) > 0
    figure = Figure(figsize=(12, 1.7 * rows + 0.4), layout="constrained")
    figure.suptitle(f"{title}, each beside what spoke for the answer (Grad-CAM)" if explained else title)
    if not chosen:
        return figure
    grid = figure.subplots(rows, 10, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    if explained:
        device = next(net.parameters()).device
        images, _ = test[list(chosen)]
        maps = explain(net, images.to(device), predictions[chosen].to(device)).cpu()
    for number, index in enumerate(chosen):
        left, right = grid[number // 5, 2 * (number % 5) : 2 * (number % 5) + 2]
        left.imshow(test.images[index].numpy())
        if explained:
            right.imshow(test.images[index].numpy())
            right.imshow(maps[number].numpy(), cmap="inferno", alpha=0.6, vmin=0, vmax=1)
        said = f"{names[predictions[index]]} {100 * confidence[index]:.0f} %\ntrue: {names[test.labels[index]]}"
        color = "black" if predictions[index] == test.labels[index] else "firebrick"
        left.set_title(said, fontsize=9, loc="left", color=color)
    return figure


def plot_mistakes(net: nn.Module, test: ImageDataset, log_probs: torch.Tensor) -> Figure:
    """Return the 20 most confident mistakes among the test images, as `plot_predictions` shows them."""
    confidence, predictions = log_probs.exp().max(dim=1)
    wrong = (predictions != test.labels).nonzero()[:, 0]
    chosen = wrong[confidence[wrong].argsort(descending=True, stable=True)][:20].tolist()
    title = f"Mistakes: {len(wrong):,} in {len(test):,} images; the most confident first"
    return plot_predictions(net, test, log_probs, chosen, title)


@names_as_they_are
def plot_augmentations(train: ImageDataset, count: int = 6) -> Figure:
    """Return a training image of each of the first classes, as it is and as augmented in nine epochs."""
    labels = train.labels.numpy()
    indices = [int(np.flatnonzero(labels == label)[0]) for label in range(min(count, len(train.class_names)))]
    columns = [train.images.numpy()[indices], *(train.augment(epoch, indices) for epoch in range(1, 10))]
    figure = Figure(figsize=(12, 1.2 * len(indices) + 0.8), layout="constrained")
    figure.suptitle("Training images (left), and what the network sees of them in epochs 1 to 9")
    grid = figure.subplots(len(indices), 10, squeeze=False)
    for axes, image in zip(grid.T.flat, (image for column in columns for image in column), strict=True):
        axes.imshow(image)
        axes.set(xticks=[], yticks=[])
    for axes, index in zip(grid[:, 0], indices, strict=True):
        axes.set_ylabel(short(train.class_names[labels[index]]), fontsize=9)
    return figure


def of_each_class(labels: torch.Tensor, count: int) -> list[int]:
    """Return the indices of the first `count` images (N,), taking the classes in turn."""
    seen: dict[int, int] = {}
    turns = []
    for index, label in enumerate(labels.tolist()):
        seen[label] = seen.get(label, 0) + 1
        turns.append((seen[label], label, index))
    return [index for _, _, index in sorted(turns)[:count]]


def report(
    run_dir: str | Path, data_dir: str | None = None, device: str | None = None, net: Callable | None = None
) -> None:
    """Write a run's pictures into its folder, and report.md, which shows them.

    The network, made by `net`, is the one to test: that of the last epoch or, if held-out images chose it, of the best.
    A picture that fails costs a line. Raises UsageError for a folder without a run, or without a finished epoch.
    """
    folder = Path(run_dir).expanduser()
    config = resumed_config(str(folder), {"data_dir": data_dir} if data_dir else {})
    last = load_checkpoint(folder / LAST)
    if not last["metrics"]:
        raise UsageError(f"{folder}: no epoch is finished yet")
    net, checkpoint = load_network(folder, net)
    device = choose_device(device or config.device)
    set_numerics(config.deterministic)
    train, _, test = load_datasets(config, last["mean"], last["std"])
    check_classes(last, test.class_names)
    loader, dtype = make_loader(test, config.batch_size), choose_dtype(checkpoint, device)
    log_probs = compute_outputs(net.to(device), loader, dtype, description="Report")
    counts = count_confusions(test.labels, log_probs.argmax(dim=1), len(test.class_names))
    first = of_each_class(test.labels, 20)
    drawings = {
        CURVES: lambda: plot_curves(last["metrics"]),
        CONFUSION: lambda: plot_confusions(counts, test.class_names),
        PREDICTIONS: lambda: plot_predictions(net, test, log_probs, first, "Test images, the classes in turn"),
        MISTAKES: lambda: plot_mistakes(net, test, log_probs),
        AUGMENTATIONS: lambda: plot_augmentations(train),
    }
    if len(counts) > MANY:
        del drawings[CONFUSION]  # nobody could read it, and it would take minutes
    for name, draw in drawings.items():
        with only_warn(name):
            draw().savefig(folder / name, dpi=100)
    loss = F.nll_loss(log_probs.double(), test.labels).item()
    (folder / PAGE).write_text(describe(checkpoint, counts, loss), encoding="utf-8", errors="backslashreplace")
    print(f"A report with pictures is in {folder / PAGE}")


def describe(checkpoint: dict, counts: torch.Tensor, loss: float) -> str:
    """Return the page: the numbers, the pictures, the classes, what made the run, its settings."""
    config, last, maker = checkpoint["config"], checkpoint["metrics"][-1], checkpoint["made_by"][-1]
    names, correct, total = checkpoint["class_names"], int(counts.diagonal().sum()), int(counts.sum())
    accuracy, rates = f"{100 * correct / total:.2f} %", 100 * counts.diagonal() / counts.sum(dim=1).clamp(min=1)
    shown = {name: title for name, title in PICTURES.items() if name != CONFUSION or len(counts) <= MANY}
    pictures = "".join(f"## {title}\n\n![{title}]({name})\n\n" for name, title in shown.items())
    classes = "".join(f"| {name} | {rate:.2f} % |\n" for name, rate in zip(names, rates.tolist(), strict=True))
    made_by = ", ".join([maker["device"], *(f"{name} {version}" for name, version in maker["versions"].items())])
    settings = "".join(f"{name} = {value!r}\n" for name, value in config.items())
    return f"""# {config["dataset"]}: {accuracy} of {total:,} test images

| epochs | training loss | training accuracy | test loss | test accuracy | mean of the classes |
|---|---|---|---|---|---|
| {checkpoint["epoch"]} of {config["epochs"]} | {last["train_loss"]:.4f} | {last["train_accuracy"]:.2f} % | {loss:.4f} \
| {accuracy} ({correct:,} of {total:,}) | {rates.mean():.2f} % |

Training figures are those of images as they were trained on: augmented, each before its step.

{pictures}## Classes

| class | accuracy |
|---|---|
{classes}
The most frequent mistakes:

{worst_pairs(counts, names)}
## What made it

{made_by}; commit {maker["commit"] or "unknown"}. last.pt holds the text of the modules.

## Settings

```
{settings}```
"""


def worst_pairs(counts: torch.Tensor, names: Sequence[str]) -> str:
    """Return a line for each of the 20 most frequent mistakes."""
    mistakes = counts - counts.diagonal().diag()
    order = mistakes.flatten().argsort(descending=True, stable=True)[:20].tolist()
    pairs = [divmod(index, len(names)) for index in order]
    return "".join(f"- {names[a]} taken for {names[b]}: {mistakes[a, b]}\n" for a, b in pairs if mistakes[a, b])


def main(argv: list[str] | None = None) -> None:
    """Report as the command line says."""
    parser = argparse.ArgumentParser("python -m tools.report", description="Draw the pictures of a run, and report.md.")
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--data-dir", help="where the images are (default: as in the training)")
    parser.add_argument("--device", help="cpu, cuda, mps, ... (default: as in the training)")
    report(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    in_one_line("tools.report", main)
