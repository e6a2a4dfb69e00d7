import os
import subprocess
import sys

import albumentations as A
import cv2
import numpy as np
import pytest
import torch

from dataset import (
    AugmentedBatches,
    EpochBatches,
    FixedBatches,
    ShiftScaleRotate,
    SquareHole,
    channel_statistics,
    hold_out,
    make_augmentation,
    make_loader,
    make_normalization,
)
from sources import DataError, Split, load_shapes

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
USUAL = {
    "flip_probability": 0.5,
    "shift_scale_rotate_probability": 0.5,
    "shift_limit": 0.125,
    "scale_limit": 0.1,
    "rotate_limit": 15.0,
    "coarse_dropout_probability": 0.5,
    "hole_size": 16,
}
NEVER = {**USUAL, **dict.fromkeys([name for name in USUAL if name.endswith("probability")], 0.0)}


def loader(split, num_workers=0, batch_size=16, seed=0, context=None, **augmentation):
    augmentation = make_augmentation(MEAN, **{**USUAL, **augmentation})
    batches = AugmentedBatches(split, augmentation, make_normalization(MEAN, STD), seed)
    result = make_loader(batches, EpochBatches(len(split.labels), batch_size, seed), num_workers, pin_memory=False)
    if context:
        result.multiprocessing_context = context
    return result


def epoch(batches, number):
    batches.sampler.set_epoch(number)
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def copies(count):
    """The same picture, without any symmetry, `count` times; labels number them."""
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Split(np.repeat(picture[None], count, axis=0), np.arange(count))


# --- splitting ---


def test_channel_statistics_are_numpys():
    images = load_shapes().train.images
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(std, (images / 255).std(axis=(0, 1, 2)))


def test_held_out_images_are_stratified_seeded_and_disjoint():
    train = load_shapes().train
    rest, held_out = hold_out(train, 0.2, seed=1)
    assert np.bincount(held_out.labels).tolist() == [24] * 10
    assert len(rest.labels) + len(held_out.labels) == len(train.labels)
    assert not {image.tobytes() for image in rest.images} & {image.tobytes() for image in held_out.images}
    assert np.array_equal(held_out.images, hold_out(train, 0.2, seed=1)[1].images)
    assert not np.array_equal(held_out.images, hold_out(train, 0.2, seed=2)[1].images)


def test_split_that_leaves_nothing_is_refused():
    with pytest.raises(DataError, match="valid_split"):
        hold_out(load_shapes().train, 0.001, seed=0)


# --- augmentation ---


def test_batches_are_normalized_channels_last_tensors():
    images, labels = next(iter(loader(copies(16), **NEVER)))
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64
    expected = (torch.from_numpy(copies(1).images[0] / 255) - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(images[0], expected.permute(2, 0, 1).float(), atol=1e-5, rtol=0)


def test_an_epoch_has_every_image_once_in_an_order_of_its_own():
    batches = loader(copies(100))
    orders = [epoch(batches, number)[1] for number in (1, 2, 1)]
    assert len(batches) == 7
    assert orders[0].sort().values.tolist() == list(range(100))
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0], orders[2])


