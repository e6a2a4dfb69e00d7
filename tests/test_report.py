import errno
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch import nn

from config import config
from dataset import ImageDataset, make_augmentation
from extras import report
from extras.sources import draw_shapes
from model import Net
from tests.conftest import flags
from utils import load_checkpoint, save_checkpoint

PICTURES = {"curves.png", "confusion_matrix.png", "predictions.png", "misclassified.png", "augmentations.png"}
NAMES = [f"class {number}" for number in range(10)]
MEAN, STD = (0.5,) * 3, (0.25,) * 3


@pytest.fixture
def shapes():
    return draw_shapes(30, np.random.default_rng(1))


@pytest.fixture
def test_images(shapes):
    return ImageDataset(*shapes, NAMES, MEAN, STD)


@pytest.fixture
def train_images(shapes):
    return ImageDataset(*shapes, NAMES, MEAN, STD, make_augmentation(config, MEAN), seed=3)


def texts(figure):
    return {text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))}


def images_of(axes):
    return [image.get_array() for image in axes.images]


# --- the page ---


def test_run_ends_with_a_report_and_any_checkpoint_gets_the_same(cli, finished, capsys):
    page = (finished / "report.md").read_text()
    last = load_checkpoint(finished / "last.pt")["metrics"][-1]
    assert page.startswith(f"# folder: {last['valid_accuracy']:.2f} % of 50 test images\n")
    assert f"| 2 of 2 | {last['train_loss']:.4f} | {last['train_accuracy']:.2f} % | {last['valid_loss']:.4f} |" in page
    assert "\nlearning_rate = 0.02\n" in page
    for name in PICTURES:
        assert f"]({name})" in page
        with Image.open(finished / name) as picture:
            assert picture.format == "PNG"
            assert len(picture.convert("RGB").getcolors(maxcolors=10**7)) > 10
    os.mkdir("elsewhere")
    os.link(finished / "last.pt", "elsewhere/last.pt")
    assert cli("--evaluate", "elsewhere/last.pt") == 0
    assert "elsewhere/report.md" in capsys.readouterr().out
    assert {*os.listdir("elsewhere")} == {*PICTURES, "report.md", "last.pt"}
    assert Path("elsewhere/report.md").read_text() == page


def test_without_report_there_is_none_and_matplotlib_stays_away(cli, tiny, narrow, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "extras.report", None)  # makes its import fail
    assert cli(*flags(tiny, run_dir="run"), "--no-report") == 0
    assert cli("--evaluate", "run", "--no-report") == 0
    assert capsys.readouterr().err == ""
    assert {*os.listdir("run")} == {".lock", "config.json", "last.pt", "best.pt", "metrics.csv"}


def test_curves_are_there_after_the_first_epoch(cli, tiny, narrow, before):
    def full_disk():
        raise OSError(errno.ENOSPC, "No space left on device")

    before("last.pt", full_disk, nth=2)  # ends the run at the second epoch, before its report
    assert cli(*flags(tiny, run_dir="run")) == 1
    assert PICTURES & {*os.listdir("run")} == {"curves.png"}


def test_picture_that_cannot_be_drawn_is_a_warning(cli, tiny, narrow, monkeypatch, capsys):
    monkeypatch.setattr(Figure, "savefig", lambda *args, **options: "".index("no font"))
    assert cli(*flags(tiny, run_dir="run")) == 0
    why = "cannot be drawn (ValueError: substring not found)"
    assert capsys.readouterr().err.splitlines() == [
        f"train.py: warning: the {part} {why}" for part in ("curves", "report")
    ]


# --- curves ---


ROWS = [
    {"epoch": epoch, "learning_rate": 1 / epoch, "train_loss": 3 / epoch, "valid_loss": 2 / epoch}
    | {"train_accuracy": 10.0 * epoch, "valid_accuracy": 20.0 * epoch}
    for epoch in (1, 2, 3)
]


