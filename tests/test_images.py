"""Where images come from, and what a picture file becomes."""

import hashlib
import os
import pickle
import tarfile
import urllib.error
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from filelock import FileLock, Timeout
from PIL import Image, ImageCms
from torchvision.datasets import CIFAR10, CIFAR100

from config import UsageError
from parts.images import load_source, read_image


def test_shapes_are_the_same_pictures_on_every_machine():
    train, test, names = load_source("shapes", "nowhere")
    for (images, labels), md5 in (
        (train, "c4cd3aa2aa07282a9fee8cbeef33f924"),
        (test, "fe8b3e7ca2ac034a128a2879e7cdc47c"),
    ):
        assert hashlib.md5(images.tobytes()).hexdigest() == md5
        assert np.bincount(labels).tolist() == [len(labels) // 10] * len(names)


@pytest.fixture(params=[CIFAR10, CIFAR100], ids=["cifar10", "cifar100"])
def cifar(request, tmp_path, monkeypatch):
    """The class and the folder of a CIFAR of 200 images to train on and 100 to test on. There is no network."""
    dataset, folder = request.param, tmp_path / request.param.base_folder
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5(pickle.dumps(content)).hexdigest()]  # torchvision is told it

    pixels = np.random.default_rng(0).integers(0, 256, (100, 3072), dtype=np.uint8)
    kinds = ["labels"] if dataset is CIFAR10 else ["fine_labels", "coarse_labels"]
    batch = {"data": pixels, **{kind: [k % 10 for k in range(100)] for kind in kinds}}
    names = {dataset.meta["key"]: [f"class {k}" for k in range(10)], "coarse_label_names": ["coarse"]}
    monkeypatch.setattr(dataset, "train_list", [write("data_1", batch), write("data_2", batch)])
    monkeypatch.setattr(dataset, "test_list", [write("test", batch)])
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": write(dataset.meta["filename"], names)[1]})
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=urllib.error.URLError("no network")))
    return dataset, folder


def test_cifar_is_what_a_source_promises(cifar, monkeypatch):
    dataset, folder = cifar
    monkeypatch.setenv("HOME", str(folder.parent))
    for data_dir in (folder.parent, str(folder), "~"):  # it may be the folder with the batches itself
        (images, labels), (test_images, test_labels), class_names = load_source(dataset.__name__.lower(), data_dir)
        assert (images.shape, test_images.shape) == ((200, 32, 32, 3), (100, 32, 32, 3))
        assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
        assert (class_names[3], test_labels[13]) == ("class 3", 3)
        pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
        assert np.array_equal(images[0], pixels.transpose(1, 2, 0))


class Malicious:
    def __reduce__(self):
        return print, ("Malicious code runs",)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(pickle.dumps(Malicious()))])
def test_damaged_file_is_never_read_and_without_network_the_ways_out_are_named(cifar, damage, capsys):
    dataset, folder = cifar
    for name in ("test", "data_2", dataset.meta["filename"]):
        whole = (folder / name).read_bytes()
        damage(folder / name)
        with pytest.raises(UsageError, match=f"not whole in {folder.parent} .+ --data-dir, put {dataset.url} there"):
            load_source(dataset.__name__.lower(), folder.parent)
        (folder / name).write_bytes(whole)
    assert "Malicious" not in capsys.readouterr().out


