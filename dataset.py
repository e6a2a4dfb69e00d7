"""How images are split, augmented and batched, whichever source they come from."""

import math
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from typing import NamedTuple

# albumentations asks a web server for updates when it is imported, unless this is set first.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from config import Config
from processes import rank, world_size
from sources import DataError, Split, load_source


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

    shift_limit is a part of the image's side, rotate_limit is in degrees, hole_size in pixels. albumentations rounds
    a shift towards 0, to whole pixels: 0.125 of 32 gives up to 3.
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
        if not len(indices):  # of several processes, this one has no part in a small last batch
            return torch.empty(0, 3, *self.images.shape[1:3]), self.labels[indices]
        return self.normalization(images=self.augment(epoch, indices))["images"], self.labels[indices]

    def augment(self, epoch: int, indices: Sequence[int]) -> np.ndarray:
        """Return the images (N, H, W, 3) uint8 as they are augmented in this epoch."""
        images = self.images.numpy()
        bits = np.random.Philox(key=self.seed)
        generator = np.random.Generator(bits)
        # One stream for the whole pipeline: its transforms are independent of each other.
        self.augmentation.set_random_state(generator, _GeneratorRandom(generator))
        # Philox computes its numbers from key and counter alone: to set the counter is to begin the image's own stream.
        state, batch = bits.state, []
        for index in indices:
            state["state"]["counter"][:] = 0, 0, index, epoch
            bits.state = state
            batch.append(self.augmentation(image=images[index])["image"])
        return np.stack(batch)


class EpochBatches(Sampler):
    """The keys of an epoch's batches, (epoch, indices): a permutation that follows from seed and epoch.

    Call set_epoch before each epoch. The last batch has what is left. Of `world_size` processes, number
    `rank` gets its part of each batch, which may be none of the last.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.count, self.batch_size, self.seed, self.epoch = count, batch_size, seed, 0
        self.rank, self.world_size = rank, world_size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        # The second counter word keeps this stream apart from the images' own.
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 1, 0, self.epoch]))
        order = generator.permutation(self.count)
        for start in range(0, self.count, self.batch_size):
            yield self.epoch, order[start : start + self.batch_size][self.rank :: self.world_size]


class FixedBatches:
    """Batches of normalized images in their own order: what validation iterates over.

    Each is (images (N, 3, H, W) float32, labels (N,) int64). Nothing here is random, so it needs no worker.
    Of `world_size` processes, number `rank` gets its part of each batch, if it has one of a small last batch.
    """

    def __init__(self, split: Split, normalization: A.Compose, batch_size: int, rank: int = 0, world_size: int = 1):
        self.split, self.normalization, self.batch_size = split, normalization, batch_size
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return -(-len(self.split.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, len(self.split.labels), self.batch_size):
            batch = (array[start : start + self.batch_size] for array in self.split)
            images, labels = (array[self.rank :: self.world_size] for array in batch)
            if len(labels):
                yield self.normalization(images=images)["images"], torch.from_numpy(labels)


def _start_worker(worker: int) -> None:
    """Set up a worker process: one thread, and signals that leave the main process the only one to speak."""
    cv2.setNumThreads(0)  # OpenCV's own threads would fight the other workers for the cores
    # The thread that hands batches over would tell stderr when the main process, stopped by a signal, lets go of one.
    # An error in the pipeline does not come this way: the main process gets it, and says it.
    sys.excepthook = lambda *args: None
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
        cv2.setNumThreads(0)  # an image of 32x32 pixels is too small for OpenCV's own threads
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


class Data(NamedTuple):
    """What a run reads: batches for training, validation and the final test, and what the images are."""

    train: DataLoader
    valid: FixedBatches
    test: FixedBatches
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_data(config: Config, num_workers: int) -> Data:
    """Load the config's dataset, split it, and set up its pipelines, this process's part of them. Raises DataError."""
    source = load_source(config.dataset, config.data_dir)
    train, valid = source.train, source.test
    if config.valid_split > 0:
        train, valid = hold_out(source.train, config.valid_split, config.seed)
    mean, std = channel_statistics(train.images)
    normalization = make_normalization(mean, std)
    augmentation = make_augmentation(
        mean,
        flip_probability=config.flip_probability,
        shift_scale_rotate_probability=config.shift_scale_rotate_probability,
        shift_limit=config.shift_limit,
        scale_limit=config.scale_limit,
        rotate_limit=config.rotate_limit,
        coarse_dropout_probability=config.coarse_dropout_probability,
        hole_size=config.hole_size,
    )
    return Data(
        make_loader(
            AugmentedBatches(train, augmentation, normalization, config.seed),
            EpochBatches(len(train.labels), config.batch_size, config.seed, rank(), world_size()),
            num_workers,
            pin_memory=config.device.startswith("cuda"),
        ),
        FixedBatches(valid, normalization, config.batch_size, rank(), world_size()),
        FixedBatches(source.test, normalization, config.batch_size, rank(), world_size()),
        source.class_names,
        mean,
        std,
    )
