"""Which images are trained on, validated on and tested on, and what all of them share."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from extras.sources import SHAPES, load_shapes

from config import UsageError, config
from dataset import channel_statistics, hold_out, load_datasets


def read(dataset, epoch):
    """All images of an epoch."""
    dataset.set_epoch(epoch)
    return torch.stack([image for image, _ in dataset])


def test_channel_statistics_are_numpys_but_for_a_channel_without_any():
    images = load_shapes().train.images
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(std, (images / 255).std(axis=(0, 1, 2)))
    constant = np.full((4, 32, 32, 3), 51, dtype=np.uint8)  # nothing can be divided by its deviation of 0
    assert channel_statistics(constant) == ((0.2,) * 3, (1.0,) * 3)


def test_held_out_images_are_a_part_of_each_class_that_follows_from_the_seed():
    labels = load_shapes().train.labels
    held_out, again, other = (hold_out(labels, 0.2, seed) for seed in (1, 1, 2))
    assert np.bincount(labels[held_out]).tolist() == [24] * 10
    assert np.array_equal(held_out, again)
    assert not np.array_equal(held_out, other)


def test_split_that_leaves_a_class_nothing_to_train_on_is_refused():
    with pytest.raises(UsageError, match=r"valid_split 0.9 leaves a class of 4 images with none on one side"):
        hold_out(np.repeat([0, 1], [50, 4]), 0.9, seed=0)


def test_validation_is_on_the_test_images_unless_some_are_held_out():
    train, valid, test = load_datasets(replace(config, dataset="shapes"))
    assert len(train) == 1200
    assert torch.equal(valid.images, test.images)


def test_all_parts_are_normalized_alike_and_only_the_training_images_are_augmented():
    train, valid, test = load_datasets(
        replace(config, dataset="shapes", valid_split=0.1, shift_scale_rotate_probability=1.0)
    )
    assert len(torch.cat([train.images, valid.images]).flatten(1).unique(dim=0)) == 1200
    for part, count, augmented in ((train, 1080, True), (valid, 120, False), (test, 300, False)):
        assert (len(part), part.class_names) == (count, list(SHAPES))
        assert (part.mean, part.std) == channel_statistics(train.images.numpy())
        first, second = (read(part, epoch) for epoch in (1, 2))
        assert torch.equal(first, second) != augmented


def test_augmentation_follows_from_the_seed():
    settings = replace(config, dataset="shapes")
    first, again, other = (read(load_datasets(replace(settings, seed=seed)).train, 1) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_one_class_alone_is_refused(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / part / "cat" / "a.png"), np.zeros((32, 32, 3), dtype=np.uint8))
    with pytest.raises(UsageError, match="one class only"):
        load_datasets(replace(config, dataset="folder", data_dir=str(tmp_path)))
