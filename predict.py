"""What a trained network says of images: ``predict("runs/<name>/best.pt", ["cat.jpg"])``."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from checkpoint import load_checkpoint, load_weights
from dataset import FixedBatches, make_normalization
from model import Net
from sources import Split, read_image, resize_image


class Mirrored(nn.Module):
    """The mean of a network's probabilities for an image and its mirror image, as log-probabilities (N, num_classes).

    The simplest test-time augmentation.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.logaddexp(self.net(x), self.net(x.flip(3))) - math.log(2)


class Prediction(NamedTuple):
    """The likeliest class of an image, its probability, and those of all classes, the likeliest first."""

    class_name: str
    probability: float
    probabilities: dict[str, float]


def load_network(path: str | Path) -> tuple[Net, dict]:
    """Return the network of a checkpoint, in evaluation mode on the CPU, and the checkpoint. Raises RunError."""
    checkpoint = load_checkpoint(path)
    net = Net(num_classes=len(checkpoint["class_names"]))
    load_weights(net, checkpoint)
    return net.to(memory_format=torch.channels_last).eval(), checkpoint


def to_picture(image: str | Path | np.ndarray | Image.Image) -> np.ndarray:
    """Return an image, (H, W, 3) or (H, W) uint8 if it is an array, as a (32, 32, 3) uint8 array.

    Raises DataError for a file that is no image, ValueError for another array.
    """
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.shape[2:] not in ((), (3,)) or image.ndim < 2:
            raise ValueError(f"an array must be (H, W, 3) or (H, W) uint8, not {image.shape} {image.dtype}")
        image = Image.fromarray(image)
    return resize_image(image)


def predict(checkpoint: str | Path, images: Sequence[str | Path | np.ndarray | Image.Image]) -> list[Prediction]:
    """Return what the checkpoint's network says of each image: a file's path, a uint8 array, or a PIL image.

    Images are resized to 32x32 and normalized as in the checkpoint's training; computed on the CPU in float32.
    Raises RunError for a checkpoint and DataError for a file that cannot be used.
    """
    if isinstance(images, (str, Path, Image.Image)) or (isinstance(images, np.ndarray) and images.ndim < 4):
        raise TypeError("images must be a list of images, or an array (N, H, W, 3)")
    net, checkpoint = load_network(checkpoint)
    if len(images) == 0:
        return []
    pictures = np.stack([to_picture(image) for image in images])
    normalization = make_normalization(checkpoint["mean"], checkpoint["std"])
    batches = FixedBatches(Split(pictures, np.zeros(len(pictures), dtype=np.int64)), normalization, batch_size=128)
    log_probs = compute_log_probs(net, batches, torch.device("cpu"), torch.float32)
    predictions = []
    for row in log_probs.exp():
        probability, order = row.sort(descending=True, stable=True)
        names = [checkpoint["class_names"][index] for index in order]
        ranked = dict(zip(names, probability.tolist(), strict=True))
        predictions.append(Prediction(names[0], ranked[names[0]], ranked))
    return predictions


def print_predictions(path: str, images: list[str]) -> None:
    """Print a line for each image: the three likeliest classes, by the checkpoint's network."""
    for image, prediction in zip(images, predict(path, images), strict=True):
        likeliest = list(prediction.probabilities.items())[:3]
        print(f"{image}: {', '.join(f'{name} {100 * probability:.1f} %' for name, probability in likeliest)}")


@torch.inference_mode()
def compute_log_probs(net: nn.Module, batches: Iterable, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return the log-probabilities (N, num_classes) of all batches' images, float32 on the CPU."""
    net.eval()
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        return torch.cat([net(images.to(device, non_blocking=True)).cpu() for images, _ in batches])
