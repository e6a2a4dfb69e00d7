import hashlib
import os
import pickle
import tarfile
import urllib.error

import numpy as np
import pytest
from PIL import Image

from sources import DataError, draw_shapes, load_cifar10, load_folder, load_shapes, load_source, read_image


def test_shapes_are_what_a_source_promises():
    source = load_source("shapes", "nowhere")
    for split in (source.train, source.test):
        assert split.images.dtype == np.uint8
        assert split.images.shape == (len(split.labels), 32, 32, 3)
        assert split.labels.dtype == np.int64
        assert np.bincount(split.labels).tolist() == [len(split.labels) // 10] * 10
    assert len(source.class_names) == 10
    assert not {image.tobytes() for image in source.train.images} & {image.tobytes() for image in source.test.images}


def test_shapes_are_the_same_every_time_and_use_exact_arithmetic_only():
    first, second = load_shapes(), load_shapes()
    assert np.array_equal(first.train.images, second.train.images)

    class OnlyRandom:  # a generator whose other methods may differ between numpy versions and machines
        def __init__(self):
            self.random = np.random.default_rng(0).random

    assert len(np.unique(draw_shapes(20, OnlyRandom()).images, axis=0)) == 20


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A tiny CIFAR-10 in its own format, whose md5 sums torchvision is told; and no network."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "data" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch():
        return {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": list(range(10)) * 2}

    monkeypatch.setattr(CIFAR10, "train_list", [write(f"data_batch_{k}", batch()) for k in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch())])
    name, md5 = write("batches.meta", {"label_names": [f"class {k}" for k in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", no_network)
    return folder


def test_cifar10_is_what_a_source_promises(cifar10):
    source = load_source("cifar10", cifar10.parent)
    assert source.train.images.shape == (100, 32, 32, 3)
    assert source.test.images.dtype == np.uint8
    assert source.train.labels.dtype == np.int64
    assert source.class_names[3] == "class 3"
    row = pickle.loads((cifar10 / "data_batch_1").read_bytes())["data"][0]
    assert np.array_equal(source.train.images[0], row.reshape(3, 32, 32).transpose(1, 2, 0))


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damaged_file_is_named(cifar10, name, damage):
    path = cifar10 / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"{name} is (damaged|missing).*delete .*{cifar10.name}"):
        load_cifar10(cifar10.parent)


@pytest.mark.parametrize("fault", ["labels", "shape", "truncated", "key"])
def test_content_that_cannot_be_right_is_refused(cifar10, monkeypatch, fault):
    """Behind a md5 that is right, or is not asked for."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: os.path.isfile(path))
    batch = {"data": np.zeros((10, 3072), dtype=np.uint8), "labels": list(range(10))}
    if fault == "labels":
        batch["labels"][3] = 10
    if fault == "shape":
        batch["labels"].append(0)
    if fault == "key":
        del batch["data"]
    content = pickle.dumps(batch)
    (cifar10 / "test_batch").write_bytes(content[:-100] if fault == "truncated" else content)
    with pytest.raises(DataError, match="delete"):
        load_source("cifar10", cifar10.parent)


def test_malicious_batch_file_never_runs(cifar10, tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "marker"),)

    (cifar10 / "data_batch_2").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(DataError, match="data_batch_2 is damaged"):
        load_cifar10(cifar10.parent)
    assert not (tmp_path / "marker").exists()


def test_without_network_and_data_the_ways_out_are_named(cifar10, tmp_path):
    with pytest.raises(DataError) as error:
        load_cifar10(tmp_path / "empty")
    message = str(error.value)
    assert "\n" not in message
    for words in (
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        str(tmp_path / "empty" / "cifar-10-python.tar.gz"),
        "--data-dir",
        "--dataset shapes",
    ):
        assert words in message
    assert list((tmp_path / "empty").iterdir()) == []  # nothing that looks like a download


def test_archive_put_in_place_by_hand_is_unpacked(cifar10, tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    archive = tmp_path / "by_hand" / CIFAR10.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as file:
        file.add(cifar10, CIFAR10.base_folder)
    with pytest.raises(DataError, match=f"{archive.name} is damaged"):
        load_cifar10(archive.parent)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(load_cifar10(archive.parent).train.labels) == 100


def test_data_dir_that_cannot_be_written(cifar10, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be written.*--data-dir"):
        load_cifar10(tmp_path / "file" / "data")


def test_cifar100_is_read_with_its_fine_classes(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100

    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()
    batch = {"data": np.arange(200 * 3072, dtype=np.uint32).astype(np.uint8).reshape(200, 3072)}
    batch |= {"fine_labels": [*range(100), *range(100)], "coarse_labels": [0] * 200}
    names = {"fine_label_names": [f"fine {k}" for k in range(100)], "coarse_label_names": ["coarse"] * 20}
    md5 = {}
    for name, content in (("train", batch), ("test", batch), ("meta", names)):
        (folder / name).write_bytes(pickle.dumps(content))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5["meta"]})
    source = load_source("cifar100", tmp_path)
    assert len(source.class_names) == 100
    assert source.class_names[7] == "fine 7"
    assert source.test.labels.tolist() == batch["fine_labels"]


# --- a folder of images ---


@pytest.fixture
def pictures(tmp_path):
    """Two classes, three images of different formats, modes and sizes each, in training and test."""
    for part in ("train", "test"):
        for shade, name in ((40, "dark"), (200, "bright")):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), (shade, 0, shade)).save(folder / "a.png")
            Image.new("L", (100, 50), shade).save(folder / "b.JPG")
            Image.new("P", (20, 40)).save(folder / "c.gif")
            (folder / ".DS_Store").write_bytes(b"not an image")
    return tmp_path


def test_folder_is_what_a_source_promises(pictures):
    source = load_source("folder", pictures)
    assert source.class_names == ("bright", "dark")
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (source.train.images[0] == (200, 0, 200)).all()
    assert abs(int(source.test.images[4, 5, 5, 0]) - 40) < 3  # dark/b.JPG


@pytest.mark.parametrize("content", [b"", b"text", "truncated"], ids=["empty", "text", "truncated"])
def test_unreadable_file_is_named(pictures, content):
    path = pictures / "test" / "dark" / "b.JPG"
    path.write_bytes(path.read_bytes()[:-200] if content == "truncated" else content)
    with pytest.raises(DataError, match=r"dark/b.JPG cannot be read as an image") as error:
        load_folder(pictures)
    assert "\n" not in str(error.value)


def test_folder_that_is_no_dataset_is_refused(pictures):
    with pytest.raises(DataError, match="DATA_DIR/train/CLASS/IMAGE"):
        load_folder(pictures / "nowhere")
    (pictures / "test" / "grey").mkdir()
    with pytest.raises(DataError, match="must hold the same classes"):
        load_folder(pictures)
    (pictures / "train" / "grey").mkdir()
    with pytest.raises(DataError, match=r"train/grey is empty"):
        load_folder(pictures)
    (pictures / "train" / "grey").rmdir()
    (pictures / "train" / "grey").touch()
    with pytest.raises(DataError, match=r"train/grey cannot be read"):
        load_folder(pictures)


def test_image_keeps_its_pixels_and_is_turned_upright(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png"), np.rot90(pixels, -1))


def test_sixteen_bit_grey_is_scaled_and_pixels_without_range_are_refused(tmp_path):
    Image.fromarray(np.full((32, 32), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert (read_image(tmp_path / "deep.png") == 40_000 // 256).all()
    Image.fromarray(np.full((32, 32), 0.5, dtype=np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(DataError, match=r"float\.tiff .* no fixed range"):
        read_image(tmp_path / "float.tiff")
