import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from extras import report
from extras.sources import draw_shapes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch import nn

from config import config
from dataset import ImageDataset, make_augmentation
from model import Net
from tests.conftest import flags
from utils import load_checkpoint, save_checkpoint

PICTURES = {"curves.png", "confusion_matrix.png", "predictions.png", "misclassified.png", "augmentations.png"}
NAMES = [f"class {number}" for number in range(10)]
MEAN, STD = (0.5,) * 3, (0.25,) * 3


def shapes(count=30, augmentation=None):
    """So many images, of the ten classes in turn."""
    return ImageDataset(*draw_shapes(count, np.random.default_rng(1)), NAMES[:count], MEAN, STD, augmentation)


def texts(figure):
    return {text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))}


def pictures_in(figure):
    """For each part that has any, what lies there, one above the other."""
    return [[image.get_array() for image in axes.images] for axes in figure.axes if axes.images]


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
    assert cli("--evaluate", "elsewhere/last.pt", "--precision", "float32") == 0  # as it was trained
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
    before("last.pt", lambda: os.kill(os.getpid(), signal.SIGTERM), nth=2)  # at the second epoch's end
    assert cli(*flags(tiny, run_dir="run")) == 143
    assert PICTURES & {*os.listdir("run")} == {"curves.png"}


def test_picture_that_cannot_be_drawn_is_a_warning(cli, tiny, narrow, monkeypatch, capsys):
    monkeypatch.setattr(Figure, "savefig", lambda *args, **options: "".index("no font"))
    assert cli(*flags(tiny, run_dir="run")) == 0
    why = "cannot be drawn (ValueError: substring not found)"
    warnings = capsys.readouterr().err.splitlines()
    assert sorted(warnings) == sorted(f"train.py: warning: {picture} {why}" for picture in PICTURES)
    assert {*os.listdir("run")} == {".lock", "config.json", "last.pt", "best.pt", "metrics.csv", "report.md"}


# --- curves ---


ROWS = [
    {"epoch": epoch, "learning_rate": 1 / epoch, "train_loss": 3 / epoch, "valid_loss": 2 / epoch}
    | {"train_accuracy": 10.0 * epoch, "valid_accuracy": 20.0 * epoch}
    for epoch in (1, 2, 3)
]


def test_curves_show_both_splits():
    figure = report.plot_curves(ROWS)
    lines = [[list(line.get_ydata()) for line in axes.lines] for axes in figure.axes]
    assert lines == [[[3, 1.5, 1], [2, 1, 2 / 3]], [[10, 20, 30], [20, 40, 60]], [[1, 1 / 2, 1 / 3]]]
    assert texts(figure) >= {"train loss", "valid loss", "train accuracy", "valid accuracy", "learning rate", "Epoch"}


OTHER = [{**ROWS[0], "valid_loss": 9.0}, *ROWS[1:]]


@pytest.mark.parametrize(("last", "expected"), [(ROWS, ROWS), (OTHER, ROWS[:1]), (None, ROWS[:1])])
def test_curves_are_of_the_checkpoints_own_run_as_far_as_it_went(tmp_path, last, expected):
    save_checkpoint(tmp_path / "last.pt", {"metrics": last})
    if last is None:
        (tmp_path / "last.pt").write_bytes(b"damaged")
    checkpoint = {"config": {"dataset": "shapes", "epochs": 3}, "epoch": 1, "metrics": ROWS[:1]}
    report.write_report(tmp_path, Net(), checkpoint, shapes(2), shapes(2), torch.eye(2).log())
    drawn = (tmp_path / "curves.png").read_bytes()
    report.save_figure(report.plot_curves(expected), tmp_path / "curves.png")
    assert drawn == (tmp_path / "curves.png").read_bytes()


# --- confusions ---


def test_confusions_are_counted_true_by_predicted():
    labels, predictions = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 0, 0, 2])
    counts = report.count_confusions(labels, predictions, 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [2, 0, 1]]
    shown = texts(report.plot_confusions(counts, ["cat", "dog", "eel"]))
    assert shown >= {"cat", "dog", "eel", "1", "2", "cat  50.0 %", "dog  100.0 %", "eel  33.3 %"}


@pytest.mark.parametrize(
    "names",
    [[f"rather long name {k}" for k in range(2)], [f"rather long name {k}" for k in range(100)], ["$\\a$", "\udcff"]],
    ids=["few", "many", "strange"],
)
def test_any_classes_are_drawn_with_no_label_cut(names, tmp_path):
    figure = report.plot_confusions(torch.eye(len(names), dtype=torch.int64), names)
    report.save_figure(figure, tmp_path / "picture.png")
    assert {name.replace("\udcff", "\\udcff") for name in names} <= texts(figure)
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert (box.min >= 0).all()
        assert (box.max <= figure.bbox.max).all()


