"""CIFAR-10, or other images: ``train, valid, test = load_datasets(config); image, label = train[0]``."""

import os
import signal
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# albumentations asks a web server for updates when it is imported, unless this is set first.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from config import Config, UsageError
from parts.images import load_source
from parts.transforms import RepeatableCompose, ShiftScaleRotate, SquareHole


class ImageDataset(Dataset):
    """Images in memory, normalized as they are read.

    `dataset[i]` is (image, label), a float32 tensor (3, 32, 32) and an int; `dataset[[i, j, ...]]` is a whole batch,
    images (N, 3, 32, 32) in channels_last and labels (N,), normalized together, which is several times faster;
    `dataset[epoch, [i, j, ...]]` is the batch as that epoch augments it.

    images (N, 32, 32, 3) uint8, RGB; labels (N,) int64. mean, std: of each channel, for pixels of 0..1.
    augmentation: follows, for each image, from `seed`, the epoch and the image's index, and from nothing else: an
    image that a sampler draws twice in an epoch is augmented alike both times.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        class_names: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: RepeatableCompose | None = None,
        seed: int = 0,
    ):
        if images.shape[3:] != (3,) or images.dtype != np.uint8 or len(images) != len(labels):
            given = f"{images.shape} {images.dtype} with {len(labels)} labels"
            raise UsageError(f"images must be (N, H, W, 3) uint8, RGB, with N labels; not {given}")
        if not isinstance(augmentation, RepeatableCompose | None):
            raise UsageError("augmentation must be a RepeatableCompose([...]), as make_augmentation returns")
        # Tensors: workers that are not forked share their memory, where each would get a copy of an array.
        self.images, self.labels = torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels).long()
        self.class_names, self.mean, self.std = [str(name) for name in class_names], tuple(mean), tuple(std)
        self.normalization = A.Compose([A.Normalize(mean, std), A.ToTensorV2()], strict=True)
        self.augmentation, self.seed, self.epoch = augmentation, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next pass over the images takes its order and its augmentation from."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | Sequence[int] | tuple[int, Sequence[int]]) -> tuple[torch.Tensor, object]:
        epoch, index = index if isinstance(index, tuple) else (self.epoch, index)
        several, all_indices = isinstance(index, Sequence | np.ndarray), range(len(self))
        indices = [all_indices[i] for i in (index if several else [index])]  # the range turns -1 into the last index
        images, labels = self.normalization(images=self.augment(epoch, indices))["images"], self.labels[indices]
        return (images, labels) if several else (images[0], labels.item())

    def augment(self, epoch: int, indices: Sequence[int]) -> np.ndarray:
        """Return images (N, 32, 32, 3) uint8 as they are augmented in that epoch."""
        images = self.images.numpy()[indices]  # a copy
        if self.augmentation is not None:
            for place, index in enumerate(indices):
                self.augmentation.set_key(self.seed, epoch, index)
                image = self.augmentation(image=images[place])["image"]
                if image.dtype != np.uint8 or image.shape != images[place].shape:
                    made = f"{image.shape} {image.dtype}"
                    raise UsageError(f"augmentation must keep {images[place].shape} uint8, not make {made}")
                images[place] = image
        return images


def make_augmentation(config: Config, mean: Sequence[float]) -> RepeatableCompose:
    """Return the random part of the pipeline, uint8 to uint8: mirror, shift-scale-rotate, hole in the mean colour.

    Add any transform of albumentations that keeps the image's shape and uint8. One of your own must draw its numbers
    from self.py_random or self.random_generator: those of random, np.random and torch do not follow from the seed here.
    The hole is Cutout: DeVries & Taylor 2017, arXiv:1708.04552.
    """
    mean_color = tuple(round(255 * channel) for channel in mean)
    limits = config.shift_limit, config.scale_limit, config.rotate_limit
    return RepeatableCompose(
        [
            A.HorizontalFlip(p=config.flip_probability),
            ShiftScaleRotate(*limits, p=config.shift_scale_rotate_probability),
            SquareHole(config.hole_size, fill=mean_color, p=config.coarse_dropout_probability),
        ]
    )


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of (N, H, W, 3) uint8 images, for pixels of 0..1."""
    parts = [cv2.meanStdDev(image) for image in images]  # of each alone: OpenCV counts pixels in 32 bits
    means, stds = np.array(parts)[..., 0].swapaxes(0, 1)  # each (N, 3)
    mean, std = means.mean(axis=0), np.sqrt((stds**2).mean(axis=0) + means.var(axis=0))  # within images and between
    std[std == 0] = 255  # 1 in the end: a constant channel is not divided by 0
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


