"""python -m tools.report RUN_DIR: report.md and its pictures."""

import os
import signal

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image
from torch import nn

from config import config
from dataset import ImageDataset, make_augmentation
from parts.images import draw_shapes
from tests.conftest import flags
from tools import report
from utils import load_checkpoint

PICTURES = {"curves.png", "confusion_matrix.png", "predictions.png", "misclassified.png", "augmentations.png"}
NAMES = [f"class {number}" for number in range(10)]
MEAN, STD = (0.5,) * 3, (0.25,) * 3


def shapes(names=NAMES, augmentation=None):
    """Thirty images, of the classes in turn."""
    images, labels = draw_shapes(30, np.random.default_rng(1))
    return ImageDataset(images, labels % len(names), names, MEAN, STD, augmentation)


def texts(figure):
    return {text.get_text() for text in figure.findobj(Text)}


def shown(figure):
    """What lies in each part of a figure that has any pictures, one above the other."""
    return [[image.get_array() for image in axes.images] for axes in figure.axes if axes.images]


def is_drawn(path):
    """Whether there is a picture with something on it."""
    return path.exists() and len(Image.open(path).convert("RGB").getcolors(maxcolors=10**7)) > 10


# --- the page ---


def test_report_has_the_figures_of_the_run_its_settings_and_pictures(copy_of_finished):
    for name in (*PICTURES, "report.md"):
        (copy_of_finished / name).unlink()
    report.main([str(copy_of_finished), "--device", "cpu"])
    page = (copy_of_finished / "report.md").read_text()
    last = load_checkpoint(copy_of_finished / "last.pt")["metrics"][-1]
    assert page.startswith(f"# folder: {last['valid_accuracy']:.2f} % of 50 test images\n")
    assert f"| 2 of 2 | {last['train_loss']:.4f} | {last['train_accuracy']:.2f} % | {last['valid_loss']:.4f} |" in page
    assert "\nbatch_size = 32\n" in page
    for name in PICTURES:
        assert f"]({name})" in page
        assert is_drawn(copy_of_finished / name)


def test_run_that_is_going_on_or_was_killed_has_a_report_too(cli, tiny, narrow, before, tmp_path):
    before("last.pt", lambda: os.kill(os.getpid(), signal.SIGTERM), nth=3)  # epoch 2 is not saved, but 0 and 1 are
    assert cli(*flags(tiny, run_dir="run")) == 143
    report.report("run")
    assert "\n| 1 of 2 | " in (tmp_path / "run" / "report.md").read_text()
    assert all(is_drawn(tmp_path / "run" / name) for name in PICTURES)


def test_picture_that_fails_is_one_line_and_the_others_are_drawn(copy_of_finished, monkeypatch, capsys):
    for name in PICTURES:
        (copy_of_finished / name).unlink()
    monkeypatch.setattr(report, "plot_confusions", lambda *args: [].index("a font\nthat is there"))
    report.report(copy_of_finished)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: confusion_matrix.png cannot be drawn (ValueError: ")
    assert {name for name in PICTURES if is_drawn(copy_of_finished / name)} == PICTURES - {"confusion_matrix.png"}


# --- the pictures ---


def test_curves_show_training_and_validation():
    row = {"learning_rate": 0.1, "train_loss": 3.0, "train_accuracy": 10.0, "valid_loss": 2.0, "valid_accuracy": 20.0}
    figure = report.plot_curves([{"epoch": 1, **row}, {"epoch": 2, **row, "valid_loss": 1.0}])
    lines = [[list(line.get_ydata()) for line in axes.lines] for axes in figure.axes]
    assert lines == [[[3, 3], [2, 1]], [[10, 10], [20, 20]], [[0.1, 0.1]]]
    assert texts(figure) >= {"train loss", "valid loss", "train accuracy", "valid accuracy", "learning rate", "Epoch"}


def test_confusions_are_counted_true_by_predicted():
    labels, predictions = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 0, 0, 2])
    counts = report.count_confusions(labels, predictions, 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [2, 0, 1]]
    assert texts(report.plot_confusions(counts, ["cat", "dog", "eel"])) >= {"cat  50.0 %", "dog  100.0 %", "eel  33.3 %"}


