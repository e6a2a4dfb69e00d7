from collections import Counter

import numpy as np

from parts.transforms import RepeatableCompose, SquareHole


def test_hole_is_equally_likely_everywhere():
    pipeline, places = RepeatableCompose([SquareHole(30, fill=(9, 8, 7), p=1.0)]), Counter()
    for number in range(1800):
        pipeline.set_key(number)
        places[pipeline(image=np.zeros((32, 32, 3), np.uint8))["image"].tobytes()] += 1
    assert (len(places), min(places.values()) > 150, max(places.values()) < 250) == (3 * 3, True, True)
