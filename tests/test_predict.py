import numpy as np
import pytest
import torch
from extras.predict import load_network, predict
from PIL import Image

from config import UsageError
from dataset import ImageDataset
from model import Net
from tests.conftest import ROOT, equal
from utils import load_checkpoint, save_checkpoint

NAMES, MEAN, STD = ["cat", "dog", "eel"], (0.2, 0.3, 0.4), (0.1, 0.2, 0.3)


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "some.pt"
    net = Net(num_classes=3)
    for layer in net.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    net(torch.randn(32, 3, 32, 32))  # without averages of some images, it would say the same of every image
    save_checkpoint(path, {"model": net.state_dict(), "class_names": NAMES, "mean": MEAN, "std": STD})
    return path


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def test_network_is_the_checkpoints(checkpoint):
    before = torch.random.get_rng_state()
    net, content = load_network(checkpoint)
    assert torch.equal(torch.random.get_rng_state(), before)  # a notebook's random numbers go on as they would
    assert (content["class_names"], net.training) == (NAMES, False)
    assert equal(dict(net.state_dict()), dict(load_checkpoint(checkpoint)["model"]))


def test_probabilities_are_the_networks_with_its_own_normalization(checkpoint, pixels):
    net, _ = load_network(checkpoint)
    image, _ = ImageDataset(pixels[None], np.array([0]), NAMES, MEAN, STD)[0]
    with torch.no_grad():
        expected = net(image[None]).exp()[0]
    (prediction,) = predict(checkpoint, [pixels])
    assert [prediction.probabilities[name] for name in NAMES] == pytest.approx(expected.tolist())
    likeliest_first = sorted(prediction.probabilities.items(), key=lambda item: -item[1])
    assert list(prediction.probabilities.items()) == likeliest_first
    assert (prediction.class_name, prediction.probability) == likeliest_first[0]


def test_an_image_may_be_a_path_an_array_a_tensor_or_of_pil(checkpoint, pixels, tmp_path):
    path, image, tensor = tmp_path / "image.png", Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1)
    image.save(path)
    predictions = predict(checkpoint, [path, str(path), image, pixels, tensor, tensor / 255])
    assert predictions == [predictions[0]] * 6
    for images in (np.stack([pixels] * 6), torch.stack([tensor] * 6)):
        assert predict(checkpoint, images) == predictions
    assert predict(checkpoint, []) == []


def test_an_image_may_have_any_size_and_no_colours(checkpoint, pixels):
    large, grey = np.repeat(np.repeat(pixels, 3, axis=0), 2, axis=1), pixels[:, :, 0]
    predictions = predict(checkpoint, [Image.fromarray(large), large, grey, np.stack([grey] * 3, axis=2)])
    assert predictions[0] == predictions[1]
    assert predictions[2] == predictions[3]


@pytest.mark.parametrize("wrap", [Image.fromarray, np.asarray, torch.from_numpy, lambda pixels: "image.png"])
def test_one_image_is_no_list_of_images(checkpoint, pixels, wrap):
    with pytest.raises(UsageError, match="must be a list of images"):
        predict(checkpoint, wrap(pixels))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda pixels: pixels / 255,
        lambda pixels: pixels[:, :, :2],
        lambda pixels: pixels[0, 0],
        lambda pixels: pixels[:0],
        lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1,
        lambda pixels: None,
    ],
)
def test_what_is_no_image_is_refused_with_what_one_may_be(checkpoint, pixels, spoil):
    with pytest.raises(UsageError, match=r"an image is a file's path, .*; not \w+"):
        predict(checkpoint, [pixels, spoil(pixels)])


def test_pil_image_of_a_damaged_file_is_refused(checkpoint, pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1000])
    with pytest.raises(UsageError, match=r"^PngImageFile cannot be read as an image \("):
        predict(checkpoint, [Image.open(tmp_path / "cut.png")])


def test_command_line_prints_the_three_likeliest_of_each_image(cli, finished, pictures, capsys):
    images = sorted(pictures.glob("test/*/*.png"))[:2]
    assert cli("--evaluate", finished, "--predict", *images) == 0
    lines = capsys.readouterr().out.splitlines()
    for image, line, prediction in zip(images, lines, predict(finished / "last.pt", images), strict=True):
        three = list(prediction.probabilities.items())[:3]
        assert line == f"{image}: {', '.join(f'{name} {100 * part:.1f} %' for name, part in three)}"


def test_weights_of_cifar10_are_asked_if_no_checkpoint_is_named(cli, pixels, capsys):
    Image.fromarray(pixels).save("a.png")
    assert cli("--predict", "a.png") == 0
    (prediction,) = predict(ROOT / "weights" / "cifar10.pt", [pixels])
    assert {"cat", "dog", "frog"} < prediction.probabilities.keys()
    assert capsys.readouterr().out.startswith(f"a.png: {prediction.class_name} ")
