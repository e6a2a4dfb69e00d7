"""Where images come from, how they are augmented, how they are batched.

A source gives plain arrays: images (N, 32, 32, 3) uint8 and labels (N,) int64. Everything after it is
the same for all sources.
"""

import contextlib
import math
import multiprocessing
import os
import pickle
import random
import signal
import tarfile
import tempfile
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NamedTuple

# albumentations asks a web server for updates when it is imported, unless this is set first.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class DataError(Exception):
    """Images that cannot be had or used; the message is one line for the user."""


class Split(NamedTuple):
    """images (N, 32, 32, 3) uint8 and labels (N,) int64, in one order."""

    images: np.ndarray
    labels: np.ndarray


class Source(NamedTuple):
    """What a dataset gives, whichever it is."""

    train: Split
    test: Split
    class_names: tuple[str, ...]


def load_source(name: str, data_dir: str | Path) -> Source:
    """Load the dataset `name`, "cifar10" or "shapes"; raise DataError if it cannot be had."""
    source = {"cifar10": load_cifar10, "shapes": load_shapes}[name](Path(data_dir))
    for images, labels in (source.train, source.test):
        if images.shape != (len(labels), 32, 32, 3) or images.dtype != np.uint8:
            raise DataError(f"{name} in {data_dir} has images of shape {images.shape}, {images.dtype}: delete it")
        if labels.min() < 0 or labels.max() >= len(source.class_names):
            raise DataError(f"{name} in {data_dir} has labels outside 0 to {len(source.class_names) - 1}: delete it")
    return source


# --- CIFAR-10 ---------------------------------------------------------------------------------------


def load_cifar10(data_dir: Path) -> Source:
    """Return CIFAR-10 (Krizhevsky 2009) through torchvision, downloaded into data_dir if it is not there.

    No file is unpickled before its md5 has been verified. Raises DataError.
    """
    from torchvision.datasets import CIFAR10  # here: it is slow to import, and `shapes` goes without it

    folder = data_dir / CIFAR10.base_folder
    if not folder.is_dir():
        _fetch_cifar10(data_dir)
    try:
        train, test = CIFAR10(data_dir, train=True), CIFAR10(data_dir, train=False)
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, pickle.UnpicklingError) as error:
        meta = CIFAR10.meta["filename"], CIFAR10.meta["md5"]
        for name, md5 in [*CIFAR10.train_list, *CIFAR10.test_list, meta]:
            _check_md5(folder / name, md5, delete=folder)
        raise DataError(f"CIFAR-10 cannot be read ({error}): delete {folder} and it is downloaded again") from None
    return Source(
        # torchvision's images are a transposed view; every later read wants them in one piece
        Split(np.ascontiguousarray(train.data), np.array(train.targets, dtype=np.int64)),
        Split(np.ascontiguousarray(test.data), np.array(test.targets, dtype=np.int64)),
        tuple(train.classes),
    )


