import numpy as np
import pytest
import torch
from PIL import Image

from checkpoint import load_checkpoint, save_checkpoint
from dataset import make_normalization
from model import Net
from predict import Mirrored, load_network, predict
from sources import DataError

NAMES = ["cat", "dog", "eel"]


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "some.pt"
    content = {"model": Net(num_classes=3).state_dict(), "class_names": NAMES, "config": {}}
    save_checkpoint(path, {**content, "mean": (0.2, 0.3, 0.4), "std": (0.1, 0.2, 0.3)})
    return path


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def test_probabilities_are_the_networks_with_its_own_normalization(checkpoint, pixels):
    net, _ = load_network(checkpoint)
    with torch.no_grad():
        expected = net(make_normalization((0.2, 0.3, 0.4), (0.1, 0.2, 0.3))(images=pixels[None])["images"]).exp()[0]
    (prediction,) = predict(checkpoint, [pixels])
    assert [prediction.probabilities[name] for name in NAMES] == pytest.approx(expected.tolist())
    assert prediction.class_name == NAMES[expected.argmax()]
    assert prediction.probability == max(prediction.probabilities.values())
    assert list(prediction.probabilities.values()) == sorted(prediction.probabilities.values(), reverse=True)


def test_path_array_and_pil_image_are_the_same(checkpoint, pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "image.png")
    images = [tmp_path / "image.png", str(tmp_path / "image.png"), pixels, Image.fromarray(pixels)]
    predictions = predict(checkpoint, images)
    for prediction in predictions:
        assert prediction.probabilities == pytest.approx(predictions[0].probabilities)
    assert predict(checkpoint, np.stack([pixels, pixels]))[1].class_name == predictions[0].class_name
    assert predict(checkpoint, []) == []


def test_wrong_images_are_refused(checkpoint, pixels, tmp_path):
    for images in ("image.png", pixels, Image.fromarray(pixels)):
        with pytest.raises(TypeError, match="must be a list of images"):
            predict(checkpoint, images)
    for array in (pixels / 255, pixels[:, :, :2], pixels[0, 0]):
        with pytest.raises(ValueError, match=r"must be \(H, W, 3\) or \(H, W\) uint8"):
            predict(checkpoint, [array])
    with pytest.raises(DataError, match="nowhere"):
        predict(checkpoint, [tmp_path / "nowhere.png"])


def test_command_line_prints_a_line_for_each_image(s8, checkpoint, pixels, capsys):
    Image.fromarray(pixels).save("a.png")
    Image.fromarray(pixels).save("b.png")
    assert s8("--evaluate", str(checkpoint), "--predict", "a.png", "b.png", report=True) == 0
    lines = capsys.readouterr().out.splitlines()
    (prediction,) = predict(checkpoint, ["a.png"])
    first = f"{prediction.class_name} {100 * prediction.probability:.1f} %"
    assert [line.split(", ")[0] for line in lines] == [f"a.png: {first}", f"b.png: {first}"]


def test_image_that_cannot_be_read_is_refused(s8, checkpoint, refusal):
    assert s8("--evaluate", str(checkpoint), "--predict", "nowhere.png", report=True) == 2
    assert "nowhere.png cannot be read as an image (No such file or directory)" in refusal()


def test_network_follows_the_checkpoints_classes(checkpoint):
    net, content = load_network(checkpoint)
    assert net.classifier.out_channels == 3
    assert content["class_names"] == NAMES
    assert all(
        torch.equal(net.state_dict()[name], tensor) for name, tensor in load_checkpoint(checkpoint)["model"].items()
    )


def test_mirrored_averages_probabilities(pixels):
    torch.manual_seed(0)
    net = Net().eval()
    images = make_normalization((0.5,) * 3, (0.25,) * 3)(images=pixels[None])["images"]
    with torch.no_grad():
        expected = (net(images).exp() + net(images.flip(3)).exp()) / 2
        torch.testing.assert_close(Mirrored(net)(images).exp(), expected)
        torch.testing.assert_close(Mirrored(net)(images), Mirrored(net)(images.flip(3)))
