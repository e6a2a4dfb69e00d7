import os
import random
import subprocess
import sys
from dataclasses import replace
from unittest.mock import Mock

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset, random_split

from config import UsageError, config
from dataset import ImageDataset, channel_statistics, hold_out, load_datasets, make_augmentation, make_loader
from parts.images import SHAPES, draw_shapes, load_shapes
from parts.transforms import RepeatableCompose
from tests.conftest import ROOT, equal

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


def read_on(batches):
    """All images and labels of the next pass, or of what is left of one."""
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def read(loader, epoch=1):
    """All images and labels of an epoch."""
    loader.dataset.set_epoch(epoch)
    return read_on(loader)


# --- a dataset's items ---


def test_item_is_a_normalized_tensor_and_a_number():
    dataset = shapes(**NEVER)
    image, label = dataset[7]
    assert (image.shape, image.dtype) == ((3, 32, 32), torch.float32)
    assert (label, type(label)) == (7, int)
    expected = (dataset.images[7] / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(image, expected.permute(2, 0, 1).float(), atol=1e-5, rtol=0)


def test_list_of_indices_gives_a_whole_batch_of_the_same_images():
    dataset = shapes(**ALWAYS)
    dataset.set_epoch(3)
    images, labels = dataset[[4, 9, 4]]
    assert torch.equal(images, torch.stack([dataset[index][0] for index in (4, 9, 4)]))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert (labels.tolist(), labels.dtype) == ([4, 9, 4], torch.int64)
    dataset.set_epoch(1)
    assert not torch.equal(dataset[[4, 9, 4]][0], images)
    assert torch.equal(dataset[3, [4, 9, 4]][0], images)  # of the epoch that is asked for


def test_dataset_is_a_sequence_and_every_loader_of_torch_gives_the_same_images():
    dataset = shapes(**ALWAYS)
    dataset.set_epoch(1)
    here = torch.stack([image for image, _ in dataset])
    assert torch.equal(dataset[-1][0], here[49])
    for loader in (make_loader(dataset, 64), DataLoader(dataset, 64), DataLoader(dataset, 16, num_workers=1)):
        assert torch.equal(read(loader)[0], here)
    part, _ = random_split(dataset, [20, 30])
    dataset.set_epoch(1)
    for loader, count in ((DataLoader(dataset, 64, shuffle=True), 50), (DataLoader(part, 8, shuffle=True), 20)):
        images, labels = read_on(loader)
        assert len(labels.unique()) == count
        assert torch.equal(images, here[labels])
    assert torch.equal(dataset.images, shapes().images)  # the images in memory stay as they are


def test_loader_of_something_else_says_what_to_use():
    with pytest.raises(TypeError, match=r"for a Subset use torch's DataLoader"):
        make_loader(Subset(shapes(), [3, 5]), 2)


def test_without_workers_no_shared_memory_is_needed(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "share_memory_", Mock(side_effect=RuntimeError("/dev/shm is not there")))
    assert len(read(make_loader(shapes(), 16, shuffle=True))[1]) == 50


# --- epochs ---


def test_epoch_has_every_image_once_in_an_order_of_its_own():
    loader, other = (make_loader(copies(100, seed), 16, shuffle=True) for seed in (0, 1))
    first, second, again = (read(loader, epoch)[1] for epoch in (1, 2, 1))
    assert len(loader) == 7
    assert first.sort().values.tolist() == list(range(100))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, read(other)[1])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_pass_is_the_next_epoch_from_where_set_epoch_left_it(num_workers):
    loader, other = (make_loader(copies(48), 16, True, workers) for workers in (num_workers, 0))
    epochs = [read(other, epoch) for epoch in range(8)]
    assert len(torch.cat([images for images, _ in epochs]).flatten(1).unique(dim=0)) == 8 * 48
    for epoch in (0, 1):  # nobody has ever called set_epoch
        assert equal(read_on(loader), epochs[epoch])
    next(iter(loader))  # epoch 2, left half-way
    assert equal(read_on(loader), epochs[3])
    loader.dataset.set_epoch(6)
    loader.dataset.set_epoch(5)
    assert equal(read_on(loader), epochs[5])
    batches = iter(loader)
    first = next(batches)
    loader.dataset.set_epoch(1)  # in the middle of epoch 6, which goes on as it began
    assert equal([first[1], read_on(batches)[1]], [*epochs[6][1].split([16, 32])])
    assert equal(read_on(loader), epochs[1])


# --- what is random ---


def noisy(dataset):
    """The dataset with more transforms: that draw from numpy, that hold others."""
    noise, others = A.GaussNoise(p=1), [A.ElasticTransform(p=1), A.ColorJitter(p=1), A.Solarize(p=1)]
    dataset.augmentation = RepeatableCompose([*dataset.augmentation.transforms, A.SomeOf(others, n=2), noise])
    return dataset


@pytest.mark.parametrize(("num_workers", "method"), [(2, "fork"), (2, "spawn")])
def test_same_seed_same_batches_with_any_number_and_kind_of_workers(num_workers, method):
    here = make_loader(noisy(shapes()), 8, shuffle=True)
    there = make_loader(noisy(shapes()), 8, shuffle=True, num_workers=num_workers)
    there.multiprocessing_context = method
    for _ in range(2):  # the workers go on to the second epoch
        assert equal(list(here), list(there))


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