def test_curves_show_both_splits():
    figure = report.plot_curves(ROWS)
    lines = [[list(line.get_ydata()) for line in axes.lines] for axes in figure.axes]
    column = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    assert lines[0] == [column["train_loss"], column["valid_loss"]]
    assert lines[1] == [column["train_accuracy"], column["valid_accuracy"]]
    assert lines[2] == [column["learning_rate"]]
    assert texts(figure) >= {"train loss", "valid loss", "train accuracy", "valid accuracy", "learning rate", "Epoch"}


OTHER = [{**ROWS[0], "valid_loss": 9.0}, *ROWS[1:]]


@pytest.mark.parametrize(("last", "expected"), [(ROWS, ROWS), (OTHER, ROWS[:1]), (None, ROWS[:1])])
def test_curves_are_of_the_checkpoints_own_run_as_far_as_it_went(tmp_path, shapes, last, expected):
    if last:
        save_checkpoint(tmp_path / "last.pt", {"metrics": last})
    else:
        (tmp_path / "last.pt").write_bytes(b"damaged")
    checkpoint = {"config": {"dataset": "shapes", "epochs": 3}, "epoch": 1, "metrics": ROWS[:1]}
    two = ImageDataset(*shapes.select(shapes.labels < 2), NAMES[:2], MEAN, STD)
    report.write_report(tmp_path, Net(), checkpoint, two, two, torch.eye(2).repeat(3, 1).log())
    drawn = (tmp_path / "curves.png").read_bytes()
    report.save_figure(report.plot_curves(expected), tmp_path / "curves.png")
    assert drawn == (tmp_path / "curves.png").read_bytes()


# --- confusions ---


def test_confusions_are_counted_true_by_predicted():
    labels, predictions = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 0, 0, 2])
    counts = report.count_confusions(labels, predictions, 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [2, 0, 1]]
    shown = texts(report.plot_confusions(counts, ["cat", "dog", "eel"]))
    assert shown >= {"cat", "dog", "eel", "cat  50.0 %", "dog  100.0 %", "eel  33.3 %"}


@pytest.mark.parametrize(
    "names",
    [[f"rather long name {k}" for k in range(2)], [f"rather long name {k}" for k in range(100)], ["$\\a$", "\udcff"]],
    ids=["few", "many", "strange"],
)
def test_any_classes_are_drawn_with_no_label_cut(names, tmp_path):
    figure = report.plot_confusions(torch.eye(len(names), dtype=torch.int64), names)
    report.save_figure(figure, tmp_path / "picture.png")
    assert {name.replace("\udcff", "\\udcff") for name in names} <= texts(figure)
    width, height = figure.get_size_inches() * figure.dpi
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= width
        assert box.y1 <= height


# --- mistakes ---


def test_mistakes_are_the_most_confident_first_and_the_prediction_is_explained(test_images):
    labels = test_images.labels
    probabilities = torch.full((30, 10), 0.01)
    probabilities[range(30), labels] = 0.91
    for index, confidence in ((3, 0.6), (12, 0.9), (20, 0.7)):
        probabilities[index] = (1 - confidence) / 9
        probabilities[index, (labels[index] + 1) % 10] = confidence
    torch.manual_seed(0)
    net, chosen = Net(), [12, 20, 3]
    figure = report.plot_mistakes(net, test_images, probabilities.log())
    assert "Mistakes: 3 in 30 images" in " ".join(texts(figure))
    wrong = (labels[chosen] + 1) % 10
    assert [title for axes in figure.axes if (title := axes.get_title(loc="left"))] == [
        f"class {predicted} {confidence} %\ntrue: class {label}"
        for predicted, confidence, label in zip(wrong, (90, 70, 60), labels[chosen], strict=True)
    ]
    images, maps = (
        test_images.images.numpy()[chosen],
        report.explain(net, torch.stack([test_images[i][0] for i in chosen]), wrong),
    )
    shown = [images_of(axes) for axes in figure.axes if axes.images]
    for number in range(3):
        (alone,), (below, above) = shown[2 * number : 2 * number + 2]
        assert np.array_equal(alone, images[number])
        assert np.array_equal(below, images[number])
        np.testing.assert_allclose(above, maps[number], atol=1e-5)


