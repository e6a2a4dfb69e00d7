"""Where images come from, and what a picture file becomes."""

import hashlib
import os
import pickle
import tarfile
import urllib.error
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from filelock import FileLock, Timeout
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from config import UsageError
from parts.images import load_source, read_image, resize_image


def test_shapes_are_the_same_pictures_on_every_machine():
    """Published checkpoints know the images that they were trained on by these bits."""
    train, test, names = load_source("shapes", "nowhere")
    published = "c4cd3aa2aa07282a9fee8cbeef33f924", "fe8b3e7ca2ac034a128a2879e7cdc47c"
    for (images, labels), md5 in zip((train, test), published, strict=True):
        assert (images.dtype, images.shape) == (np.uint8, (len(labels), 32, 32, 3))
        assert hashlib.md5(images.tobytes()).hexdigest() == md5
        assert np.bincount(labels).tolist() == [len(labels) // 10] * len(names)


# --- CIFAR ---


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=urllib.error.URLError("no network")))


def write_pickle(folder, name, content):
    """Write a file of CIFAR's own format; return its name and md5."""
    data = pickle.dumps(content)
    (folder / name).write_bytes(data)
    return [name, hashlib.md5(data).hexdigest()]


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """CIFAR-10 of 100 images to train on and 20 to test on; torchvision is told their md5."""
    folder = tmp_path / "data" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    batch = {"data": images, "labels": [*range(10)] * 2}
    names = {"label_names": [f"class {k}" for k in range(10)]}
    monkeypatch.setattr(CIFAR10, "train_list", [write_pickle(folder, f"data_batch_{k}", batch) for k in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [write_pickle(folder, "test_batch", batch)])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": write_pickle(folder, "batches.meta", names)[1]})
    return folder


def test_cifar10_is_what_a_source_promises(cifar10):
    source = load_source("cifar10", str(cifar10))  # data_dir may be the folder with the batches itself
    assert (source.train.images.shape, source.test.images.shape) == ((100, 32, 32, 3), (20, 32, 32, 3))
    assert (source.test.images.dtype, source.train.labels.dtype) == (np.uint8, np.int64)
    assert source.class_names[3] == "class 3"
    row = pickle.loads((cifar10 / "data_batch_1").read_bytes())["data"][0]
    assert np.array_equal(source.train.images[0], row.reshape(3, 32, 32).transpose(1, 2, 0))


def test_cifar100_is_read_with_its_fine_classes(tmp_path, monkeypatch):
    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()
    batch = {"data": np.zeros((200, 3072), np.uint8), "fine_labels": [*range(100)] * 2, "coarse_labels": [0] * 200}
    names = {"fine_label_names": [f"fine {k}" for k in range(100)], "coarse_label_names": ["coarse"] * 20}
    monkeypatch.setattr(CIFAR100, "train_list", [write_pickle(folder, "train", batch)])
    monkeypatch.setattr(CIFAR100, "test_list", [write_pickle(folder, "test", batch)])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": write_pickle(folder, "meta", names)[1]})
    source = load_source("cifar100", tmp_path)
    assert source.class_names == tuple(names["fine_label_names"])
    assert source.test.labels.tolist() == batch["fine_labels"]


def check_that_cifar10_is_refused(data_dir, why=""):
    """It is one line, and always names the ways out."""
    with pytest.raises(UsageError) as error:
        load_source("cifar10", data_dir)
    for words in (why, str(data_dir), CIFAR10.url, CIFAR10.tgz_md5, "--data-dir", "--dataset shapes"):
        assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_without_data_and_network_the_ways_out_are_named(tmp_path):
    check_that_cifar10_is_refused(tmp_path / "empty", "no network")
    (tmp_path / "file").touch()
    check_that_cifar10_is_refused(tmp_path / "file" / "data", "Not a directory")


def test_one_run_at_a_time_downloads(tmp_path, monkeypatch):
    def download(self):
        with pytest.raises(Timeout):
            FileLock(tmp_path / ".lock").acquire(timeout=0)
        raise OSError("it was locked")

    monkeypatch.setattr(CIFAR10, "download", download)
    check_that_cifar10_is_refused(tmp_path, "it was locked")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink])
def test_damaged_file_is_never_read(cifar10, name, damage):
    damage(cifar10 / name)
    check_that_cifar10_is_refused(cifar10.parent)


def test_malicious_file_never_runs(cifar10, tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "marker"),)

    write_pickle(cifar10, "data_batch_2", Malicious())
    check_that_cifar10_is_refused(cifar10.parent)
    assert not (tmp_path / "marker").exists()


