"""What a trained network says about images: ``predict("runs/<name>/best.pt", ["cat.jpg"])``."""

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
from extras.architecture import load_weights
from extras.sources import read_image, resize_image
from model import Net
from utils import forward, load_checkpoint


class Prediction(NamedTuple):
    """The likeliest class of an image, its probability, and those of all classes, the likeliest first."""

    class_name: str
    probability: float
    probabilities: dict[str, float]


def load_network(path: str | Path) -> tuple[Net, dict]:
    """Return the network of a checkpoint, in evaluation mode on the CPU, and the checkpoint. Raises UsageError."""
    checkpoint = load_checkpoint(path)
    dropout = checkpoint.get("config", {}).get("dropout", 0.0)
    with torch.random.fork_rng(devices=[]):  # the first weights, drawn in vain, must not move a notebook's generator
        net = Net(num_classes=len(checkpoint["class_names"]), dropout=dropout)
    load_weights(net, checkpoint, path)
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

    mirrored: of their mirror images instead. description: the progress bar's, in a terminal; without it, no bar.
    """
    net.eval()
    device, outputs = next(net.parameters()).device, []
    for images, _ in tqdm(loader, description, disable=None if description else True, dynamic_ncols=True):
        images = (images.flip(3) if mirrored else images).to(device, memory_format=torch.channels_last)
        outputs.append(forward(net, images, dtype).cpu())
    return torch.cat(outputs)


Picture = str | Path | np.ndarray | torch.Tensor | Image.Image
ACCEPTED = (
    "an image is a file's path, a PIL image, a uint8 array (H, W, 3) or (H, W), or a tensor (3, H, W) of uint8 or of "
    "floats from 0 to 1"
)


def to_picture(image: Picture) -> np.ndarray:
    """Return an image as a (32, 32, 3) uint8 array. Raises UsageError for anything but an image: see ACCEPTED."""
    if isinstance(image, (str, Path)):
        return read_image(image)
    given = f"{type(image).__name__} {getattr(image, 'shape', '')} {getattr(image, 'dtype', '')}".strip()
    if isinstance(image, torch.Tensor) and image.ndim == 3 and image.shape[0] == 3:
        if image.is_floating_point() and image.numel() and image.min() >= 0 and image.max() <= 1:
            image = (255 * image).round().to(torch.uint8)
        if image.dtype == torch.uint8:
            image = np.ascontiguousarray(image.detach().cpu().permute(1, 2, 0).numpy())
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size and image.ndim > 1:
        image = Image.fromarray(image) if image.shape[2:] in ((), (3,)) else image
    if not isinstance(image, Image.Image) or 0 in image.size:
        raise UsageError(f"{ACCEPTED}; not {given}")
    try:
        return resize_image(image)
    except Exception as error:  # a file that PIL has opened is decoded only now
        raise UsageError(f"{given} cannot be read as an image ({error})") from None


def predict(checkpoint: str | Path, images: Sequence[Picture]) -> list[Prediction]:
    """Return what the checkpoint's network says about each image; ACCEPTED says what an image may be.

    Images are resized to 32x32 and normalized as in the checkpoint's training; computed on the CPU in float32.
    Raises UsageError for a checkpoint or an image that cannot be used.
    """
    if not isinstance(images, (list, tuple, np.ndarray, torch.Tensor)) or getattr(images, "ndim", 4) != 4:
        raise UsageError(f"images must be a list of images, or an array or tensor of them; {ACCEPTED}")
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
        predictions.append(Prediction(names[order[0]], probability[0].item(), ranked))
    return predictions


def print_predictions(path: str, images: list[str]) -> None:
    """Print a line for each image: the three likeliest classes, by the checkpoint's network."""
    for image, prediction in zip(images, predict(path, images), strict=True):
        likeliest = list(prediction.probabilities.items())[:3]
        print(f"{image}: {', '.join(f'{name} {100 * probability:.1f} %' for name, probability in likeliest)}")
