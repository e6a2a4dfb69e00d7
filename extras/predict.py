"""What a trained network says of images: ``predict("runs/<name>/best.pt", ["cat.jpg"])``."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from config import UsageError
from dataset import ImageDataset, make_loader
from extras.runs import load_weights
from extras.sources import read_image, resize_image
from model import Net
from utils import load_checkpoint


class Prediction(NamedTuple):
    """The likeliest class of an image, its probability, and those of all classes, the likeliest first."""

    class_name: str
    probability: float
    probabilities: dict[str, float]


def load_network(path: str | Path) -> tuple[Net, dict]:
    """Return the network of a checkpoint, in evaluation mode on the CPU, and the checkpoint. Raises UsageError."""
    checkpoint = load_checkpoint(path)
    net = Net(num_classes=len(checkpoint["class_names"]))
    load_weights(net, checkpoint)
    return net.to(memory_format=torch.channels_last).eval(), checkpoint


@torch.inference_mode()
def compute_log_probs(
    net: nn.Module,
    loader: DataLoader,
    dtype: torch.dtype = torch.float32,
    mirrored: bool = False,
    description: str = "",
) -> torch.Tensor:
    """Return the log-probabilities (N, num_classes) of all the loader's images, float32 on the CPU.

    mirrored: those of the mirror images. description: that of the bar in a terminal; without it there is none.
    """
    net.eval()
    device, outputs = next(net.parameters()).device, []
    for images, _ in tqdm(loader, description, disable=not (description and sys.stderr.isatty()), dynamic_ncols=True):
        images = (images.flip(3) if mirrored else images).to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            outputs.append(net(images).float().cpu())
    return torch.cat(outputs)


def average_views(log_probs: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
    """Return the mean of the probabilities of two views of each image, as log-probabilities (N, num_classes)."""
    return torch.logaddexp(log_probs, mirrored) - math.log(2)


def to_picture(image: str | Path | np.ndarray | Image.Image) -> np.ndarray:
    """Return an image, (H, W, 3) or (H, W) uint8 if it is an array, as a (32, 32, 3) uint8 array.

    Raises UsageError for a file that is no image and for another array.
    """
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.shape[2:] not in ((), (3,)) or image.ndim < 2:
            raise UsageError(f"an array must be (H, W, 3) or (H, W) uint8, not {image.shape} {image.dtype}")
        image = Image.fromarray(image)
    return resize_image(image)


def predict(checkpoint: str | Path, images: Sequence[str | Path | np.ndarray | Image.Image]) -> list[Prediction]:
    """Return what the checkpoint's network says of each image: a file's path, a uint8 array, or a PIL image.

    Images are resized to 32x32 and normalized as in the checkpoint's training; computed on the CPU in float32.
    Raises UsageError for a checkpoint or an image that cannot be used.
    """
    if isinstance(images, (str, Path, Image.Image)) or (isinstance(images, np.ndarray) and images.ndim < 4):
        raise TypeError("images must be a list of images, or an array (N, H, W, 3)")
    net, checkpoint = load_network(checkpoint)
    names = checkpoint["class_names"]
    if len(images) == 0:
        return []
    pictures = np.stack([to_picture(image) for image in images])
    labels = np.zeros(len(pictures), dtype=np.int64)  # not known, not used
    dataset = ImageDataset(pictures, labels, names, checkpoint["mean"], checkpoint["std"])
    predictions = []
    for row in compute_log_probs(net, make_loader(dataset, batch_size=128)).exp():
        probability, order = row.sort(descending=True, stable=True)
        ranked = dict(zip([names[index] for index in order], probability.tolist(), strict=True))
        predictions.append(Prediction(*next(iter(ranked.items())), ranked))
    return predictions


def print_predictions(path: str, images: list[str]) -> None:
    """Print a line for each image: the three likeliest classes, by the checkpoint's network."""
    for image, prediction in zip(images, predict(path, images), strict=True):
        likeliest = list(prediction.probabilities.items())[:3]
        print(f"{image}: {', '.join(f'{name} {100 * probability:.1f} %' for name, probability in likeliest)}")