def test_right_and_wrong_answers_look_different(test_images):
    log_probs = torch.eye(10)[[0, 1, 9]].repeat(10, 1).log_softmax(dim=1)  # labels are 0, 1, 2, ...
    figure = report.plot_predictions(Net(), test_images, log_probs, range(3), "Three images")
    shown = [text for text in figure.findobj(Text) if "true" in text.get_text()]
    assert [title.get_text() for title in shown] == [f"class {k} 23 %\ntrue: class {min(k, 2)}" for k in (0, 1, 9)]
    assert [title.get_color() for title in shown] == ["black", "black", "firebrick"]


def test_no_mistake_is_a_picture_too(test_images, tmp_path):
    figure = report.plot_mistakes(Net(), test_images, torch.eye(10).repeat(3, 1).log_softmax(dim=1))
    assert "Mistakes: 0 in 30 images" in " ".join(texts(figure))
    report.save_figure(figure, tmp_path / "none.png")
    assert os.listdir(tmp_path) == ["none.png"]


def redness_and_greenness(*layers):
    """A network of these layers and two classes, each of which speaks against the other."""
    contrast = nn.Linear(3, 2)
    contrast.weight.data = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]])
    return nn.Sequential(nn.AvgPool2d(4), *layers, contrast)


@pytest.mark.parametrize(
    "net",
    [
        redness_and_greenness(nn.ReLU(), nn.Dropout2d(0.5), nn.AvgPool2d(8), nn.Flatten()),
        redness_and_greenness(nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1)), nn.Flatten()),
    ],
    ids=["flat", "nested"],
)
def test_explanation_is_where_the_class_is_seen_in_any_network(net):
    image = torch.zeros(3, 32, 32)
    image[0, :12, :12] = 1
    image[1, 20:, 20:] = 0.1
    red, green = report.explain(net, torch.stack([image, image]), torch.tensor([0, 1]))
    for seen, unseen, part in ((red, green, slice(2, 8)), (green, red, slice(24, 30))):
        assert seen.shape == (32, 32)
        torch.testing.assert_close(seen[part, part], torch.ones(6, 6))
        assert not unseen[part, part].any()


class Turned(nn.Module):
    """Mirrors its images, and says so beside them: what a module returns need not be a tensor."""

    def forward(self, x):
        return x.flip(3), "mirrored"


class TurnedNet(nn.Module):
    """Tells by redness, of mirrored images."""

    def __init__(self):
        super().__init__()
        self.first, self.turned, self.last = nn.AvgPool2d(4), Turned(), nn.ReLU()

    def forward(self, x):
        x, _ = self.turned(self.first(x))
        return self.last(x).mean(dim=(2, 3))


def test_explanation_is_by_the_last_layer_whatever_others_return():
    image = torch.zeros(1, 3, 32, 32)
    image[0, 0, :12, :12] = 1
    (seen,) = report.explain(TurnedNet(), image, torch.tensor([0]))
    assert seen[2:8, 24:30].min() == 1
    assert not seen[:, :8].any()


def test_network_without_an_image_inside_explains_nothing():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    assert not report.explain(net, torch.randn(2, 3, 32, 32), torch.tensor([0, 1])).any()


# --- augmentations ---


def test_augmentations_are_those_of_the_training(train_images):
    figure = report.plot_augmentations(train_images, count=2)
    index = int((train_images.labels == 1).nonzero()[0])
    row = [images_of(axes)[0] for axes in figure.axes[10:20]]
    assert np.array_equal(row[0], train_images.images[index])
    for epoch in range(1, 10):
        train_images.set_epoch(epoch)
        seen = train_images[index][0].permute(1, 2, 0).numpy()  # what that epoch trains on
        np.testing.assert_allclose(row[epoch] / 255, seen * STD + MEAN, atol=1e-5)
