from collections import Counter

import albumentations as A
import numpy as np

from extras.transforms import RepeatableCompose, SquareHole


def test_faster_hole_is_as_likely_everywhere_as_the_librarys():
    def places(kind):
        """How often the hole, which leaves three pixels' room, is in each place."""
        options = {"hole_height_range": (30, 30), "hole_width_range": (30, 30), "num_holes_range": (1, 1)}
        pipeline, counter = RepeatableCompose([kind(**options, fill=(9, 8, 7), p=1.0)]), Counter()
        for number in range(1800):
            pipeline.set_key(number)
            counter[pipeline(image=np.zeros((32, 32, 3), np.uint8))["image"].tobytes()] += 1
        return counter

    ours = places(SquareHole)
    assert ours.keys() == places(A.CoarseDropout).keys()
    assert len(ours) == 9
    assert 150 < min(ours.values()) <= max(ours.values()) < 250
