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
from extras.sources import SHAPES, draw_shapes
from extras.transforms import RepeatableCompose
from torch.utils.data import DataLoader, Subset, random_split

from config import UsageError, config
from dataset import ImageDataset, make_augmentation, make_loader
from tests.conftest import ROOT

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PROBABILITIES = [name for name in vars(config) if name.endswith("probability")]
NEVER, HALF, ALWAYS = (dict.fromkeys(PROBABILITIES, probability) for probability in (0.0, 0.5, 1.0))


def dataset_of(images, seed, settings):
    """The images, each with its place as its label."""
    augmentation = make_augmentation(replace(config, **settings), MEAN)
    return ImageDataset(images, np.arange(len(images)), SHAPES, MEAN, STD, augmentation, seed)


def shapes(count=50, **settings):
    return dataset_of(draw_shapes(count, np.random.default_rng(0)).images, 0, settings)


def copies(count, seed=0, **settings):
    """The same picture, without any symmetry, `count` times."""
    picture = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    return dataset_of(picture.repeat(count, axis=0), seed, settings)


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


def test_dataset_is_a_sequence_and_every_loader_of_torch_gives_the_same_images():
    dataset = shapes(**ALWAYS)
    dataset.set_epoch(1)
    here = torch.stack([image for image, _ in dataset])
    assert torch.equal(dataset[-1][0], here[49])
    for loader in (make_loader(dataset, 64), DataLoader(dataset, 64), DataLoader(dataset, 16, num_workers=1)):
        assert torch.equal(read(loader)[0], here)
    part, _ = random_split(dataset, [20, 30])
    for images, labels in DataLoader(part, 8, shuffle=True):
        assert torch.equal(images, here[labels])
    assert torch.equal(dataset.images, shapes().images)  # the images in memory stay as they are


def test_indices_may_be_tensors_and_no_slice():
    dataset = shapes(**NEVER)
    part = DataLoader(Subset(dataset, torch.tensor([3, 5])), batch_size=2)
    assert [labels.tolist() for _, labels in part] == [[3, 5]]
    with pytest.raises(TypeError):
        dataset[2:5]


# --- what is random ---


def test_epoch_has_every_image_once_in_an_order_of_its_own():
    loader, other = (make_loader(copies(100, seed), 16, shuffle=True) for seed in (0, 1))
    first, second, again = (read(loader, epoch)[1] for epoch in (1, 2, 1))
    assert len(loader) == 7
    assert first.sort().values.tolist() == list(range(100))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, read(other)[1])


def noisy(dataset):
    """The dataset with more transforms: that draw from numpy, that hold others."""
    noise, others = A.GaussNoise(p=1), [A.ElasticTransform(p=1), A.ColorJitter(p=1), A.Solarize(p=1)]
    dataset.augmentation = RepeatableCompose([*dataset.augmentation.transforms, A.SomeOf(others, n=2), noise])
    return dataset


@pytest.mark.parametrize(("num_workers", "method"), [(3, "fork"), (2, "spawn"), (2, "forkserver")])
def test_same_seed_same_epochs_with_any_number_and_kind_of_workers(num_workers, method):
    here = make_loader(noisy(shapes()), 8, shuffle=True)
    there = make_loader(noisy(shapes()), 8, shuffle=True, num_workers=num_workers)
    there.multiprocessing_context = method
    for epoch in (1, 2):  # the workers go on to the second
        for mine, theirs in zip(read(here, epoch), read(there, epoch), strict=True):
            assert torch.equal(mine, theirs)


