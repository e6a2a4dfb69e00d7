from collections import Counter

import albumentations as A
import cv2
import numpy as np
import pytest

from extras.sources import load_shapes
from extras.transforms import RepeatableCompose, ShiftScaleRotate, SquareHole

IMAGES = load_shapes().test.images


def pictures(transform, images, key=0):
    """The images as one transform gives them; each has random numbers of its own."""
    pipeline, result = RepeatableCompose([transform]), []
    for number, image in enumerate(images):
        pipeline.set_key(key, number)
        result.append(pipeline(image=image)["image"])
    return np.stack(result)


@pytest.mark.parametrize("images", [IMAGES, IMAGES[:, :20]], ids=["square", "wide"])
def test_faster_shift_scale_rotate_gives_the_librarys_pictures(images):
    limits = {"translate_percent": (-0.3, 0.3), "scale": (0.6, 1.4), "rotate": (-90, 90), "keep_ratio": True, "p": 1.0}
    theirs = pictures(A.Affine(**limits, border_mode=cv2.BORDER_REFLECT_101), images)
    ours = pictures(ShiftScaleRotate(shift_limit=0.3, scale_limit=0.4, rotate_limit=90, p=1.0), images)
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert (ours != images).any(axis=(1, 2, 3)).all()


def test_faster_hole_is_as_likely_everywhere_as_the_librarys():
    sizes = {"hole_height_range": (30, 30), "hole_width_range": (30, 30), "num_holes_range": (1, 1)}
    black = np.zeros((1800, 32, 32, 3), dtype=np.uint8)
    ours, theirs = (
        Counter(picture.tobytes() for picture in pictures(hole, black))
        for hole in (SquareHole(30, fill=(9, 8, 7), p=1.0), A.CoarseDropout(**sizes, fill=(9, 8, 7), p=1.0))
    )
    assert ours.keys() == theirs.keys()
    assert len(ours) == 9
    assert 150 < min(ours.values()) <= max(ours.values()) < 250
    assert not black.any()  # the hole is in a copy


@pytest.mark.parametrize(
    "transform",
    [
        A.HorizontalFlip(p=0.5),  # draws from Python's random
        A.GaussNoise(p=1),  # draws from numpy
        A.ElasticTransform(p=1),
        A.ColorJitter(p=1),
        A.SomeOf([A.GaussNoise(p=1), A.HorizontalFlip(p=1), A.Solarize(p=1)], n=2),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_what_any_transform_draws_follows_from_the_key(transform):
    first, again, other = (pictures(transform, IMAGES[:20], key) for key in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_key_is_all_of_its_numbers_in_their_order():
    pipeline, draws = RepeatableCompose([A.GaussNoise(p=1)]), set()
    keys = [(0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 11, 0), (11, 1, 0), (2**63 - 1, 0, 0)]
    for key in keys:
        pipeline.set_key(*key)
        draws.add(pipeline(image=IMAGES[0])["image"].tobytes())
    assert len(draws) == len(keys)
