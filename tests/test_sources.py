import hashlib
import os
import pickle
import tarfile
import urllib.error
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from config import UsageError
from extras.sources import draw_shapes, load_shapes, load_source, read_image

# --- shapes ---


def test_shapes_are_what_a_source_promises():
    source = load_source("shapes", "nowhere")
    for split in source.train, source.test:
        assert split.images.dtype == np.uint8
        assert split.images.shape == (len(split.labels), 32, 32, 3)
        assert split.labels.dtype == np.int64
        assert np.bincount(split.labels).tolist() == [len(split.labels) // 10] * 10
    assert len(source.class_names) == 10
    assert not {image.tobytes() for image in source.train.images} & {image.tobytes() for image in source.test.images}


def test_shapes_are_the_same_pictures_on_every_machine():
    """Published checkpoints know the images that they were trained on by these bits."""
    train, test, _ = load_shapes()
    sums = [hashlib.md5(split.images.tobytes()).hexdigest() for split in (train, test)]
    assert sums == ["c4cd3aa2aa07282a9fee8cbeef33f924", "fe8b3e7ca2ac034a128a2879e7cdc47c"]

    class OnlyRandom:  # a generator whose other methods may differ between numpy's versions
        random = np.random.default_rng(0).random

    assert len(np.unique(draw_shapes(20, OnlyRandom()).images, axis=0)) == 20


# --- CIFAR ---


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def write_pickle(folder, name, content):
    """Write a file of CIFAR's own format; return its name and md5."""
    data = pickle.dumps(content)
    (folder / name).write_bytes(data)
    return [name, hashlib.md5(data).hexdigest()]


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A folder cifar-10-batches-py with 100 images to train on and 20 to test on; torchvision is told their md5."""
    folder = tmp_path / "data" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name):
        images = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        return write_pickle(folder, name, {"data": images, "labels": list(range(10)) * 2})

    monkeypatch.setattr(CIFAR10, "train_list", [write(f"data_batch_{k}") for k in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch")])
    name, md5 = write_pickle(folder, "batches.meta", {"label_names": [f"class {k}" for k in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return folder


def test_cifar10_is_what_a_source_promises(cifar10):
    source = load_source("cifar10", cifar10.parent)
    assert source.train.images.shape == (100, 32, 32, 3)
    assert source.test.images.dtype == np.uint8
    assert source.train.labels.dtype == np.int64
    assert source.class_names[3] == "class 3"
    row = pickle.loads((cifar10 / "data_batch_1").read_bytes())["data"][0]
    assert np.array_equal(source.train.images[0], row.reshape(3, 32, 32).transpose(1, 2, 0))


def test_data_dir_may_be_the_folder_with_the_batches_itself(cifar10):
    assert len(load_source("cifar10", str(cifar10)).train.labels) == 100


def test_cifar100_is_read_with_its_fine_classes(tmp_path, monkeypatch):
    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()
    batch = {"data": np.arange(200 * 3072, dtype=np.uint32).astype(np.uint8).reshape(200, 3072)}
    batch |= {"fine_labels": [*range(100), *range(100)], "coarse_labels": [0] * 200}
    names = {"fine_label_names": [f"fine {k}" for k in range(100)], "coarse_label_names": ["coarse"] * 20}
    monkeypatch.setattr(CIFAR100, "train_list", [write_pickle(folder, "train", batch)])
    monkeypatch.setattr(CIFAR100, "test_list", [write_pickle(folder, "test", batch)])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": write_pickle(folder, "meta", names)[1]})
    source = load_source("cifar100", tmp_path)
    assert len(source.class_names) == 100
    assert source.class_names[7] == "fine 7"
    assert source.test.labels.tolist() == batch["fine_labels"]


def cifar10_refusal(data_dir):
    """The line with which CIFAR-10 is refused; it always names the ways out."""
    with pytest.raises(UsageError) as error:
        load_source("cifar10", data_dir)
    message = str(error.value)
    assert "\n" not in message
    for words in (str(data_dir), CIFAR10.url, CIFAR10.tgz_md5, "--data-dir", "--dataset shapes"):
        assert words in message
    return message


def test_without_data_and_network_the_ways_out_are_named(tmp_path):
    assert "no network" in cifar10_refusal(tmp_path / "empty")


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damaged_file_is_never_read(cifar10, name, damage):
    path = cifar10 / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    cifar10_refusal(cifar10.parent)


def test_malicious_file_never_runs(cifar10, tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "marker"),)

    write_pickle(cifar10, "data_batch_2", Malicious())
    cifar10_refusal(cifar10.parent)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("damage", [False, True], ids=["whole", "damaged"])
def test_archive_put_in_place_by_hand_mends_what_is_damaged(cifar10, monkeypatch, damage):
    archive = cifar10.parent / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as file:
        file.add(cifar10, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    (cifar10 / "data_batch_3").write_bytes(b"")
    if damage:
        archive.write_bytes(archive.read_bytes()[:-1])
        cifar10_refusal(cifar10.parent)
    else:
        assert len(load_source("cifar10", cifar10.parent).train.labels) == 100


def test_data_dir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    cifar10_refusal(tmp_path / "file" / "data")


@pytest.mark.parametrize("fault", ["truncated", "key"])
def test_content_that_cannot_be_right_is_refused_even_if_its_md5_is(cifar10, monkeypatch, fault):
    batch = {"data": np.zeros((10, 3072), dtype=np.uint8), "labels": list(range(10))}
    if fault == "key":
        del batch["data"]
    content = pickle.dumps(batch)[: -100 if fault == "truncated" else None]
    (cifar10 / "test_batch").write_bytes(content)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", hashlib.md5(content).hexdigest()]])
    with pytest.raises(UsageError, match=r"^cifar10 "):
        load_source("cifar10", cifar10.parent)


# --- a folder of images ---


@pytest.fixture
def folder(tmp_path):
    """Two classes, three images of different formats, modes and sizes each, and what systems leave beside them."""
    for part in ("train", "test"):
        for shade, name in ((40, "dark"), (200, "bright")):
            path = tmp_path / part / name
            path.mkdir(parents=True)
            Image.new("RGB", (32, 32), (shade, 0, shade)).save(path / "a.png")
            Image.new("L", (100, 50), shade).save(path / "b.JPG")
            Image.new("P", (20, 40)).save(path / "c.gif")
            for junk in (".DS_Store", "Thumbs.db", "desktop.ini"):
                (path / junk).write_bytes(b"not an image")
    (tmp_path / "test" / "__MACOSX").mkdir()
    return tmp_path


def test_folder_is_what_a_source_promises(folder):
    source = load_source("folder", folder)
    assert source.class_names == ("bright", "dark")
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (source.train.images.shape, source.train.images.dtype) == ((6, 32, 32, 3), np.uint8)
    assert (source.train.images[0] == (200, 0, 200)).all()
    assert abs(int(source.test.images[4, 5, 5, 0]) - 40) < 3  # dark/b.JPG


def test_images_to_train_on_need_not_be_there_to_test_only(folder):
    (folder / "train").rename(folder / "elsewhere")
    assert load_source("folder", folder, test_only=True).test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(UsageError, match="train cannot be read as a folder"):
        load_source("folder", folder)


@pytest.mark.parametrize("content", [b"", b"text", "truncated", "pipe"])
def test_file_that_is_no_image_is_named(folder, content):
    path = folder / "test" / "dark" / "b.JPG"
    data = path.read_bytes()
    path.unlink()
    if content == "pipe":  # to open it would wait for ever
        os.mkfifo(path)
    else:
        path.write_bytes(data[:-200] if content == "truncated" else content)
    with pytest.raises(UsageError, match=r"dark/b.JPG cannot be read as an image \(.+\)$"):
        load_source("folder", folder)


def test_folder_that_is_no_dataset_is_refused(folder):
    def refusal(data_dir=folder):
        with pytest.raises(UsageError) as error:
            load_source("folder", data_dir)
        return str(error.value)

    assert "DATA_DIR/train/CLASS/IMAGE" in refusal(folder / "nowhere")
    (folder / "test" / "grey").mkdir()
    assert "test/grey has no counterpart in train" in refusal()
    (folder / "train" / "grey").mkdir()
    assert "grey is empty" in refusal()
    (folder / "test" / "grey").rmdir()
    assert "train/grey has no counterpart in test" in refusal()
    (folder / "test" / "grey").touch()
    assert "test/grey cannot be read as a folder" in refusal()


# --- one image ---


@pytest.fixture
def saved(tmp_path):
    """Return a function that writes an image of constant or given pixels, and reads it again."""

    def save_and_read(pixels, name="image.png", mode=None, **options):
        image = Image.fromarray(np.asarray(pixels))
        (image.convert(mode) if mode else image).save(tmp_path / name, **options)
        return read_image(tmp_path / name)

    return save_and_read


def test_image_of_the_right_size_keeps_its_pixels_and_is_turned_upright(saved):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    assert np.array_equal(saved(pixels), pixels)
    assert np.array_equal(saved(pixels, exif=exif), np.rot90(pixels, -1))


def test_transparent_is_white(saved):
    pixels = np.full((32, 32, 4), 100, dtype=np.uint8)
    pixels[:16, :, 3] = 0
    pixels[16:, :, 3] = 255
    image = saved(pixels)
    assert (image[:16] == 255).all()
    assert (image[16:] == 100).all()
    palette = np.repeat(np.array([0, 200], dtype=np.uint8), 512).reshape(32, 32)
    assert (saved(palette, mode="P", transparency=0)[:16] == 255).all()


def test_sixteen_bit_grey_is_scaled(saved, capsys):
    pixels = np.full((32, 32), 40_000, dtype=np.uint16)
    pixels[:16] = 1
    image = saved(pixels, transparency=1)
    assert (image[16:] == 40_000 // 256).all()
    assert (image[:16] == 255).all()  # what is transparent is white here too
    assert capsys.readouterr().err == ""


def test_sixteen_bit_colour_is_scaled_and_transparent_is_white(tmp_path):
    pixels = np.full((32, 32, 3), 40_000, dtype=np.uint16)
    pixels[:16] = 30_000
    png = cv2.imencode(".png", pixels)[1].tobytes()
    chunk = b"tRNS" + np.full(3, 30_000, dtype=">u2").tobytes()  # Pillow and OpenCV write none
    chunk = (6).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    (tmp_path / "deep.png").write_bytes(png[:33] + chunk + png[33:])
    image = read_image(tmp_path / "deep.png")
    assert (image[16:] == 40_000 // 256).all()
    assert (image[:16] == 255).all()


def test_sixteen_bit_grey_that_would_be_black_is_warned_of_once(saved, capsys):
    for _ in range(2):
        saved(np.full((32, 32), 4_000, dtype=np.uint16))
    err = capsys.readouterr().err
    assert err.startswith("train.py: warning: a 16-bit image")
    assert err.count("\n") == 1


def test_pixels_without_a_range_are_refused(saved):
    with pytest.raises(UsageError, match=r"float\.tiff .* no fixed range"):
        saved(np.full((32, 32), 0.5, dtype=np.float32), "float.tiff")