AUGMENTATIONS = [make_augmentation(replace(config, **ALWAYS), MEAN), RepeatableCompose([A.GaussNoise(p=1)])]


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=["ours", "of numpy's numbers"])
def test_augmentations_differ_between_images_epochs_workers_and_seeds(augmentation):
    pictures = []
    for seed in (0, 1, 2**63 - 1):
        dataset = copies(64, seed)
        dataset.augmentation = augmentation
        loader = make_loader(dataset, 16, num_workers=2)
        pictures += [read(loader, epoch)[0] for epoch in (1, 11)]  # epoch 1, image 11 is not epoch 11, image 1
    assert len(torch.cat(pictures).flatten(1).unique(dim=0)) == 6 * 64


def test_loader_leaves_everybody_elses_random_numbers_alone():
    def numbers(after=lambda: None):
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(0)
        after()
        return torch.rand(1).item(), np.random.rand(), random.random()

    loader = make_loader(noisy(shapes()), 16, shuffle=True)
    assert numbers(after=lambda: read(loader)) == numbers()


# --- the augmentation ---


@pytest.mark.parametrize("transform", [A.ToFloat(max_value=255, p=1), A.RandomCrop(30, 30, p=1), A.ToTensorV2(p=1)])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_augmentation_that_makes_something_else_of_the_images_is_refused(transform, num_workers):
    dataset = shapes()
    dataset.augmentation = RepeatableCompose([transform])
    with pytest.raises(UsageError, match=r"augmentation must keep \(32, 32, 3\) uint8, not make \S*\(.+\) \S+"):
        next(iter(make_loader(dataset, 4, num_workers=num_workers)))


def test_flip_and_hole_are_independent_of_each_other():
    """Each happens half the time, together a quarter: the library's own seeding would tie them."""
    dataset = copies(2000, **HALF | {"shift_scale_rotate_probability": 0.0}, hole_size=16)
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
    settings = {"shift_limit": 0.25, "scale_limit": 0.3, "rotate_limit": 40.0}
    limits = {"translate_percent": (-0.25, 0.25), "scale": (0.7, 1.3), "rotate": (-40, 40), "keep_ratio": True}
    affine = A.Affine(**limits, border_mode=cv2.BORDER_REFLECT_101, p=0.5)
    ours, theirs = shapes(**HALF | settings | {"coarse_dropout_probability": 0.0}), shapes()
    theirs.augmentation = RepeatableCompose([A.HorizontalFlip(p=0.5), affine])
    difference = ours.augment(range(50)).astype(int) - theirs.augment(range(50))
    assert np.abs(difference).max() <= 1


# --- several processes ---


def test_parts_of_the_processes_make_up_each_batch():
    dataset = shapes(151)  # four batches of 37 and one of 3
    parts = [make_loader(dataset, 37, True, rank=rank, world_size=3) for rank in range(3)]
    for whole, *batch in zip(make_loader(dataset, 37, True), *parts, strict=True):
        (_, labels), sizes = whole, [len(labels) for _, labels in batch]
        assert {*labels.tolist()} == {*torch.cat([labels for _, labels in batch]).tolist()}
        assert sum(sizes) == len(labels)
        assert max(sizes) - min(sizes) <= 1


def test_last_batch_with_fewer_images_than_processes_is_validated_and_not_trained_on():
    dataset = shapes(9)  # two batches of 4 and one of 1

    def steps(shuffle):
        loaders = [make_loader(dataset, 4, shuffle, rank=rank, world_size=2) for rank in (0, 1)]
        sizes = [[len(labels) for _, labels in loader] for loader in loaders]
        assert len(loaders[0]) == len(loaders[1]) == len(sizes[0])  # or their sums would not meet
        return sizes

    assert steps(shuffle=True) == [[2, 2], [2, 2]]
    assert steps(shuffle=False) == [[2, 2, 1], [2, 2]]


def test_import_asks_no_server_and_prints_nothing():
    code = (
        "import socket; socket.socket.connect = socket.getaddrinfo = None\n"
        "import urllib.request; urllib.request.urlopen = None\n"
        "import config, dataset; dataset.make_augmentation(config.config, (0.5,) * 3)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "NO_ALBUMENTATIONS_UPDATE"}
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
