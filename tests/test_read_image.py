"""What a picture file becomes: extras.sources.read_image."""

import re
import zlib

import numpy as np
import pytest
from extras.sources import read_image
from PIL import Image


@pytest.fixture
def saved(tmp_path):
    """Return a function that writes an image of the given pixels, and reads it again."""

    def save_and_read(pixels, mode=None, **options):
        Image.fromarray(pixels).convert(mode).save(tmp_path / "image.png", **options)
        return read_image(tmp_path / "image.png")

    return save_and_read


def test_image_of_the_right_size_keeps_its_pixels_and_is_turned_upright(saved):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    assert np.array_equal(saved(pixels), pixels)
    assert np.array_equal(saved(pixels, exif=exif), np.rot90(pixels, -1))


def halves(upper, lower):
    """Pixels (32, 32, ...), each half alike."""
    return np.repeat([upper, lower], 512, axis=0).reshape(32, 32, *np.shape(upper))


WHITE = [255] * 3


def test_transparent_is_white_and_sixteen_bits_are_scaled(saved, capsys):
    assert np.array_equal(saved(halves(np.uint8([9, 9, 9, 0]), np.uint8([9, 9, 9, 255]))), halves(WHITE, [9] * 3))
    assert np.array_equal(saved(halves(np.uint8(0), np.uint8(200)), mode="P", transparency=0), halves(WHITE, [200] * 3))
    assert np.array_equal(saved(halves(np.uint16(1), np.uint16(40_000)), transparency=1), halves(WHITE, [156] * 3))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("bits", "color", "transparent", "other", "seen"),
    [
        (2, 0, [1], bytes([0b10101010]) * 8, 170),
        (4, 0, [5], bytes([0x99]) * 16, 153),
        (16, 2, [30_000] * 3, np.uint16([40_000] * 96).astype(">u2").tobytes(), 156),
        (16, 2, [100] * 3, np.uint16([40_000] * 96).astype(">u2").tobytes(), 156),
    ],
)
def test_transparent_is_white_in_other_depths_too(tmp_path, bits, color, transparent, other, seen):
    def chunk(name, content):
        return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")

    key = np.uint16(transparent).astype(">u2").tobytes()
    row = key * 32 if bits == 16 else bytes([transparent[0] * (0x11 if bits == 4 else 0b01010101)]) * len(other)
    header = (32).to_bytes(4, "big") * 2 + bytes([bits, color, 0, 0, 0])
    pixels = zlib.compress((b"\0" + row) * 16 + (b"\0" + other) * 16)
    parts = [chunk(b"IHDR", header), chunk(b"tRNS", key), chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert np.array_equal(read_image(tmp_path / "deep.png"), halves(WHITE, [seen] * 3))


def test_sixteen_bit_grey_that_would_be_black_is_warned_of_once(saved, capsys):
    for _ in range(2):
        saved(np.full((32, 32), 4_000, dtype=np.uint16))
    assert re.fullmatch(r"train.py: warning: a 16-bit image .+\n", capsys.readouterr().err)