def stratified_sample(labels: np.ndarray, fraction: float) -> np.ndarray:
    """Return which images are drawn, (N,) bool: `fraction` of each class, rounded; the same ones for all seeds."""
    rng = np.random.default_rng(0)
    drawn = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        drawn[members[: round(fraction * len(members))]] = True
    return drawn


class Datasets(NamedTuple):
    """What a run reads: to train on, to validate on, and for the final test."""

    train: ImageDataset
    valid: ImageDataset
    test: ImageDataset


def load_datasets(config: Config, mean: Sequence[float] = (), std: Sequence[float] = ()) -> Datasets:
    """Load the config's images, split them, and set up their pipelines. Raises UsageError if that fails.

    mean, std: of each channel, for pixels of 0..1; if not given, those of the training images.
    """
    train, test, class_names = load_source(config.dataset, config.data_dir, config.image_size)
    if (sides := train[0].shape[1:3]) != (config.image_size,) * 2:  # of a source of your own
        raise UsageError(f"image_size must be that of the images of {config.dataset}, {sides}, not {config.image_size}")
    if len(class_names) < 2:
        raise UsageError(f"{config.data_dir} has one class only, and there is nothing to tell it from: add another")
    valid = test
    if config.valid_split > 0:
        held_out = stratified_sample(train[1], config.valid_split)
        train, valid = ([array[chosen] for array in train] for chosen in (~held_out, held_out))
    if config.train_images > len(train[1]):
        raise UsageError(f"train_images must be at most {len(train[1]):,}, all there are, not {config.train_images:,}")
    if config.train_images > 0:
        chosen = stratified_sample(train[1], config.train_images / len(train[1]))
        train = [array[chosen] for array in train]
    if min(len(np.unique(labels)) for _, labels in (train, valid)) < len(class_names):
        raise UsageError("a class has no image left to train on or to validate on: change valid_split or train_images")
    if not mean:
        mean, std = channel_statistics(train[0])
    common = {"class_names": class_names, "mean": mean, "std": std}
    return Datasets(
        ImageDataset(*train, **common, augmentation=make_augmentation(config, mean), seed=config.seed),
        ImageDataset(*valid, **common),
        ImageDataset(*test, **common),
    )


class EpochBatchSampler(Sampler):
    """Batches for `dataset[epoch, indices]`: in order, or in a random one that the dataset's seed and epoch determine.

    Each pass takes the dataset's epoch and leaves it one higher, so that the next pass differs even if nobody calls
    set_epoch. Of `world_size` processes, number `rank` gets its part of each batch. If shuffled, for training, parts
    are of equal size, and the images of a last batch that do not divide are left out.
    """

    def __init__(self, dataset: ImageDataset, batch_size: int, shuffle: bool, rank: int = 0, world_size: int = 1):
        self.dataset, self.batch_size, self.shuffle = dataset, batch_size, shuffle
        self.rank, self.world_size = rank, world_size
        self.count = len(dataset)
        if shuffle:
            self.count -= self.count % batch_size % world_size  # what is left of the last batch

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)  # rounded up; the same in all processes

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        epoch, order = self.dataset.epoch, np.arange(len(self.dataset))
        self.dataset.set_epoch(epoch + 1)
        if self.shuffle:
            order = np.random.default_rng((self.dataset.seed, epoch)).permutation(order)
        for start in range(0, self.count, self.batch_size):
            batch = order[start : min(start + self.batch_size, self.count)]
            if len(batch) > self.rank:  # else this process has no image of a small last batch
                yield epoch, batch[self.rank :: self.world_size].tolist()


def start_worker(worker: int) -> None:
    """Set up a process that augments: the main process alone answers Ctrl-C, and ends its workers without a word."""
    cv2.setNumThreads(0)  # OpenCV's own threads would fight the other workers for the cores
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, frame: os._exit(0))  # torch reports any other exit as a crash


def make_loader(
    dataset: ImageDataset,
    batch_size: int,
    shuffle: bool = False,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Return a loader of batches: images (N, 3, 32, 32) float32, labels (N,) int64; 0 workers: made in this process.

    The dataset makes whole batches: what torch's documentation calls disabled automatic batching.
    """
    if not isinstance(dataset, ImageDataset):
        raise TypeError(f"make_loader takes an ImageDataset; for a {type(dataset).__name__} use torch's DataLoader")
    return DataLoader(
        dataset,
        sampler=EpochBatchSampler(dataset, batch_size, shuffle, rank, world_size),
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=start_worker,
        persistent_workers=num_workers > 0,  # with the dataset as of the first pass; later only the epoch reaches them
        timeout=300 if num_workers else 0,  # seconds: a batch that was lost is an error, not a wait for ever
        pin_memory=torch.cuda.is_initialized(),  # true once choose_device, or a network, has used CUDA
        generator=torch.Generator(),  # or the loader would draw from the global one, and shift dropout's numbers
    )
