from collections import Counter

import albumentations as A
import numpy as np
import pytest

from extras.sources import load_shapes
from extras.transforms import RepeatableCompose, SquareHole

IMAGES = load_shapes().test.images


def pictures(transform, images, key=0):
    """The images as one transform gives them; each has random numbers of its own."""
    pipeline, result = RepeatableCompose([transform]), []
    for number, image in enumerate(images):
        pipeline.set_key(key, number)
        result.append(pipeline(image=image)["image"])
    return np.stack(result)


def test_faster_hole_is_as_likely_everywhere_as_the_librarys():
    options = {"hole_height_range": (30, 30), "hole_width_range": (30, 30), "num_holes_range": (1, 1)}
    black = np.zeros((1800, 32, 32, 3), dtype=np.uint8)
    ours, theirs = (
        Counter(picture.tobytes() for picture in pictures(kind(**options, fill=(9, 8, 7), p=1.0), black))
        for kind in (SquareHole, A.CoarseDropout)
    )
    assert ours.keys() == theirs.keys()
    assert len(ours) == 9
    assert 150 < min(ours.values()) <= max(ours.values()) < 250


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