def test_archive_put_in_place_by_hand_mends_what_is_damaged_unless_it_is_damaged_too(cifar10, monkeypatch):
    archive = cifar10.parent / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as file:
        file.add(cifar10, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    (cifar10 / "data_batch_3").write_bytes(b"")
    assert len(load_source("cifar10", cifar10.parent).train.labels) == 100
    (cifar10 / "data_batch_3").write_bytes(b"")
    archive.write_bytes(archive.read_bytes()[:-1])
    check_that_cifar10_is_refused(cifar10.parent)


# --- a folder of images ---


@pytest.fixture
def folder(tmp_path):
    """Two classes, three images of different formats, modes and sizes each, and what systems leave beside them."""
    for path, shade in (("train/dark", 40), ("train/bright", 200), ("test/dark", 40), ("test/bright", 200)):
        (tmp_path / path).mkdir(parents=True)
        Image.new("RGB", (32, 32), (shade, 0, shade)).save(tmp_path / path / "a.png")
        Image.new("L", (100, 50), shade).save(tmp_path / path / "b.JPG")
        Image.new("P", (20, 40)).save(tmp_path / path / "c.gif")
        for junk in (".DS_Store", "Thumbs.db", "desktop.ini"):
            (tmp_path / path / junk).write_bytes(b"not an image")
    (tmp_path / "test" / "__MACOSX").mkdir()
    return tmp_path


def test_folder_is_what_a_source_promises(folder):
    source = load_source("folder", folder)
    assert source.class_names == ("bright", "dark")
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (source.train.images.shape, source.train.images.dtype) == ((6, 32, 32, 3), np.uint8)
    assert (source.train.images[0] == (200, 0, 200)).all()
    assert abs(int(source.test.images[4, 5, 5, 0]) - 40) < 3  # dark/b.JPG


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda path: path.write_bytes(b""), "damaged, or no image"),
        (lambda path: path.write_bytes(b"text"), "damaged, or no image"),
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "damaged, or no image"),
        (lambda path: path.unlink() or os.mkfifo(path), "not a file"),  # to open a pipe would wait for ever
        (lambda path: Image.new("F", (32, 32)).save(path, "TIFF"), "an image.s pixels, of mode F, have no fixed range"),
    ],
)
def test_file_that_is_no_image_is_named(folder, damage, why):
    damage(folder / "test/dark/b.JPG")
    with pytest.raises(UsageError, match=rf"dark/b.JPG cannot be read as an image \({why}\)$"):
        load_source("folder", folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: folder.rename(f"{folder} elsewhere"), "DATA_DIR/train/CLASS/IMAGE"),
        (lambda folder: (folder / "test/grey").mkdir(), "test/grey has no counterpart in train"),
        (lambda folder: (folder / "train/grey").mkdir(), "train/grey has no counterpart in test"),
        (lambda folder: (folder / "test/grey").mkdir() or (folder / "train/grey").mkdir(), "grey is empty"),
        (lambda folder: (folder / "test/grey").touch() or (folder / "train/grey").mkdir(), "test/grey cannot be read"),
    ],
)
def test_folder_that_is_no_dataset_is_refused(folder, change, words):
    change(folder)
    with pytest.raises(UsageError, match=words):
        load_source("folder", folder)


# --- a picture ---


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


def test_transparent_is_white(saved):
    assert np.array_equal(saved(halves(np.uint8([9, 9, 9, 0]), np.uint8([9, 9, 9, 255]))), halves(WHITE, [9] * 3))
    assert np.array_equal(saved(halves(np.uint8(0), np.uint8(200)), mode="P", transparency=0), halves(WHITE, [200] * 3))
    assert np.array_equal(saved(halves(np.uint8(7), np.uint8(200)), transparency=7), halves(WHITE, [200] * 3))


def test_sixteen_bits_are_scaled_to_eight(saved, tmp_path, capsys):
    assert np.array_equal(saved(halves(np.uint16(1), np.uint16(40_000)), transparency=1), halves(WHITE, [156] * 3))
    for channels in (1, 3):
        pixels = halves(np.uint16([10_000] * channels), np.uint16([40_000] * channels))
        cv2.imwrite(str(tmp_path / "deep.png"), pixels)
        assert np.array_equal(read_image(tmp_path / "deep.png"), halves([39] * 3, [156] * 3))
    assert capsys.readouterr().err == ""


def test_sixteen_bit_grey_that_would_be_black_is_warned_of(saved, capsys):
    saved(np.full((32, 32), 4_000, dtype=np.uint16))
    assert "warning: a 16-bit image" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_empty_image_is_refused(mode):
    with pytest.raises(ValueError):
        resize_image(Image.new(mode, (0, 5)))
