"""python -m tools.predict, and predict(checkpoint, images) in a notebook."""

import numpy as np
import pytest
import torch
from PIL import Image

from config import UsageError
from parts.images import SHAPES, draw_shapes
from tests.conftest import ROOT
from tools import predict as tool
from tools.evaluate import load_network
from tools.predict import predict


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def test_trained_weights_recognize_shapes_that_they_have_never_seen():
    images, labels = draw_shapes(50, np.random.default_rng(7))
    names = [prediction.class_name for prediction in predict(ROOT / "weights" / "shapes.pt", images)]
    assert sum(name == list(SHAPES)[label] for name, label in zip(names, labels, strict=True)) >= 48


def test_probabilities_are_the_networks_of_the_pixels_normalized_as_in_the_training(finished, pixels):
    net, checkpoint = load_network(finished)
    image = (torch.from_numpy(pixels) / 255 - torch.tensor(checkpoint["mean"])) / torch.tensor(checkpoint["std"])
    with torch.no_grad():
        expected = dict(
            zip(checkpoint["class_names"], net(image.permute(2, 0, 1)[None]).exp()[0].tolist(), strict=True)
        )
    (prediction,) = predict(finished, [pixels])
    assert prediction.probabilities == pytest.approx(expected, abs=1e-5)
    likeliest_first = sorted(prediction.probabilities.items(), key=lambda item: -item[1])
    assert list(prediction.probabilities.items()) == likeliest_first
    assert (prediction.class_name, prediction.probability) == likeliest_first[0]


def test_same_pixels_get_the_same_answer_from_a_file_from_pil_and_from_an_array(finished, pixels, tmp_path):
    path, image = tmp_path / "image.png", Image.fromarray(pixels)
    image.save(path)
    predictions = predict(finished, [path, str(path), image, pixels])
    assert predictions == [predictions[0]] * 4
    assert predict(finished / "last.pt", np.stack([pixels] * 4)) == predictions
    assert predict(finished, [pixels[::-1]]) != predictions[:1]
    assert predict(finished, []) == []


def test_an_image_may_have_any_size(finished, pixels):
    large = np.repeat(np.repeat(pixels, 3, axis=0), 2, axis=1)
    of_pil, of_array = predict(finished, [Image.fromarray(large), large])
    assert of_pil == of_array


@pytest.mark.parametrize(
    "spoil",
    [
        lambda pixels: pixels / 255,
        lambda pixels: pixels[:, :, :2],
        lambda pixels: pixels[:, :, 0],
        lambda pixels: pixels[:0],
        lambda pixels: torch.from_numpy(pixels),
        lambda pixels: None,
    ],
    ids=["not uint8", "two channels", "no channels", "empty", "tensor", "nothing"],
)
def test_what_is_no_image_is_refused_in_one_line_that_says_what_is(finished, pixels, spoil):
    with pytest.raises(UsageError, match=r"^an image is a file's path, a PIL image, or an RGB array .*; not .+$"):
        predict(finished, [pixels, spoil(pixels)])


@pytest.mark.parametrize("wrap", [Image.fromarray, np.asarray, lambda pixels: "image.png"])
def test_one_image_is_no_list_of_images(finished, pixels, wrap):
    with pytest.raises(UsageError, match="must be a list of images"):
        predict(finished, wrap(pixels))


def test_picture_that_pil_has_opened_but_cannot_decode_is_refused(finished, pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1000])
    with pytest.raises(UsageError, match="cannot be read as an image"), Image.open(tmp_path / "cut.png") as image:
        predict(finished, [image])


def test_command_prints_the_three_likeliest_classes_of_each_image(finished, pictures, capsys):
    images = sorted(pictures.glob("test/*/*.png"))[:2]
    tool.main([str(finished), *map(str, images)])
    lines = capsys.readouterr().out.splitlines()
    for image, line, prediction in zip(images, lines, predict(finished, images), strict=True):
        three = list(prediction.probabilities.items())[:3]
        assert line == f"{image}: {', '.join(f'{name} {100 * part:.1f} %' for name, part in three)}"
