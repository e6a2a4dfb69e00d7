"""CIFAR-10, or other images: ``train, valid, test = load_datasets(config); image, label = train[0]``."""

import os
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
from extras.sources import load_source
from extras.transforms import RepeatableCompose, ShiftScaleRotate, SquareHole
from extras.workers import QuietDataLoader, start_worker


class ImageDataset(Dataset):
    """Images in memory: `dataset[i]` is (image, label), a normalized float32 tensor (3, 32, 32) and an int.

    images (N, 32, 32, 3) uint8, labels (N,) int64. mean, std: of each channel, for pixels of 0..1.
    augmentation: determined, for each image, by `seed`, the epoch given to `set_epoch`, and the image's index.
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
        # Tensors: workers that are not forked share their memory, where each would get a copy of an array.
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(labels)
        self.class_names, self.mean, self.std = list(class_names), tuple(mean), tuple(std)
        self.normalization = A.Compose([A.Normalize(mean, std), A.ToTensorV2()], strict=True)
        self.augmentation, self.seed = augmentation, seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shared: running workers see it change

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose augmentation the images get; call it before the epoch's first batch."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.__getitems__([range(len(self))[index]])[0]  # range resolves -1; its IndexError ends a loop

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, int]]:
        """Return a batch's items. DataLoader calls this: normalizing them together takes a fifth of the time."""
        indices = [int(index) for index in indices]  # they may be tensors
        images = self.normalization(images=self.augment(indices))["images"]
        return list(zip(images, self.labels[indices].tolist(), strict=True))

    def augment(self, indices: Sequence[int]) -> np.ndarray:
        """Return images (N, 32, 32, 3) uint8 as they are augmented in this epoch."""
        images = self.images.numpy()[indices]  # a copy
        epoch = self.epoch.item()
        if self.augmentation is not None:
            for place, index in enumerate(indices):
                self.augmentation.set_key(self.seed, epoch, index)
                image = self.augmentation(image=images[place])["image"]
                if image.dtype != np.uint8 or image.shape != (32, 32, 3):
                    raise UsageError(f"augmentation must keep (32, 32, 3) uint8, not make {image.shape} {image.dtype}")
                images[place] = image
        return images


def make_augmentation(config: Config, mean: Sequence[float]) -> RepeatableCompose:
    """Return the random part of the pipeline, uint8 to uint8: mirror, shift-scale-rotate, hole in the mean colour.

    Add any transform of albumentations that keeps the image (32, 32, 3) uint8. Shifts are cut to whole pixels.
    The hole is Cutout: DeVries & Taylor 2017, arXiv:1708.04552.
    """
    mean_color = tuple(round(255 * channel) for channel in mean)
    return RepeatableCompose(
        [
            A.HorizontalFlip(p=config.flip_probability),
            ShiftScaleRotate(
                config.shift_limit, config.scale_limit, config.rotate_limit, p=config.shift_scale_rotate_probability
            ),
            SquareHole(config.hole_size, fill=mean_color, p=config.coarse_dropout_probability),
        ]
    )


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of (N, H, W, 3) uint8 images, for pixels of 0..1.

    A constant channel gets a deviation of 1, for it will be divided by it.
    """
    mean, std = (values[:, 0] / 255 for values in cv2.meanStdDev(images.reshape(-1, 1, 3)))  # as one tall image
    std[std == 0] = 1
    return tuple(mean.tolist()), tuple(std.tolist())


def hold_out(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return which images are held out, (N,) bool: `fraction` of each class, drawn at random.

    Raises UsageError if a class would have no image on one of the two sides.
    """
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = round(fraction * len(members))
        if not 0 < count < len(members):
            raise UsageError(f"valid_split {fraction} leaves a class of {len(members)} images with none on one side")
        held_out[members[:count]] = True
    return held_out


class Datasets(NamedTuple):
    """What a run reads: to train on, to validate on, and for the final test."""

    train: ImageDataset
    valid: ImageDataset
    test: ImageDataset


def load_datasets(config: Config) -> Datasets:
    """Load the config's images, split them, and set up their pipelines. Raises UsageError if that fails."""
    source = load_source(config.dataset, config.data_dir)
    if len(source.class_names) < 2:
        raise UsageError(f"{config.data_dir} has one class only, and there is nothing to tell it from: add another")
    train, valid = source.train, source.test
    if config.valid_split > 0:
        held_out = hold_out(train.labels, config.valid_split, config.seed)
        train, valid = train.select(~held_out), train.select(held_out)
    mean, std = channel_statistics(train.images)
    common = {"class_names": source.class_names, "mean": mean, "std": std}
    return Datasets(
        ImageDataset(*train, **common, augmentation=make_augmentation(config, mean), seed=config.seed),
        ImageDataset(*valid, **common),
        ImageDataset(*source.test, **common),
    )


class EpochBatchSampler(Sampler):
    """Batches of indices into a dataset: in order, or in a random order that its seed and epoch determine.

    Of `world_size` processes, number `rank` gets its part of each batch. If shuffled, for training, a last batch with
    fewer images than processes is left out: every process must take part in a step.
    """

    def __init__(self, dataset: ImageDataset, batch_size: int, shuffle: bool, rank: int = 0, world_size: int = 1):
        self.dataset, self.batch_size, self.shuffle = dataset, batch_size, shuffle
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        whole, rest = divmod(len(self.dataset), self.batch_size)
        smallest = self.world_size if self.shuffle else 1
        return whole + 1 if rest >= smallest else whole  # the same in all processes

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(len(self.dataset))
        if self.shuffle:
            order = np.random.default_rng((self.dataset.seed, self.dataset.epoch.item())).permutation(order)
        for step in range(len(self)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            if len(batch) > self.rank:  # else this process has no image of a small last batch
                yield batch[self.rank :: self.world_size].tolist()


def make_loader(
    dataset: ImageDataset,
    batch_size: int,
    shuffle: bool = False,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Return a loader of batches: images (N, 3, 32, 32) float32, labels (N,) int64; 0 workers: made in this process."""
    loader_class = QuietDataLoader if num_workers else DataLoader
    return loader_class(
        dataset,
        batch_sampler=EpochBatchSampler(dataset, batch_size, shuffle, rank, world_size),
        num_workers=num_workers,
        worker_init_fn=start_worker,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_initialized(),  # true once choose_device, or a network, has used CUDA
        generator=torch.Generator(),  # or the loader would draw from the global one, and shift dropout's numbers
    )