def _fetch_cifar10(data_dir: Path) -> None:
    """Download and unpack in a temporary folder, so that only what is whole gets its name in data_dir."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import extract_archive

    archive = data_dir / CIFAR10.filename
    if archive.exists():
        _check_md5(archive, CIFAR10.tgz_md5, delete=archive)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=".cifar10-", dir=data_dir)
    except OSError as error:
        raise DataError(f"data_dir {data_dir} cannot be written ({error.strerror}): name another, --data-dir") from None
    with temporary as folder:
        try:
            if archive.exists():
                extract_archive(archive, folder)
            else:
                CIFAR10(folder, download=True)
        except (OSError, RuntimeError, tarfile.TarError) as error:
            raise DataError(
                f"CIFAR-10 is not in {data_dir} and cannot be downloaded ({error}); either put {CIFAR10.url} "
                f"(md5 {CIFAR10.tgz_md5}) at {archive}, or name the folder that holds it with --data-dir, "
                f"or train on generated pictures with --dataset shapes"
            ) from None
        with contextlib.suppress(OSError):  # another run may have been faster
            os.replace(Path(folder, CIFAR10.base_folder), data_dir / CIFAR10.base_folder)


def _check_md5(path: Path, md5: str, delete: Path) -> None:
    from torchvision.datasets import cifar

    try:
        whole = cifar.check_integrity(str(path), md5)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None
    if not whole:
        fault = "is damaged (its md5 is wrong)" if path.exists() else "is missing"
        raise DataError(f"{path} {fault}: delete {delete} and it is downloaded again")


# --- shapes -----------------------------------------------------------------------------------------


# Each class: whether the point (u, v) is inside the figure, which fits the circle u^2 + v^2 <= 1.
SHAPES = {
    "bar": lambda u, v: (abs(u) <= 0.95) & (abs(v) <= 0.28),
    "bow tie": lambda u, v: (abs(v) <= abs(u)) & (abs(u) <= 0.7),
    "circle": lambda u, v: u * u + v * v <= 0.65,
    "crescent": lambda u, v: (u * u + v * v <= 0.9) & ((u - 0.5) ** 2 + v * v >= 0.5),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) <= 0.25) & (np.maximum(abs(u), abs(v)) <= 0.95),
    "frame": lambda u, v: (np.maximum(abs(u), abs(v)) <= 0.75) & (np.maximum(abs(u), abs(v)) >= 0.45),
    "half disc": lambda u, v: (u * u + v * v <= 0.9) & (v >= 0),
    "ring": lambda u, v: (u * u + v * v <= 0.85) & (u * u + v * v >= 0.3),
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 0.65,
    "triangle": lambda u, v: (v >= -0.5) & (v + 1.75 * abs(u) <= 1),
}


def load_shapes(data_dir: Path | None = None) -> Source:
    """Return ten classes of generated pictures: 1,200 to train on, 300 to test on; nothing is read or written."""
    rng = np.random.Generator(np.random.Philox(key=0))
    return Source(draw_shapes(1200, rng), draw_shapes(300, rng), tuple(SHAPES))


def draw_shapes(count: int, rng: np.random.Generator) -> Split:
    """Draw `count` pictures of SHAPES, the classes in turn; position, size, colours, rotation and noise vary.

    Only `rng.random` and arithmetic that IEEE 754 rounds exactly are used (no sine, no logarithm): the
    pictures are the same, bit for bit, on every machine.
    """
    labels = np.arange(count, dtype=np.int64) % len(SHAPES)
    t, x, y, size = rng.random((4, count, 1, 1))
    t = 2 * t - 1
    cosine, sine = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)  # a point of the half circle: +-90 degrees
    pixel = np.arange(32) + 0.5
    dx = pixel[None, None, :] - (12 + 8 * x)  # centre within 4 pixels of the image's
    dy = pixel[None, :, None] - (12 + 8 * y)
    radius = 7 + 5 * size
    u, v = (cosine * dx + sine * dy) / radius, (cosine * dy - sine * dx) / radius
    inside = np.empty((count, 32, 32), dtype=bool)
    for label, shape in enumerate(SHAPES.values()):
        inside[labels == label] = shape(u[labels == label], v[labels == label])
    background = 0.6 * rng.random((count, 1, 1, 3))
    figure = background + 0.25 + 0.15 * rng.random((count, 1, 1, 3))
    pictures = np.where(inside[..., None], figure, background)
    flipped = rng.random((count, 1, 1, 1)) < 0.5  # as often dark on bright
    pictures = np.where(flipped, 1 - pictures, pictures) + 0.3 * (rng.random(pictures.shape) - 0.5)
    return Split((255 * pictures.clip(0, 1)).astype(np.uint8), labels)


# --- splitting, augmentation, batches -----------------------------------------------------------------


def hold_out(train: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Split the training images in two, `fraction` of each class held out: (the rest, the held-out images).

    Raises DataError if a class would have no image on one of the two sides.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    held_out = np.zeros(len(train.labels), dtype=bool)
    for label in np.unique(train.labels):
        members = rng.permutation(np.flatnonzero(train.labels == label))
        count = round(fraction * len(members))
        if not 0 < count < len(members):
            raise DataError(f"valid_split {fraction} leaves a class of {len(members)} images with none on one side")
        held_out[members[:count]] = True
    return Split(*(array[~held_out] for array in train)), Split(*(array[held_out] for array in train))


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of (N, H, W, 3) uint8 images, in units of 0..1."""
    mean, std = cv2.meanStdDev(images.reshape(-1, 1, 3))
    return tuple((mean[:, 0] / 255).tolist()), tuple((std[:, 0] / 255).tolist())


