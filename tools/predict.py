"""What a trained network says about images: ``python -m tools.predict weights/cifar10.pt cat.jpg dog.jpg``."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import nn

from config import UsageError
from dataset import ImageDataset, make_loader
from parts.command_line import in_one_line
from parts.images import HIDDEN, read_image, resize_image
from tools.evaluate import compute_outputs, load_network


class Prediction(NamedTuple):
    """The likeliest class of an image, its probability, and those of all classes, the likeliest first."""

    class_name: str
    probability: float
    probabilities: dict[str, float]


Picture = str | Path | np.ndarray | Image.Image


def to_picture(image: Picture, size: int = 32) -> np.ndarray:
    """Return an image as a (size, size, 3) uint8 array. Raises UsageError for anything but an image."""
    if isinstance(image, (str, Path)):
        return read_image(image, size)
    given = f"{type(image).__name__} {getattr(image, 'shape', '')} {getattr(image, 'dtype', '')}".strip()
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        image = Image.fromarray(image) if image.size else image
    if not isinstance(image, Image.Image) or 0 in image.size:
        kinds = "a file's path, a PIL image, or an array (H, W, 3) of uint8, 0 to 255, RGB"
        raise UsageError(f"an image is {kinds}; not {given}")
    try:
        return resize_image(image, size)
    except Exception as error:  # a file that PIL has opened is decoded only now
        raise UsageError(f"{given} cannot be read as an image ({error})") from None


def predict(checkpoint: str | Path, images: Sequence[Picture], net: Callable | None = None) -> list[Prediction]:
    """Return what the network of a checkpoint, or of a run's folder, says about each image.

    An image is a file's path, a PIL image, or an array (H, W, 3) of uint8, 0 to 255, in the order RGB: OpenCV reads
    BGR, which no number tells, and which costs 10 points of accuracy. Images are resized and normalized as in the
    training; computed on the CPU in float32. net: makes the network (default: Net).
    Raises UsageError for a checkpoint or an image that cannot be used.
    """
    if not isinstance(images, list | tuple | np.ndarray) or getattr(images, "ndim", 4) != 4:
        raise UsageError("images must be a list of images, or an array (N, H, W, 3) of them")
    net, checkpoint = load_network(checkpoint, net)
    size = checkpoint["config"].get("image_size", 32)
    return predict_pictures(net, checkpoint, [to_picture(image, size) for image in images])


def predict_pictures(net: nn.Module, checkpoint: dict, pictures: Sequence[np.ndarray]) -> list[Prediction]:
    """Return what a loaded network says about pictures as `to_picture` makes them."""
    if len(pictures) == 0:
        return []
    pictures, names = np.stack(pictures), checkpoint["class_names"]
    labels = np.zeros(len(pictures), dtype=np.int64)  # not known, not used
    dataset = ImageDataset(pictures, labels, names, checkpoint["mean"], checkpoint["std"])
    predictions = []
    for row in compute_outputs(net, make_loader(dataset, batch_size=128)).exp():
        probability, order = row.sort(descending=True, stable=True)
        ranked = dict(zip([names[index] for index in order], probability.tolist(), strict=True))
        predictions.append(Prediction(names[order[0]], probability[0].item(), ranked))
    return predictions


def files_of(path: Path) -> list[Path]:
    """Return the path itself or, of a folder, all files in it that are not hidden; raise UsageError if it has none."""
    if not path.is_dir():
        return [path]
    files = [file for file in sorted(path.rglob("*")) if not file.is_dir() or file.is_symlink()]
    if files := [file for file in files if not any(map(HIDDEN.match, file.relative_to(path).parts))]:
        return files
    raise UsageError(f"{path} is empty: it needs images")


def main(argv: list[str] | None = None) -> None:
    """Print a line for each image, also of folders: the three likeliest classes. Raises UsageError if one has none."""
    parser = argparse.ArgumentParser("python -m tools.predict", description="Print each image's likeliest classes.")
    parser.add_argument("checkpoint", metavar="RUN_DIR|CHECKPOINT")
    parser.add_argument("paths", metavar="IMAGE|FOLDER", nargs="+", type=Path)
    arguments = parser.parse_args(argv)
    net, checkpoint = load_network(arguments.checkpoint)
    size = checkpoint["config"].get("image_size", 32)
    pictures, failed = {}, 0
    for path in arguments.paths:
        for file in files_of(path):
            try:
                pictures[file] = read_image(file, size)
            except UsageError as error:
                print(error, file=sys.stderr)
                failed += 1
    for file, prediction in zip(pictures, predict_pictures(net, checkpoint, [*pictures.values()]), strict=True):
        likeliest = list(prediction.probabilities.items())[:3]
        print(f"{file}: {', '.join(f'{name} {100 * probability:.1f} %' for name, probability in likeliest)}")
    if failed:
        raise UsageError(f"{failed} of {failed + len(pictures)} images cannot be read")


if __name__ == "__main__":
    in_one_line("tools.predict", main)