def test_archive_put_in_place_by_hand_is_unpacked_by_one_run_at_a_time(cifar, monkeypatch):
    dataset, folder = cifar
    with tarfile.open(archive := folder.parent / dataset.filename, "w:gz") as file:
        file.add(folder, folder.name)
    (folder / "data_2").write_bytes(b"")
    unpack = dataset.download

    def watched(self):
        with pytest.raises(Timeout):
            FileLock(folder.parent / ".lock").acquire(timeout=0)
        unpack(self)

    monkeypatch.setattr(CIFAR10, "download", watched)  # which CIFAR100 inherits
    monkeypatch.setattr(dataset, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    (_, labels), *_ = load_source(dataset.__name__.lower(), folder.parent)
    assert len(labels) == 200


@pytest.fixture
def folder(tmp_path):
    """Two classes, three images of different formats, modes and sizes each, and what systems leave beside them."""
    for path, shade in (("train/dark", 40), ("train/bright", 200), ("test/dark", 40), ("test/bright", 200)):
        (tmp_path / path).mkdir(parents=True)
        Image.new("RGB", (32, 32), (shade, 0, shade)).save(tmp_path / path / "a.png")
        Image.new("L", (100, 50), shade).save(tmp_path / path / "b.JPG")
        Image.new("1", (20, 40)).save(tmp_path / path / "c.bmp")
        (tmp_path / path / "Thumbs.db").touch()
    (tmp_path / "test" / ".DS_Store").touch()
    return tmp_path


def damage(path):
    path.write_bytes(path.read_bytes()[:50] + bytes(8) + path.read_bytes()[58:])


def test_folder_is_what_a_source_promises(folder):
    (images, labels), (test_images, _), class_names = load_source("folder", folder)
    assert (class_names, labels.tolist()) == (["bright", "dark"], [0, 0, 0, 1, 1, 1])
    assert (images.shape, images.dtype, labels.dtype) == ((6, 32, 32, 3), np.uint8, np.int64)
    assert (images[0] == (200, 0, 200)).all()
    assert abs(int(test_images[4, 5, 5, 0]) - 40) < 3  # dark/b.JPG
    assert load_source("folder", folder, size=64)[0][0].shape == (6, 64, 64, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "train").rename(folder / "training"), "DATA_DIR/train/CLASS/IMAGE"),
        (lambda folder: (folder / "test").rename(folder / "tests"), "--valid-split only divides train"),
        (lambda folder: (folder / "test/grey").mkdir(), "grey.+ both train and test"),
        (lambda folder: (folder / "test/grey").mkdir() or (folder / "train/grey").mkdir(), "grey is empty"),
        (lambda folder: os.truncate(folder / "test/dark/b.JPG", 300), "dark/b.JPG cannot be read as an image"),
        (lambda folder: damage(folder / "test/dark/a.png"), "dark/a.png cannot be read as an image"),
        (lambda folder: os.mkfifo(folder / "test/dark/pipe"), "dark/pipe cannot be read as an image .not a file"),
        (lambda folder: Image.new("F", (9, 9)).save(folder / "test/dark/f.tif"), "f.tif .+TIFF of mode F"),
    ],
)
def test_folder_that_is_no_dataset_is_refused_with_the_name_of_what_is_wrong(folder, change, words):
    change(folder)
    with pytest.raises(UsageError, match=f"^.+{words}.*$"):
        load_source("folder", folder)


def saved(path, pixels, mode=None, **options):
    """Write an image of the given pixels, and read it again."""
    Image.fromarray(pixels).convert(mode).save(path / "image.png", **options)
    return read_image(path / "image.png")


def test_image_of_the_right_size_keeps_its_pixels_and_is_turned_upright(tmp_path):
    pixels, exif = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    assert np.array_equal(saved(tmp_path, pixels), pixels)
    assert saved(tmp_path, np.arange(96, dtype=np.uint8)[:, None].repeat(32, axis=1))[-1].min() > 80  # not cut
    assert np.array_equal(saved(tmp_path, pixels, exif=exif), np.rot90(pixels, -1))
    exif[0x0128] = 2  # a unit, of a type that Pillow reads but cannot write
    odd = exif.tobytes().replace(b"\x01\x28\0\x03", b"\x01\x28\0\x01")
    assert np.array_equal(saved(tmp_path, pixels, exif=odd), np.rot90(pixels, -1))


def halves(upper, lower):
    """Pixels (32, 32, ...), each half alike."""
    return np.repeat([upper, lower], 512, axis=0).reshape(32, 32, *np.shape(upper))


