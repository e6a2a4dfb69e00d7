import itertools
import os
import random
import subprocess
import sys
from dataclasses import replace

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, random_split

from config import UsageError, config
from dataset import (
    EpochBatches,
    ImageDataset,
    channel_statistics,
    hold_out,
    load_datasets,
    make_augmentation,
    make_loader,
)
from extras.sources import draw_shapes, load_shapes
from extras.transforms import RepeatableCompose
from tests.conftest import ROOT

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PROBABILITIES = [name for name in vars(config) if name.endswith("probability")]
NEVER, ALWAYS = dict.fromkeys(PROBABILITIES, 0.0), dict.fromkeys(PROBABILITIES, 1.0)


def dataset_of(images, augmentation=None, seed=0):
    """The images, each with its place as its label."""
    names = [str(place) for place in range(len(images))]
    return ImageDataset(images, np.arange(len(images)), names, MEAN, STD, augmentation, seed)


def shapes(count=50, seed=0, **settings):
    images = draw_shapes(count, np.random.default_rng(0)).images
    return dataset_of(images, make_augmentation(replace(config, **settings), MEAN), seed)


def copies(count, seed=0, **settings):
    """The same picture, without any symmetry, `count` times."""
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    images = np.repeat(picture[None], count, axis=0)
    return dataset_of(images, make_augmentation(replace(config, **settings), MEAN), seed)


def read(loader, epoch=1):
    """All images and labels of an epoch."""
    loader.dataset.set_epoch(epoch)
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


# --- a dataset's items ---


