"""python -m tools.predict, and predict(checkpoint, images) in a notebook."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from config import UsageError
from tools.evaluate import load_network
from tools.predict import main, predict


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def test_probabilities_are_the_networks_of_the_pixels_normalized_as_in_the_training(finished, pixels):
    net, checkpoint = load_network(finished)
    image = (torch.from_numpy(pixels) / 255 - torch.tensor(checkpoint["mean"])) / torch.tensor(checkpoint["std"])
    with torch.no_grad():
        probabilities = net(image.permute(2, 0, 1)[None]).exp()[0].tolist()
    expected = dict(zip(checkpoint["class_names"], probabilities, strict=True))
    (prediction,) = predict(finished, [pixels])
    assert prediction.probabilities == pytest.approx(expected, abs=1e-5)
    assert list(prediction.probabilities) == sorted(expected, key=expected.get, reverse=True)  # the likeliest first
    assert (prediction.class_name, prediction.probability) == next(iter(prediction.probabilities.items()))


def test_same_pixels_get_the_same_answer_from_a_file_from_pil_and_from_an_array_of_any_size(finished, pixels, tmp_path):
    for array in (pixels, np.repeat(np.repeat(pixels, 3, axis=0), 2, axis=1)):
        path, image = tmp_path / "image.png", Image.fromarray(array)
        image.save(path)
        predictions = predict(finished, [path, str(path), image, array])
        assert predictions == [predictions[0]] * 4
        assert predict(finished, np.stack([array] * 4)) == predictions
        assert predict(finished, [array[::-1]]) != predictions[:1]


def test_what_is_no_list_of_images_is_refused_in_one_line(finished, pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:1000])
    wrong = [pixels / 255, pixels[:, :, :2], pixels[:, :, 0], pixels[:0], torch.from_numpy(pixels), None]
    wrong += [tmp_path / "cut.png", Image.open(tmp_path / "cut.png")]
    for images in (pixels, Image.fromarray(pixels), "image.png", *([pixels, image] for image in wrong)):
        with pytest.raises(UsageError) as error:
            predict(finished, images)
        assert "\n" not in str(error.value)


def test_command_prints_three_classes_of_each_image_though_one_cannot_be_read(finished, pictures, tmp_path, capsys):
    bars = Path(shutil.copytree(pictures / "test" / "bar", tmp_path / "some" / "bar"))
    shutil.copytree(bars, tmp_path / "some" / ".hidden")
    for name in ("a.png", "Thumbs.db"):
        (tmp_path / "some" / name).touch()
    (tmp_path / "some" / "link").symlink_to(bars)  # could lead round in a circle, so it is not followed, but told
    with pytest.raises(UsageError, match="2 of 7 images cannot be read"):
        main([str(finished), str(tmp_path / "some")])
    (out, err), images = capsys.readouterr(), sorted(bars.iterdir())
    for image, line, prediction in zip(images, out.splitlines(), predict(finished, images), strict=True):
        three = list(prediction.probabilities.items())[:3]
        assert line == f"{image}: {', '.join(f'{name} {100 * part:.1f} %' for name, part in three)}"
    assert "a.png cannot be read as an image" in err
    assert "link cannot be read as an image (Is a directory)" in err