@pytest.mark.parametrize("names", [["$\\a$", "\udcff"], [f"rather long name {k}" for k in range(100)]], ids=repr)
def test_class_names_of_any_bytes_are_drawn_whole(names, net, tmp_path):
    figure = report.plot_confusions(torch.eye(len(names), dtype=torch.int64), names)
    figure.savefig(tmp_path / "confusions.png")
    assert {name.replace("\udcff", "\\udcff") for name in names} <= texts(figure)
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert (box.min >= 0).all()
        assert (box.max <= figure.bbox.max).all()
    images = shapes(names)
    report.plot_mistakes(net, images, torch.randn(30, len(names)).log_softmax(dim=1)).savefig(tmp_path / "mistakes.png")
    images.augmentation = make_augmentation(config, MEAN)
    report.plot_augmentations(images, count=2).savefig(tmp_path / "augmentations.png")


def test_mistakes_are_the_most_confident_first_each_beside_what_spoke_for_the_answer(net):
    images, chosen = shapes(), [12, 20, 3]
    wrong = (images.labels[chosen] + 1) % 10
    probabilities = torch.eye(10).repeat(3, 1).clamp(min=0.01)  # all others are right
    for index, confidence, prediction in zip(chosen, (0.9, 0.7, 0.6), wrong, strict=True):
        probabilities[index] = (1 - confidence) / 9
        probabilities[index, prediction] = confidence
    figure = report.plot_mistakes(net, images, probabilities.log())
    assert "Mistakes: 3 in 30 images" in " ".join(texts(figure))
    titles = [title for axes in figure.axes if (title := axes.get_title(loc="left"))]
    assert titles == [f"class {(index + 1) % 10} {percent} %\ntrue: class {index % 10}"
                      for index, percent in zip(chosen, (90, 70, 60), strict=True)]  # fmt: skip
    for index, heat, (above, *below) in zip(
        chosen, report.explain(net, images[chosen][0], wrong), shown(figure)[1::2], strict=True
    ):
        ...


class RedOrGreen(nn.Module):
    """Answers 0 for red images, 1 for green ones."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 2, kernel_size=4, stride=4, bias=False)])
        weight = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]])
        self.blocks[0].weight.data = weight[:, :, None, None].expand(2, 3, 4, 4).contiguous()

    def forward(self, x):
        return self.blocks[0](x).mean(dim=(2, 3)).log_softmax(dim=1)


def test_heat_maps_lie_between_0_and_1_where_an_image_speaks_for_the_class():
    image = torch.zeros(3, 32, 32)
    image[0, :12, :12] = 1
    image[1, 20:, 20:] = 0.1
    for net in (RedOrGreen(),):
        red, green = report.explain(net, torch.stack([image, image]), torch.tensor([0, 1]))
        print(red[::4, ::4], green[::4, ::4])


def test_network_without_blocks_has_pictures_without_heat_maps(net):
    other, log_probs = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)), torch.eye(10).repeat(3, 1).log_softmax(1)
    for network, layers in ((net, [1, 2, 1, 2]), (other, [1, 1])):
        figure = report.plot_predictions(network, shapes(), log_probs, range(2), "Two images")
        assert [len(pictures) for pictures in shown(figure)] == layers
        assert texts(figure) >= {"class 0 23 %\ntrue: class 0", "class 1 23 %\ntrue: class 1"}


def test_no_mistake_is_a_picture_too(net, tmp_path):
    figure = report.plot_mistakes(net, shapes(), torch.eye(10).repeat(3, 1).log_softmax(dim=1))
    assert "Mistakes: 0 in 30 images" in " ".join(texts(figure))
    figure.savefig(tmp_path / "none.png")


def test_augmentations_are_those_that_the_epochs_train_on():
    images = shapes(augmentation=make_augmentation(config, MEAN))
    row = [picture for (picture,) in shown(report.plot_augmentations(images, count=2))[10:]]
    assert np.array_equal(row[0], images.images[1])  # the first of class 1
    for epoch in range(1, 10):
        seen = images[epoch, [1]][0][0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(row[epoch] / 255, seen * STD + MEAN, atol=1e-5)