def test_item_is_a_normalized_tensor_and_a_number():
    dataset = shapes(**NEVER)
    image, label = dataset[7]
    assert (image.shape, image.dtype) == ((3, 32, 32), torch.float32)
    assert (label, type(label)) == (7, int)
    expected = (dataset.images[7] / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(image, expected.permute(2, 0, 1).float(), atol=1e-5, rtol=0)


def test_dataset_is_a_sequence():
    dataset = shapes(10)
    assert [label for _, label in dataset] == list(range(10))
    assert torch.equal(dataset[-1][0], dataset[9][0])
    with pytest.raises(IndexError):
        dataset[10]


def test_batch_has_the_same_items_bit_for_bit():
    dataset, indices = shapes(**ALWAYS), [3, 1, 49, 3]
    images, labels = zip(*dataset.__getitems__(indices), strict=True)
    assert labels == (3, 1, 49, 3)
    assert torch.equal(torch.stack(images), torch.stack([dataset[index][0] for index in indices]))


def test_plain_loader_and_subset_of_torch_give_the_same_images():
    dataset = shapes()
    here = read(make_loader(dataset, 64))
    for loader in (DataLoader(dataset, 64), DataLoader(dataset, 16, num_workers=1)):
        assert all(map(torch.equal, read(loader), here))
    part, _ = random_split(dataset, [20, 30])
    for images, labels in DataLoader(part, 8, shuffle=True):
        assert torch.equal(images, here[0][labels])


def test_augmentation_leaves_the_images_in_memory_as_they_are():
    dataset = shapes(**ALWAYS)
    before = dataset.images.clone()
    read(make_loader(dataset, 16))
    assert torch.equal(dataset.images, before)


def test_without_augmentation_every_epoch_has_the_same_images_in_order():
    dataset = dataset_of(shapes().images.numpy())
    loader = make_loader(dataset, 16)
    images, labels = read(loader, 1)
    assert len(loader) == 4
    assert labels.tolist() == list(range(50))
    assert torch.equal(images, read(loader, 2)[0])


# --- what is random ---


def test_epoch_has_every_image_once_in_an_order_of_its_own():
    loader = make_loader(copies(100), 16, shuffle=True)
    first, second, again = (read(loader, epoch)[1] for epoch in (1, 2, 1))
    assert len(loader) == 7
    assert first.sort().values.tolist() == list(range(100))
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    assert not torch.equal(first, read(make_loader(copies(100, seed=1), 16, shuffle=True))[1])


def noisy(dataset):
    """The dataset with two more transforms, one that draws from numpy and one that holds others."""
    more = [A.GaussNoise(p=0.5), A.OneOf([A.GaussNoise(p=1), A.RandomBrightnessContrast(p=1)], p=0.5)]
    dataset.augmentation = RepeatableCompose([*dataset.augmentation.transforms, *more])
    return dataset


@pytest.mark.parametrize(("num_workers", "method"), [(1, "fork"), (3, "fork"), (2, "spawn"), (2, "forkserver")])
def test_same_seed_same_epochs_with_any_number_and_kind_of_workers(num_workers, method):
    here = make_loader(noisy(shapes()), 8, shuffle=True)
    there = make_loader(noisy(shapes()), 8, shuffle=True, num_workers=num_workers)
    there.multiprocessing_context = method
    for epoch in (1, 2):  # the workers go on to the second
        for mine, theirs in zip(read(here, epoch), read(there, epoch), strict=True):
            assert torch.equal(mine, theirs)


def test_image_is_augmented_alike_whatever_was_drawn_before_it():
    a, b = (read(make_loader(noisy(copies(64)), size, shuffle=True)) for size in (16, 23))
    assert torch.equal(a[0][a[1].argsort()], b[0][b[1].argsort()])


def test_augmentations_differ_between_images_epochs_workers_and_seeds():
    loader = make_loader(copies(64, **ALWAYS), 16, num_workers=2)
    pictures = [read(loader, epoch)[0] for epoch in (1, 2)]
    pictures.append(read(make_loader(copies(64, seed=1, **ALWAYS), 16))[0])
    assert len(torch.cat(pictures).flatten(1).unique(dim=0)) == 3 * 64


def test_loader_leaves_everybody_elses_random_numbers_alone():
    def numbers(meanwhile):
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(0)
        meanwhile()
        return torch.rand(1).item(), np.random.rand(), random.random()

    loader = make_loader(noisy(shapes()), 16, shuffle=True)
    assert numbers(lambda: read(loader)) == numbers(lambda: None)


# --- the augmentation ---


def test_flip_and_hole_are_independent_of_each_other():
    """Each happens half the time, together a quarter: the library's own seeding would tie them."""
    dataset = copies(2000, shift_scale_rotate_probability=0.0, hole_size=16)
    picture = copies(1, **NEVER)[0][0]
    images, _ = read(make_loader(dataset, 500))
    same, mirrored = ((images == other).float().mean(dim=(1, 2, 3)) for other in (picture, picture.flip(2)))
    flipped, hole = mirrored > same, torch.maximum(same, mirrored) < 0.99
    for event in (flipped, hole, flipped ^ hole):  # if independent, the third is as likely as the others
        assert 0.45 < event.float().mean() < 0.55


@pytest.mark.parametrize("size", [16, 7])
def test_hole_has_the_mean_colour_and_its_size(size):
    settings = {**NEVER, "coarse_dropout_probability": 1.0, "hole_size": size}
    images, _ = read(make_loader(copies(20, **settings), 20))
    filled = (images.abs() < 0.02).all(dim=1)  # the mean colour is 0 when normalized
    assert filled.sum(dim=(1, 2)).tolist() == [size * size] * 20
    assert len(filled.unique(dim=0)) > 10  # in many places


def test_limits_are_those_of_albumentations():
    settings = {"shift_limit": 0.25, "scale_limit": 0.3, "rotate_limit": 40.0, "coarse_dropout_probability": 0.0}
    ours = make_augmentation(replace(config, **settings), MEAN)
    affine = A.Affine(
        scale=(0.7, 1.3),
        translate_percent=(-0.25, 0.25),
        rotate=(-40, 40),
        keep_ratio=True,
        border_mode=cv2.BORDER_REFLECT_101,
        p=0.5,
    )
    theirs = RepeatableCompose([A.HorizontalFlip(p=0.5), affine])
    for number, image in enumerate(shapes().images.numpy()):
        for pipeline in (ours, theirs):
            pipeline.set_key(number)
        difference = ours(image=image)["image"].astype(int) - theirs(image=image)["image"]
        assert np.abs(difference).max() <= 1


# --- splits ---


def test_channel_statistics_are_numpys():
    images = load_shapes().train.images
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(std, (images / 255).std(axis=(0, 1, 2)))


def test_channel_that_is_the_same_everywhere_can_be_normalized():
    assert channel_statistics(np.full((4, 32, 32, 3), 51, dtype=np.uint8)) == ((0.2,) * 3, (1.0,) * 3)


def test_held_out_images_are_a_part_of_each_class_that_follows_from_the_seed():
    labels = load_shapes().train.labels
    held_out = hold_out(labels, 0.2, seed=1)
    assert held_out.dtype == bool
    assert np.bincount(labels[held_out]).tolist() == [24] * 10
    assert np.array_equal(held_out, hold_out(labels, 0.2, seed=1))
    assert not np.array_equal(held_out, hold_out(labels, 0.2, seed=2))


@pytest.mark.parametrize("fraction", [0.001, 0.9])
def test_split_that_leaves_a_class_without_images_is_refused(fraction):
    with pytest.raises(UsageError, match="valid_split"):
        hold_out(np.repeat([0, 1], [50, 4]), fraction, seed=0)


def test_images_are_validated_on_the_test_images_unless_some_are_held_out():
    train, valid, test = load_datasets(replace(config, dataset="shapes"))
    assert [len(part) for part in (train, valid, test)] == [1200, 300, 300]
    assert torch.equal(valid.images, test.images)
    train, valid, test = load_datasets(replace(config, dataset="shapes", valid_split=0.1))
    assert [len(part) for part in (train, valid, test)] == [1080, 120, 300]
    assert not {image.tobytes() for image in train.images.numpy()} & {image.tobytes() for image in valid.images.numpy()}


def test_all_parts_are_normalized_alike_and_only_the_training_images_are_augmented():
    train, valid, test = load_datasets(replace(config, dataset="shapes", valid_split=0.1, **ALWAYS))
    for part, augmented in ((train, True), (valid, False), (test, False)):
        assert (part.mean, part.std) == channel_statistics(train.images.numpy())
        assert part.class_names == list(load_shapes().class_names)
        first, _ = part[0]
        part.set_epoch(2)
        assert torch.equal(first, part[0][0]) != augmented


def test_one_class_alone_is_refused(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / part / "cat" / "a.png"), np.zeros((32, 32, 3), dtype=np.uint8))
    with pytest.raises(UsageError, match="one class only"):
        load_datasets(replace(config, dataset="folder", data_dir=str(tmp_path)))


