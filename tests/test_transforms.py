from collections import Counter

import albumentations as A
import numpy as np

from parts.transforms import RepeatableCompose, SquareHole


def test_faster_hole_is_as_likely_everywhere_as_the_librarys():
    def places(hole):
        """How often a hole of 30 pixels is in each place."""
        pipeline, counter = RepeatableCompose([hole]), Counter()
        for number in range(1800):
            pipeline.set_key(number)
            counter[pipeline(image=np.zeros((32, 32, 3), np.uint8))["image"].tobytes()] += 1
        return counter

    sizes = {"hole_height_range": (30, 30), "hole_width_range": (30, 30), "num_holes_range": (1, 1)}
    ours = places(SquareHole(30, fill=(9, 8, 7), p=1.0))
    assert ours.keys() == places(A.CoarseDropout(**sizes, fill=(9, 8, 7), p=1.0)).keys()
    assert len(ours) == 9
    assert 150 < min(ours.values()) <= max(ours.values()) < 250


def test_random_numbers_follow_from_the_key_alone():
    pipeline = RepeatableCompose([A.RandomBrightnessContrast(p=0.5), A.GaussNoise(p=0.5), A.Lambda(np.fliplr, p=0.5)])
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)

    def pictures(keys):
        for key in keys:
            pipeline.set_key(*key)
            yield pipeline(image=image)["image"].tobytes()

    keys = [(0, epoch, index) for epoch in range(12) for index in range(12)]
    there, back = ([*pictures(order)] for order in (keys, keys[::-1]))
    assert there == back[::-1]
    assert len({*there}) > 144 * 0.7  # of eight together, one draw is none of the three: the image as it is