class ShiftScaleRotate(A.Affine):
    """A.Affine without shear: the same pictures from the same random numbers, in a quarter of the time.

    Its own matrix is a product of six (and another six for bounding boxes); here is the product, worked out.
    """

    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict:
        """Draw shift, scale and angle in A.Affine's order; return the (2, 3) matrix from input to output pixels."""
        height, width = params["shape"][:2]
        shift = self._get_translate_params((height, width))
        self._get_shear_params()  # always 0, but drawn
        scale = self._get_scale(self.scale, self.keep_ratio, self.balanced_scale, self.py_random)["x"]
        angle = math.radians(self.py_random.uniform(*self.rotate))
        a, b = scale * math.cos(angle), scale * math.sin(angle)
        x, y = (width - 1) / 2, (height - 1) / 2  # the centre, which stays where it is but for the shift
        return {"matrix": np.array([[a, b, x - a * x - b * y + shift["x"]], [-b, a, y + b * x - a * y + shift["y"]]])}

    def apply(self, img: np.ndarray, matrix: np.ndarray, **params) -> np.ndarray:
        """Warp an image (H, W, C)."""
        return cv2.warpAffine(img, matrix, img.shape[1::-1], flags=self.interpolation, borderMode=self.border_mode)


class SquareHole(A.CoarseDropout):
    """A.CoarseDropout with one hole of one size, in a fifth of the time."""

    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict:
        """Draw the hole's upper left corner, each with the same chance."""
        size = self.hole_height_range[0]
        x, y = (int((side - size + 1) * self.py_random.random()) for side in params["shape"][1::-1])
        return {"hole": (slice(y, y + size), slice(x, x + size))}

    def apply(self, img: np.ndarray, hole: tuple[slice, slice], **params) -> np.ndarray:
        """Fill the hole in a copy of the image (H, W, C)."""
        img = img.copy()
        img[hole] = self.fill
        return img


def make_augmentation(
    mean: tuple[float, ...],
    *,
    flip_probability: float,
    shift_scale_rotate_probability: float,
    shift_limit: float,
    scale_limit: float,
    rotate_limit: float,
    coarse_dropout_probability: float,
    hole_size: int,
) -> A.Compose:
    """Return the random part of the pipeline, uint8 to uint8: mirror, shift-scale-rotate, hole in the mean colour.

    shift_limit is a part of the image's side, rotate_limit is in degrees, hole_size in pixels.
    The hole: DeVries & Taylor 2017, arXiv:1708.04552.
    """
    return A.Compose(
        [
            A.HorizontalFlip(p=flip_probability),
            ShiftScaleRotate(
                translate_percent=(-shift_limit, shift_limit),
                scale=(1 - scale_limit, 1 + scale_limit),
                rotate=(-rotate_limit, rotate_limit),
                keep_ratio=True,
                border_mode=cv2.BORDER_REFLECT_101,
                p=shift_scale_rotate_probability,
            ),
            SquareHole(
                num_holes_range=(1, 1),
                hole_height_range=(hole_size, hole_size),
                hole_width_range=(hole_size, hole_size),
                fill=tuple(round(255 * channel) for channel in mean),
                p=coarse_dropout_probability,
            ),
        ],
        strict=True,
    )


def make_normalization(mean: tuple[float, ...], std: tuple[float, ...]) -> A.Compose:
    """Return the fixed part of the pipeline: (N, H, W, 3) uint8 to (N, 3, H, W) float32 in channels_last order.

    It is applied to whole batches, which takes a fifth of the time of one image after the other.
    """
    return A.Compose([A.Normalize(mean, std), A.ToTensorV2()], strict=True)