# --- several processes ---


@pytest.mark.parametrize("world_size", [2, 3])
def test_parts_of_the_processes_make_up_each_batch(world_size):
    dataset = shapes(151)  # four batches of 37 and one of 3
    parts = [EpochBatches(dataset, 37, True, rank, world_size) for rank in range(world_size)]
    for whole, *batch in zip(EpochBatches(dataset, 37, True), *parts, strict=True):
        assert sorted(itertools.chain(*batch)) == sorted(whole)
        assert max(map(len, batch)) - min(map(len, batch)) <= 1


def test_last_batch_with_fewer_images_than_processes_is_validated_and_not_trained_on():
    dataset = shapes(9)  # two batches of 4 and one of 1

    def steps(shuffle):
        loaders = [make_loader(dataset, 4, shuffle, rank=rank, world_size=2) for rank in (0, 1)]
        sizes = [[len(labels) for _, labels in loader] for loader in loaders]
        assert len(loaders[0]) == len(loaders[1]) == len(sizes[0])  # or their sums would not meet
        return sizes

    assert steps(shuffle=True) == [[2, 2], [2, 2]]
    assert steps(shuffle=False) == [[2, 2, 1], [2, 2]]


# --- the import ---


def test_import_asks_no_server_and_prints_nothing():
    code = (
        "import socket; socket.socket.connect = socket.getaddrinfo = None\n"
        "import urllib.request; urllib.request.urlopen = None\n"
        "import warnings; warnings.simplefilter('error')\n"
        "import config, dataset; dataset.make_augmentation(config.config, (0.5,) * 3)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "NO_ALBUMENTATIONS_UPDATE"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