# --- mistakes ---


def test_mistakes_are_the_most_confident_first_and_the_prediction_is_explained():
    torch.manual_seed(0)
    images, net, chosen = shapes(), Net(), [12, 20, 3]
    wrong = (images.labels[chosen] + 1) % 10
    probabilities = torch.eye(10).repeat(3, 1).clamp(min=0.01)  # of the labels 0 to 9, three times
    for index, confidence, prediction in zip(chosen, (0.9, 0.7, 0.6), wrong, strict=True):
        probabilities[index] = (1 - confidence) / 9
        probabilities[index, prediction] = confidence
    figure = report.plot_mistakes(net, images, probabilities.log())
    assert "Mistakes: 3 in 30 images" in " ".join(texts(figure))
    assert [title for axes in figure.axes if (title := axes.get_title(loc="left"))] == [
        f"class {prediction} {percent} %\ntrue: class {label}"
        for prediction, percent, label in zip(wrong, (90, 70, 60), images.labels[chosen], strict=True)
    ]
    maps, shown = report.explain(net, torch.stack([images[i][0] for i in chosen]), wrong), pictures_in(figure)
    for index, heat, (alone,), (below, above) in zip(chosen, maps, shown[::2], shown[1::2], strict=True):
        assert np.array_equal(alone, images.images[index])
        assert np.array_equal(below, images.images[index])
        np.testing.assert_allclose(above, heat, atol=1e-5)


def test_right_and_wrong_answers_look_different():
    log_probs = torch.eye(10)[[0, 1, 9]].repeat(10, 1).log_softmax(dim=1)  # labels are 0, 1, 2, ...
    figure = report.plot_predictions(Net(), shapes(), log_probs, range(3), "Three images")
    shown = [text for text in figure.findobj(Text) if "true" in text.get_text()]
    assert [title.get_text() for title in shown] == [f"class {k} 23 %\ntrue: class {min(k, 2)}" for k in (0, 1, 9)]
    assert [title.get_color() for title in shown] == ["black", "black", "firebrick"]


def test_no_mistake_is_a_picture_too(tmp_path):
    figure = report.plot_mistakes(Net(), shapes(), torch.eye(10).repeat(3, 1).log_softmax(dim=1))
    assert "Mistakes: 0 in 30 images" in " ".join(texts(figure))
    report.save_figure(figure, tmp_path / "none.png")
    assert os.listdir(tmp_path) == ["none.png"]


class WithWords(nn.Module):
    """Says something beside its images: what a module returns need not be a tensor."""

    def forward(self, x):
        return x, "images"


class Mirror(nn.Module):
    def forward(self, x):
        return x[0].flip(3)


def redness_and_greenness(*layers):
    """A network of these layers and two classes, each of which speaks against the other."""
    contrast = nn.Linear(3, 2)
    contrast.weight.data = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]])
    return nn.Sequential(nn.AvgPool2d(4), *layers, nn.Flatten(), contrast)


@pytest.mark.parametrize(
    ("net", "mirrored"),
    [
        (redness_and_greenness(nn.ReLU(), nn.Dropout2d(0.5), nn.AvgPool2d(8)), False),
        (redness_and_greenness(nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1))), False),
        (redness_and_greenness(WithWords(), Mirror(), nn.AvgPool2d(8)), True),
    ],
    ids=["flat", "nested", "turned"],
)
def test_explanation_is_by_the_last_image_in_any_network(net, mirrored):
    image = torch.zeros(3, 32, 32)
    image[0, :12, :12] = 1
    image[1, 20:, 20:] = 0.1
    maps = report.explain(net, torch.stack([image, image]), torch.tensor([0, 1]))
    red, green = maps.flip(2) if mirrored else maps
    for seen, unseen, part in ((red, green, slice(2, 8)), (green, red, slice(24, 30))):
        assert seen.shape == (32, 32)
        torch.testing.assert_close(seen[part, part], torch.ones(6, 6))
        assert not unseen[part, part].any()


def test_network_without_an_image_inside_explains_nothing():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    assert not report.explain(net, torch.randn(2, 3, 32, 32), torch.tensor([0, 1])).any()


def test_augmentations_are_those_of_the_training():
    images = shapes(augmentation=make_augmentation(config, MEAN))
    row = [picture for (picture,) in pictures_in(report.plot_augmentations(images, count=2))[10:]]
    assert np.array_equal(row[0], images.images[1])  # the first of class 1
    for epoch in range(1, 10):
        images.set_epoch(epoch)
        seen = images[1][0].permute(1, 2, 0).numpy()  # what that epoch trains on
        np.testing.assert_allclose(row[epoch] / 255, seen * STD + MEAN, atol=1e-5)