@pytest.mark.parametrize(("num_workers", "transform"), [(0, A.ToFloat(p=1)), (1, A.RandomCrop(30, 30, p=1))])
def test_augmentation_that_makes_something_else_of_the_images_is_refused(num_workers, transform):
    dataset = shapes()
    dataset.augmentation = RepeatableCompose([transform])
    with pytest.raises(UsageError, match=r"augmentation must keep \(32, 32, 3\) uint8, not make \(\d+, .+\) \w+"):
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
    difference = (ours[[*range(50)]][0] - theirs[[*range(50)]][0]) * torch.tensor(STD)[:, None, None] * 255
    assert difference.abs().max() < 1.01


# --- several processes ---


def parts_of(dataset, batch_size, shuffle, world_size):
    """For each process, the labels of each of its batches."""
    parts = []
    for rank in range(world_size):
        dataset.set_epoch(1)
        loader = make_loader(dataset, batch_size, shuffle, rank=rank, world_size=world_size)
        parts.append([labels.tolist() for _, labels in loader])
    return parts


@pytest.mark.parametrize("shuffle", [True, False])
def test_parts_of_the_processes_make_up_each_batch(shuffle):
    [whole], parts = (parts_of(shapes(150), 36, shuffle, world_size) for world_size in (1, 3))
    assert [len(batch) for batch in whole] == [36, 36, 36, 36, 6]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert sorted(sum(shares, [])) == sorted(batch)
        assert [len(share) for share in shares] == [len(batch) // 3] * 3


def test_images_that_do_not_divide_are_left_out_in_training_and_validated_once():
    dataset = shapes(53)  # a last batch of 5 for three processes
    trained, validated = (parts_of(dataset, 12, shuffle, world_size=3) for shuffle in (True, False))
    assert [[len(batch) for batch in part] for part in trained] == [[4, 4, 4, 4, 1]] * 3
    assert len({label for part in trained for batch in part for label in batch}) == 51
    assert sorted(label for part in validated for batch in part for label in batch) == [*range(53)]
    dataset = shapes(13)  # a last batch of 1: no step of training, and one of validation for one process
    assert [len(part) for part in parts_of(dataset, 12, True, world_size=3)] == [1, 1, 1]
    assert [len(part) for part in parts_of(dataset, 12, False, world_size=3)] == [2, 1, 1]


# --- which images are trained on, validated on and tested on ---


def test_channel_statistics_are_numpys_but_for_a_channel_without_any():
    images = load_shapes().train.images
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(std, (images / 255).std(axis=(0, 1, 2)))
    constant = np.full((4, 32, 32, 3), 51, dtype=np.uint8)  # nothing can be divided by its deviation of 0
    assert channel_statistics(constant) == ((0.2,) * 3, (1.0,) * 3)


def test_validation_is_on_the_test_images_unless_some_are_held_out():
    train, valid, test = load_datasets(replace(config, dataset="shapes"))
    assert len(train) == 1200
    assert torch.equal(valid.images, test.images)


def test_held_out_images_are_a_part_of_each_class_and_the_same_ones_whatever_the_seed():
    settings = replace(config, dataset="shapes", valid_split=0.2)
    (train, held_out, _), (_, others, _) = (load_datasets(replace(settings, seed=seed)) for seed in (0, 1))
    assert held_out.labels.bincount().tolist() == [24] * 10
    assert len(torch.cat([train.images, held_out.images]).flatten(1).unique(dim=0)) == 1200
    assert torch.equal(held_out.images, others.images)


def test_split_that_leaves_a_class_nothing_to_train_on_is_refused():
    with pytest.raises(UsageError, match=r"valid_split 0.9 leaves a class of 4 images with none on one side"):
        hold_out(np.repeat([0, 1], [50, 4]), 0.9)


def test_all_parts_are_normalized_alike_and_only_the_training_images_are_augmented():
    settings = replace(config, dataset="shapes", valid_split=0.1, shift_scale_rotate_probability=1.0)
    train, valid, test = load_datasets(settings)
    for part, count, augmented in ((train, 1080, True), (valid, 120, False), (test, 300, False)):
        assert (len(part), part.class_names) == (count, list(SHAPES))
        assert (part.mean, part.std) == channel_statistics(train.images.numpy())
        assert torch.equal(part[1, [0, 1]][0], part[2, [0, 1]][0]) != augmented


def test_augmentation_follows_from_the_seed_and_from_the_settings():
    settings = replace(config, dataset="shapes", flip_probability=1.0)
    variants = (settings, settings, replace(settings, seed=1), replace(settings, flip_probability=0.0))
    first, again, *others = (load_datasets(variant).train[[*range(50)]][0] for variant in variants)
    assert torch.equal(first, again)
    assert not any(torch.equal(first, other) for other in others)


def test_one_class_alone_is_refused(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / part / "cat" / "a.png"), np.zeros((32, 32, 3), dtype=np.uint8))
    with pytest.raises(UsageError, match="one class only"):
        load_datasets(replace(config, dataset="folder", data_dir=str(tmp_path)))


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