@pytest.mark.parametrize("num_workers", [1, 3])
def test_same_seed_same_batches_with_any_number_of_workers(num_workers):
    split = load_shapes().test
    here, there = loader(split), loader(split, num_workers)
    for number in (1, 2):
        for mine, theirs in zip(epoch(here, number), epoch(there, number), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("context", ["forkserver", "spawn"])
def test_workers_need_not_be_forked(context):
    split = copies(40)
    assert torch.equal(epoch(loader(split, 1, context=context), 1)[0], epoch(loader(split), 1)[0])


def test_order_of_images_plays_no_part_in_their_augmentation():
    """An image is augmented alike in a batch of another size, where others were drawn before it."""
    (a, labels_a), (b, labels_b) = (epoch(loader(copies(64), batch_size=size), 1) for size in (16, 23))
    assert torch.equal(a[labels_a.argsort()], b[labels_b.argsort()])


def test_augmentations_differ_between_images_epochs_workers_and_seeds():
    split = copies(64)
    always = dict.fromkeys([name for name in USUAL if name.endswith("probability")], 1.0)
    batches = loader(split, num_workers=2, **always)
    pictures = torch.cat([epoch(batches, number)[0] for number in (1, 2)])
    pictures = torch.cat([pictures, epoch(loader(split, seed=1, **always), 1)[0]])
    assert len(pictures.flatten(1).unique(dim=0)) == 3 * 64


def test_transforms_of_a_pipeline_are_independent():
    """Flip and hole each happen half the time, together a quarter: the library's own seeding would tie them."""
    split = copies(2000)
    picture = make_normalization(MEAN, STD)(images=split.images[:1])["images"][0]
    images, _ = epoch(loader(split, batch_size=500, shift_scale_rotate_probability=0.0), 1)
    same, mirrored = ((images == other).float().mean(dim=(1, 2, 3)) for other in (picture, picture.flip(2)))
    flipped, hole = mirrored > same, torch.maximum(same, mirrored) < 0.99
    for event in (flipped, hole, flipped ^ hole):  # if independent, the third is as likely as the others
        assert 0.45 < event.float().mean() < 0.55


@pytest.mark.parametrize("size", [16, 7])
def test_hole_has_the_mean_colour_and_its_size(size):
    images, _ = epoch(loader(copies(20), **{**NEVER, "coarse_dropout_probability": 1.0, "hole_size": size}), 1)
    filled = (images.abs() < 0.02).all(dim=1)  # the mean colour is 0 when normalized
    assert filled.sum(dim=(1, 2)).tolist() == [size * size] * 20
    assert len(filled.unique(dim=0)) > 10  # in many places


def test_faster_shift_scale_rotate_gives_the_librarys_pictures():
    limits = {"translate_percent": (-0.3, 0.3), "scale": (0.6, 1.4), "rotate": (-90, 90), "keep_ratio": True, "p": 1.0}
    ours, theirs = (
        A.Compose([kind(**limits, border_mode=cv2.BORDER_REFLECT_101)], strict=True, seed=0)
        for kind in (ShiftScaleRotate, A.Affine)
    )
    for image in load_shapes().test.images:
        assert np.abs(ours(image=image)["image"].astype(int) - theirs(image=image)["image"]).max() <= 1


def test_faster_hole_is_as_likely_everywhere_as_the_librarys():
    def holes(kind):
        options = {"hole_height_range": (30, 30), "hole_width_range": (30, 30), "num_holes_range": (1, 1)}
        pipeline = A.Compose([kind(**options, fill=(9, 8, 7), p=1.0)], strict=True, seed=0)
        pictures = [pipeline(image=np.zeros((32, 32, 3), dtype=np.uint8))["image"] for _ in range(1800)]
        return np.unique(pictures, axis=0, return_counts=True)

    (ours, counts), (theirs, _) = holes(SquareHole), holes(A.CoarseDropout)
    assert np.array_equal(ours, theirs)
    assert len(counts) == 9
    assert 150 < counts.min() <= counts.max() < 250


def test_limits_reach_the_library():
    flip, affine, hole = make_augmentation(MEAN, **USUAL).transforms
    assert affine.translate_percent == {"x": (-0.125, 0.125), "y": (-0.125, 0.125)}
    assert affine.scale == {"x": (0.9, 1.1), "y": (0.9, 1.1)}
    assert affine.rotate == (-15, 15)
    assert affine.keep_ratio
    assert affine.border_mode == cv2.BORDER_REFLECT_101
    assert hole.fill == (128, 102, 76)
    assert [transform.p for transform in (flip, affine, hole)] == [0.5, 0.5, 0.5]


def test_fixed_batches_keep_order_and_count():
    split = load_shapes().test
    batches = FixedBatches(split, make_normalization(MEAN, STD), batch_size=128)
    images, labels = zip(*batches, strict=True)
    assert len(batches) == 3
    assert torch.equal(torch.cat(labels), torch.from_numpy(split.labels))
    one = A.Compose([A.Normalize(MEAN, STD), A.ToTensorV2()])(image=split.images[5])["image"]
    torch.testing.assert_close(images[0][5], one)


def test_import_asks_no_server_and_prints_nothing():
    code = (
        "import socket; socket.socket.connect = socket.getaddrinfo = None\n"
        "import urllib.request; urllib.request.urlopen = None\n"
        "import warnings; warnings.simplefilter('error')\n"
        f"import dataset; dataset.make_augmentation((0.5,) * 3, **{USUAL})"
    )
    environment = {k: v for k, v in os.environ.items() if k != "NO_ALBUMENTATIONS_UPDATE"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