class _GeneratorRandom(random.Random):
    """Python's interface to random numbers over a numpy generator's stream."""

    def __init__(self, generator: np.random.Generator):
        super().__init__()
        self.generator = generator

    def random(self) -> float:
        return self.generator.random()


class AugmentedBatches(Dataset):
    """Batches of augmented, normalized training images: item (epoch, indices) is (images, labels).

    images (N, 3, H, W) float32 and labels (N,) int64 are tensors. Each image's augmentation is drawn from
    a counter made of the seed, the epoch and its index: neither the worker process nor what was drawn
    before plays a part. (albumentations alone would repeat itself in every worker and every epoch.)
    """

    def __init__(self, split: Split, augmentation: A.Compose, normalization: A.Compose, seed: int):
        # As a tensor, workers that are not forked get it as shared memory instead of a copy each.
        self.images, self.labels = (torch.from_numpy(array) for array in split)
        self.augmentation, self.normalization, self.seed = augmentation, normalization, seed

    def __getitem__(self, key: tuple[int, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, indices = key
        images = self.images.numpy()
        bits = np.random.Philox(key=self.seed)
        generator = np.random.Generator(bits)
        # One stream for the whole pipeline: its transforms are independent of each other.
        self.augmentation.set_random_state(generator, _GeneratorRandom(generator))
        state, batch = bits.state, []
        for index in indices:
            state["state"]["counter"][:] = 0, 0, index, epoch
            bits.state = state
            batch.append(self.augmentation(image=images[index])["image"])
        return self.normalization(images=np.stack(batch))["images"], self.labels[indices]


class EpochBatches(Sampler):
    """The keys of an epoch's batches, (epoch, indices): a permutation that follows from seed and epoch.

    Call set_epoch before each epoch. The last batch has what is left.
    """

    def __init__(self, count: int, batch_size: int, seed: int):
        self.count, self.batch_size, self.seed, self.epoch = count, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        # The second counter word keeps this stream apart from the images' own.
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 1, 0, self.epoch]))
        order = generator.permutation(self.count)
        for start in range(0, self.count, self.batch_size):
            yield self.epoch, order[start : start + self.batch_size]


class FixedBatches:
    """Batches of normalized images in their own order: what validation iterates over.

    Each is (images (N, 3, H, W) float32, labels (N,) int64). Nothing here is random, so it needs no worker.
    """

    def __init__(self, split: Split, normalization: A.Compose, batch_size: int):
        self.split, self.normalization, self.batch_size = split, normalization, batch_size

    def __len__(self) -> int:
        return -(-len(self.split.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, len(self.split.labels), self.batch_size):
            images, labels = (array[start : start + self.batch_size] for array in self.split)
            yield self.normalization(images=images)["images"], torch.from_numpy(labels)


def _start_worker(worker: int) -> None:
    """Set up a worker process: one thread, and signals that leave the main process the only one to speak."""
    cv2.setNumThreads(0)  # OpenCV's own threads would fight the other workers for the cores
    # A terminal's Ctrl-C and a cluster's SIGTERM reach the whole process group. The main process ends its
    # workers itself; SIGTERM must still work, and with exit code 0 torch does not take it for a crash.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, frame: os._exit(0))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)


_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}


class _Loader(DataLoader):
    """A DataLoader whose workers start with the stop signals blocked: _start_worker unblocks them once it is ready."""

    def __iter__(self):
        if not hasattr(signal, "pthread_sigmask"):  # Windows
            return super().__iter__()
        if self.num_workers and multiprocessing.get_start_method() != "fork":
            resource_tracker.ensure_running()  # or its start, with the first worker's, would unblock the signals
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def make_loader(batches: AugmentedBatches, keys: EpochBatches, num_workers: int, pin_memory: bool) -> DataLoader:
    """Return a loader of augmented batches, made in `num_workers` processes; 0 makes them in this one."""
    if num_workers == 0:
        cv2.setNumThreads(0)
    return _Loader(
        batches,
        sampler=keys,
        batch_size=None,  # an item is a whole batch already
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # or the loader would draw from the global one, and shift dropout's numbers
    )