def test_transparent_is_white_and_sixteen_bits_are_scaled_to_eight(tmp_path, capsys):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for upper, lower, options, seen in (
        (np.uint8([9, 9, 9, 0]), np.uint8([9, 9, 9, 255]), {}, 9),
        (np.uint8(0), np.uint8(200), {"mode": "P", "transparency": 0}, 200),
        (np.uint16(1), np.uint16(40_000), {"transparency": 1}, 156),
        (np.uint8([9] * 3), np.uint8([8] * 3), {"transparency": (9, 9, 9), "icc_profile": srgb}, 8),
    ):
        assert np.array_equal(saved(tmp_path, halves(upper, lower), **options), halves([255] * 3, [seen] * 3))
    assert capsys.readouterr().err == ""
    saved(tmp_path, np.full((32, 32), 4_000, dtype=np.uint16))
    assert "warning: a 16-bit image" in capsys.readouterr().err  # it will be nearly black


def test_colour_profile_is_applied_and_a_broken_one_or_broken_exif_data_are_ignored(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red, green = srgb.index(b"rXYZ") + 4, srgb.index(b"gXYZ") + 4  # where the table says where the colours are
    swapped = bytearray(srgb)
    swapped[red : red + 8], swapped[green : green + 8] = srgb[green : green + 8], srgb[red : red + 8]
    for profile, expected in ((srgb, pixels), (b"broken", pixels), (bytes(swapped), pixels[..., [1, 0, 2]])):
        assert np.abs(saved(tmp_path, pixels, icc_profile=profile).astype(int) - expected).max() <= 1
    Image.new("RGB", (32, 32), (200, 30, 60)).quantize(4).save(tmp_path / "palette.png", icc_profile=bytes(swapped))
    assert (np.abs(read_image(tmp_path / "palette.png").astype(int) - (30, 200, 60)) <= 1).all()
    assert np.array_equal(saved(tmp_path, pixels, exif=b"Exif\0\0MM\0*broken"), pixels)


def test_opacity_of_nought_everywhere_is_none_in_formats_whose_viewers_ignore_it(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    pixels[..., 3] = 0
    Image.fromarray(pixels).save(tmp_path / "image.tga")
    assert np.array_equal(read_image(tmp_path / "image.tga"), pixels[..., :3])
    assert (saved(tmp_path, pixels) == 255).all()  # PNG: nothing but transparent


def test_what_can_only_be_read_wrongly_is_refused_with_the_way_out(tmp_path):
    grey = Image.fromarray(np.full((8, 8), 9_000, dtype=np.uint16))
    grey.save(tmp_path / "negative.tif", tiffinfo={262: 0})  # white is zero
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    Image.new("RGB", (8, 8)).save(tmp_path / "program.jpg", format="EPS")
    names = {"negative.tif": "rare kind: save it as", "phone.heic": "pillow-heif: convert", "program.jpg": "EPS"}
    for name, words in names.items():
        with pytest.raises(UsageError, match=f"{name} cannot be read as an image .+{words}"):
            read_image(tmp_path / name)


def test_accents_may_be_written_in_either_way_but_not_in_both(folder):
    composed, apart = "caf\u00e9", "cafe\u0301"
    for part, name in (("train", apart), ("test", composed)):
        (folder / part / "dark").rename(folder / part / name)
    assert load_source("folder", folder)[2] == ["bright", composed]
    (folder / "train" / composed).mkdir()
    with pytest.raises(UsageError, match="two folders have one name"):
        load_source("folder", folder)


def test_all_files_that_cannot_be_read_are_named_at_once(folder):
    for number in range(12):
        (folder / f"test/dark/{number:02}.png").touch()
    with pytest.raises(UsageError, match=r"00\.png .+; .+09\.png cannot be read as an image .+; and 2 more$"):
        load_source("folder", folder)
