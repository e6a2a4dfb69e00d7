"""The pictures of a run: each plot_ function returns a matplotlib Figure, which needs no screen."""

import math
from collections.abc import Sequence

import matplotlib as mpl
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import nn

from dataset import ImageDataset

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
    labels = train.labels.tolist()
    indices = [labels.index(label) for label in range(min(count, len(train.class_names)))]  # the first of each
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
