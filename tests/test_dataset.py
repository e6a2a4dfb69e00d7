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
from parts.transforms import RepeatableCompose
from tests.conftest import ROOT, equal

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PROBABILITIES = [name for name in vars(config) if name.endswith("probability")]
NEVER, HALF, ALWAYS = (dict.fromkeys(PROBABILITIES, probability) for probability in (0.0, 0.5, 1.0))


def copies(count=50, seed=0, **settings):
    """A dataset of the same picture, without any symmetry, `count` times, each with its index as its label."""
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8).repeat(count, axis=0)
    augmentation = make_augmentation(replace(config, **ALWAYS | settings), MEAN)
    return ImageDataset(images, np.arange(count), ["a picture"], MEAN, STD, augmentation, seed)


def read_on(batches):
    """All images and labels of the next pass, or of what is left of one."""
    return tuple(map(torch.cat, zip(*batches, strict=True)))


def read(loader, epoch=1):
    """All images and labels of an epoch."""
    loader.dataset.set_epoch(epoch)
    return read_on(loader)


# --- a dataset's items ---


def test_item_is_a_normalized_tensor_and_a_number():
    dataset = copies(**NEVER)
    image, label = dataset[7]
    assert (image.dtype, label, type(label)) == (torch.float32, 7, int)
    expected = (dataset.images[7] / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(image, expected.permute(2, 0, 1).float(), atol=1e-5, rtol=0)


def test_list_of_indices_gives_a_whole_batch_of_the_same_images():
    dataset = copies()
    dataset.set_epoch(3)
    images, labels = dataset[[4, 9, 4]]
    assert torch.equal(images, torch.stack([dataset[index][0] for index in (4, 9, 4)]))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert (labels.tolist(), labels.dtype) == ([4, 9, 4], torch.int64)
    dataset.set_epoch(1)
    assert not torch.equal(dataset[[4, 9, 4]][0], images)
    assert torch.equal(dataset[3, [4, 9, 4]][0], images)  # of the epoch that is asked for


def test_dataset_is_a_sequence_and_every_loader_of_torch_gives_the_same_images():
    dataset = copies()
    dataset.set_epoch(1)
    here = torch.stack([image for image, _ in dataset])
    assert torch.equal(dataset[-1][0], here[49])
    part, _ = random_split(dataset, [20, 30])
    plain = DataLoader(dataset, 64), DataLoader(dataset, 64, shuffle=True), DataLoader(dataset, 16, num_workers=1)
    for loader, count in [(loader, 50) for loader in plain] + [(DataLoader(part, 8, shuffle=True), 20)]:
        images, labels = read_on(loader)
        assert len(labels.unique()) == count
        assert torch.equal(images, here[labels])
    assert torch.equal(read(make_loader(dataset, 16))[0], here)
    assert torch.equal(dataset.images, copies().images)  # the images in memory stay as they are


def test_loader_of_something_else_says_what_to_use():
    with pytest.raises(TypeError, match=r"for a Subset use torch's DataLoader"):
        make_loader(Subset(copies(), [3, 5]), 2)


def test_without_workers_no_shared_memory_is_needed(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "share_memory_", Mock(side_effect=RuntimeError("/dev/shm is not there")))
    assert len(read(make_loader(copies(), 16, shuffle=True))[1]) == 50


# --- epochs, and what is random ---


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
    epochs = [read(make_loader(copies(), 16, shuffle=True), epoch) for epoch in range(8)]
    assert len(torch.cat([images for images, _ in epochs]).flatten(1).unique(dim=0)) == 8 * 50
    loader = make_loader(copies(), 16, shuffle=True, num_workers=num_workers)
    assert equal([read_on(loader), read_on(loader)], epochs[:2])  # nobody has ever called set_epoch
    next(iter(loader))  # epoch 2, left half-way
    assert equal(read_on(loader), epochs[3])
    loader.dataset.set_epoch(6)
    loader.dataset.set_epoch(5)
    assert equal(read_on(loader), epochs[5])
    batches = iter(loader)
    first = next(batches)
    loader.dataset.set_epoch(1)  # in the middle of epoch 6, which goes on as it began
    assert equal(read_on([first, *batches]), epochs[6])
    assert equal(read_on(loader), epochs[1])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_same_seed_same_batches_with_any_number_and_kind_of_workers(method):
    def noisy(num_workers):
        """A loader of images by more transforms: that draw from numpy, that hold others."""
        dataset, others = copies(), [A.ElasticTransform(p=1), A.ColorJitter(p=1), A.Solarize(p=1)]
        added = A.SomeOf(others, n=2), A.GaussNoise(p=1)
        dataset.augmentation = RepeatableCompose([*dataset.augmentation.transforms, *added])
        return make_loader(dataset, 8, True, num_workers)

    here, there = noisy(0), noisy(2)
    there.multiprocessing_context = method
    for _ in range(2):  # the workers go on to the second epoch
        assert equal(list(here), list(there))


@pytest.mark.parametrize("added", [[], [A.GaussNoise(p=1)]], ids=["ours", "of numpy's numbers"])
def test_augmentations_differ_between_images_epochs_workers_and_seeds(added):
    pictures = []
    for seed in (0, 1, 2**63 - 1):
        loader = make_loader(copies(64, seed), 16, num_workers=2)
        loader.dataset.augmentation = RepeatableCompose(added) if added else loader.dataset.augmentation
        pictures += [read(loader, epoch)[0] for epoch in (1, 11)]  # epoch 1, image 11 is not epoch 11, image 1
    assert len(torch.cat(pictures).flatten(1).unique(dim=0)) == 6 * 64


def test_loader_leaves_everybody_elses_random_numbers_alone():
    def numbers(after=lambda: None):
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(0)
        after()
        return torch.rand(1).item(), np.random.rand(), random.random()

    loader = make_loader(copies(), 16, shuffle=True)
    assert numbers(after=lambda: read(loader)) == numbers()


# --- the augmentation ---


@pytest.mark.parametrize(("num_workers", "transform"), [(0, A.ToFloat(p=1)), (1, A.RandomCrop(30, 30, p=1))])
def test_augmentation_that_makes_something_else_of_the_images_is_refused(num_workers, transform):
    dataset = copies()
    dataset.augmentation = RepeatableCompose([transform])
    with pytest.raises(UsageError, match=r"augmentation must keep \(32, 32, 3\) uint8, not make \(\d+, .+\) \w+"):
        next(iter(make_loader(dataset, 4, num_workers=num_workers)))


def test_flip_and_hole_are_independent_of_each_other():
    """Each happens half the time, together a quarter: the library's own seeding would tie them."""
    images, _ = copies(2000, **HALF | {"shift_scale_rotate_probability": 0.0}, hole_size=16)[[*range(2000)]]
    picture, _ = copies(1, **NEVER)[0]
    same, mirrored = ((images == other).float().mean(dim=(1, 2, 3)) for other in (picture, picture.flip(2)))
    flipped, hole = mirrored > same, torch.maximum(same, mirrored) < 0.99
    for event in (flipped, hole, flipped ^ hole):  # if independent, the third is as likely as the others
        assert 0.45 < event.float().mean() < 0.55


@pytest.mark.parametrize("size", [16, 7])
def test_hole_has_the_mean_colour_and_its_size(size):
    images, _ = copies(**NEVER | {"coarse_dropout_probability": 1.0}, hole_size=size)[[*range(20)]]
    filled = (images.abs() < 0.02).all(dim=1)  # the mean colour is 0 when normalized
    assert filled.sum(dim=(1, 2)).tolist() == [size * size] * 20
    assert len(filled.unique(dim=0)) > 10  # in many places


def test_limits_are_those_of_albumentations():
    limits = {"translate_percent": (-0.25, 0.25), "scale": (0.7, 1.3), "rotate": (-40, 40), "keep_ratio": True}
    affine = A.Affine(**limits, border_mode=cv2.BORDER_REFLECT_101, p=0.5)
    settings = HALF | {"coarse_dropout_probability": 0.0, "shift_limit": 0.25, "scale_limit": 0.3, "rotate_limit": 40.0}
    ours, theirs = copies(**settings), copies()
    theirs.augmentation = RepeatableCompose([A.HorizontalFlip(p=0.5), affine])
    difference = (ours[[*range(50)]][0] - theirs[[*range(50)]][0]).abs() * torch.tensor(STD)[:, None, None] * 255
    assert difference.mean() < 0.01


# --- several processes ---


def parts_of(dataset, batch_size, shuffle, world_size):
    """For each process, the labels of each of its batches."""
    loaders = [
        make_loader(dataset, batch_size, shuffle, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    return [[labels.tolist() for _, labels in loader] for loader in loaders if not dataset.set_epoch(1)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_parts_of_the_processes_make_up_each_batch(shuffle):
    [whole], parts = (parts_of(copies(150), 36, shuffle, world_size) for world_size in (1, 3))
    for batch, size, *shares in zip(whole, [12, 12, 12, 12, 2], *parts, strict=True):
        assert sorted(sum(shares, [])) == sorted(batch)
        assert [len(share) for share in shares] == [size] * 3


def test_images_that_do_not_divide_are_left_out_in_training_and_validated_once():
    trained, validated = (parts_of(copies(53), 12, shuffle, world_size=3) for shuffle in (True, False))
    assert [[len(batch) for batch in part] for part in trained] == [[4, 4, 4, 4, 1]] * 3
    assert len({*sum(sum(trained, []), [])}) == 51
    assert sorted(sum(sum(validated, []), [])) == [*range(53)]
    trained, validated = (parts_of(copies(13), 12, shuffle, world_size=3) for shuffle in (True, False))
    assert ([*map(len, trained)], [*map(len, validated)]) == ([1, 1, 1], [2, 1, 1])  # batches: a last one of 1 image


# --- which images are trained on, validated on and tested on ---


def test_channel_statistics_are_numpys_but_for_a_channel_without_any():
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    images[..., 2] = 51  # nothing can be divided by its deviation of 0
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(std, [*(images / 255).std(axis=(0, 1, 2))[:2], 1])


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


def test_class_that_would_have_no_image_on_one_side_or_no_other_beside_it_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"valid_split 0.9 leaves a class of 4 images with none on one side"):
        hold_out(np.repeat([0, 1], [50, 4]), 0.9)
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / part / "cat" / "a.png"), np.zeros((32, 32, 3), dtype=np.uint8))
    with pytest.raises(UsageError, match="one class only"):
        load_datasets(replace(config, dataset="folder", data_dir=str(tmp_path)))


def test_all_parts_are_normalized_alike_and_only_the_training_images_are_augmented():
    settings = replace(config, dataset="shapes", valid_split=0.1, **ALWAYS)
    (train, valid, test), other = load_datasets(settings), load_datasets(replace(settings, seed=1)).train
    for part, count, augmented in ((train, 1080, True), (valid, 120, False), (test, 300, False)):
        assert len(part) == count
        assert (part.mean, part.std) == channel_statistics(train.images.numpy())
        assert torch.equal(part[1, [0, 1]][0], part[2, [0, 1]][0]) != augmented
    assert not torch.equal(train[[0, 1]][0], other[[0, 1]][0])  # nor alike for another seed


def test_import_asks_no_server_and_prints_nothing():
    code = (
        "import socket, urllib.request; socket.socket.connect = socket.getaddrinfo = urllib.request.urlopen = None\n"
        "import config, dataset; dataset.make_augmentation(config.config, (0.5,) * 3)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "NO_ALBUMENTATIONS_UPDATE"}
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
