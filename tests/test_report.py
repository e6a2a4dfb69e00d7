import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import report
from checkpoint import load_checkpoint, save_weights
from dataset import FixedBatches, make_normalization
from model import Net
from sources import draw_shapes

PICTURES = {"curves.png", "confusion_matrix.png", "misclassified.png", "augmentations.png"}


def texts(figure):
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def images_of(axes):
    return [image.get_array() for image in axes.images]


def test_run_ends_with_a_report_and_any_checkpoint_gets_one(s8, tmp_path, capsys):
    assert s8("--epochs", "2", "--run-dir", "run", report=True) == 0
    assert {*os.listdir("run")} >= {*PICTURES, "report.md"}
    page = (tmp_path / "run" / "report.md").read_text()
    accuracy = load_checkpoint("run/last.pt")["metrics"][-1]["valid_accuracy"]
    assert f"# shapes: {accuracy:.2f} % of 50 test images" in page
    assert "| learning_rate | 0.2 |" in page
    for name in PICTURES:
        assert f"]({name})" in page
        with Image.open(tmp_path / "run" / name) as picture:
            assert picture.format == "PNG"
            assert len(picture.convert("RGB").getcolors(maxcolors=10**7)) > 10
    os.mkdir("elsewhere")
    os.rename("run/last.pt", "elsewhere/last.pt")
    capsys.readouterr()
    assert s8("--evaluate", "elsewhere/last.pt", report=True) == 0
    assert "elsewhere/report.md" in capsys.readouterr().out
    assert {*os.listdir("elsewhere")} == {*PICTURES, "report.md", "last.pt"}
    assert (tmp_path / "elsewhere" / "report.md").read_text() == page


def test_curves_are_of_the_checkpoints_own_run(s8, monkeypatch):
    drawn = []
    plot_curves = report.plot_curves
    monkeypatch.setattr(report, "plot_curves", lambda rows: drawn.append(len(rows)) or plot_curves(rows))
    for seed in "01":
        assert s8("--epochs", "2", "--seed", seed, "--run-dir", seed) == 0
    checkpoint = load_checkpoint("0/last.pt")
    save_weights(Path("0/first.pt"), checkpoint | {"epoch": 1, "metrics": checkpoint["metrics"][:1]})
    assert s8("--evaluate", "0/first.pt", report=True) == 0
    os.replace("1/last.pt", "0/last.pt")
    assert s8("--evaluate", "0/first.pt", report=True) == 0
    Path("0/last.pt").write_bytes(b"damaged")
    assert s8("--evaluate", "0/first.pt", report=True) == 0
    assert drawn == [2, 1, 1]


def test_without_report_there_is_none_and_matplotlib_stays_away(s8, monkeypatch):
    monkeypatch.setitem(sys.modules, "report", None)  # makes its import fail
    assert s8("--epochs", "1", "--run-dir", "run") == 0
    assert s8("--evaluate", "run/last.pt") == 0
    assert not PICTURES & {*os.listdir("run")}


def test_curves_are_drawn_after_each_epoch(s8, monkeypatch):
    drawn = []
    plot_curves = report.plot_curves
    monkeypatch.setattr(report, "plot_curves", lambda rows: drawn.append(len(rows)) or plot_curves(rows))
    monkeypatch.setattr(report, "write_report", lambda *args: None)
    assert s8("--epochs", "3", "--run-dir", "run", report=True) == 0
    assert drawn == [1, 2, 3]


def test_report_on_the_best_epoch_shows_the_curves_of_all(s8, monkeypatch):
    drawn = []
    plot_curves = report.plot_curves
    monkeypatch.setattr(report, "plot_curves", lambda rows: drawn.append(len(rows)) or plot_curves(rows))
    monkeypatch.setattr(report, "plot_mistakes", lambda *args: report.Figure())
    monkeypatch.setattr("checkpoint.best_row", lambda rows: rows[0])
    assert s8("--epochs", "2", "--valid-split", "0.2", "--run-dir", "run", report=True) == 0
    assert load_checkpoint("run/best.pt")["epoch"] == 1
    assert s8("--evaluate", "run/best.pt", report=True) == 0
    assert drawn == [1, 2, 2, 2]


def test_curves_show_both_splits():
    names = ("train_loss", "valid_loss", "train_accuracy", "valid_accuracy", "learning_rate")
    rows = [{"epoch": epoch, **{name: epoch + k / 10 for k, name in enumerate(names)}} for epoch in (1, 2, 3)]
    figure = report.plot_curves(rows)
    lines = [[list(line.get_ydata()) for line in axes.lines] for axes in figure.axes]
    column = {name: [row[name] for row in rows] for name in names}
    assert lines[0] == [column["train_loss"], column["valid_loss"]]
    assert lines[1] == [column["train_accuracy"], column["valid_accuracy"]]
    assert lines[2] == [column["learning_rate"]]
    assert {"training", "validation", "Epoch"} <= {*texts(figure)}


def test_confusions_are_counted_true_by_predicted():
    labels, predictions = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 0, 0, 2])
    counts = report.count_confusions(labels, predictions, 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [2, 0, 1]]
    figure = report.plot_confusions(counts, ["cat", "dog", "frog"])
    assert {"cat", "dog", "frog", "50.0", "100.0", "33.3"} <= {*texts(figure)}


@pytest.mark.parametrize("count", [2, 100])
def test_any_number_of_classes_is_drawn_with_no_label_cut(count):
    names = [f"a_rather_long_name_{k}" for k in range(count)]
    figure = report.plot_confusions(torch.eye(count, dtype=torch.int64), names)
    figure.draw_without_rendering()
    assert {*names} <= {*texts(figure)}
    width, height = figure.get_size_inches() * figure.dpi
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height


@pytest.fixture
def test_batches():
    return FixedBatches(draw_shapes(30, np.random.default_rng(1)), make_normalization((0.5,) * 3, (0.25,) * 3), 16)


def test_mistakes_are_the_most_confident_first_and_the_prediction_is_explained(test_batches, monkeypatch):
    labels = torch.from_numpy(test_batches.split.labels)
    probabilities = torch.full((30, 10), 0.01)
    probabilities[range(30), labels] = 0.91
    for index, confidence in ((3, 0.6), (12, 0.9), (20, 0.7)):
        probabilities[index] = (1 - confidence) / 9
        probabilities[index, (labels[index] + 1) % 10] = confidence
    names = [f"class {k}" for k in range(10)]
    explained = []
    monkeypatch.setattr(
        report, "explain", lambda net, images, targets: explained.extend((images, targets)) or images[:, 0]
    )
    figure = report.plot_mistakes(Net(), test_batches, probabilities.log(), names)
    assert "Mistakes: 3 in 30 images" in " ".join(texts(figure))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    expected = [
        f"class {(label + 1) % 10} {confidence} %\ntrue: class {label}"
        for label, confidence in ((labels[12], 90), (labels[20], 70), (labels[3], 60))
    ]
    assert [title for title in titles if title] == expected
    chosen = test_batches.split.images[[12, 20, 3]]
    assert torch.equal(explained[0], test_batches.normalization(images=chosen)["images"])
    assert explained[1].tolist() == [(label + 1) % 10 for label in labels[[12, 20, 3]]]
    shown = [axes for axes in figure.axes if axes.images]
    assert np.array_equal(images_of(shown[0])[0], test_batches.split.images[12])
    assert len(images_of(shown[1])) == 2  # the image, and the map over it


def test_no_mistake_is_a_picture_too(test_batches, tmp_path):
    log_probs = torch.full((30, 10), 0.01)
    log_probs[range(30), torch.from_numpy(test_batches.split.labels)] = 0.91
    figure = report.plot_mistakes(Net(), test_batches, log_probs.log(), list("abcdefghij"))
    assert "Mistakes: 0 in 30 images" in " ".join(texts(figure))
    report.save_figure(figure, tmp_path / "none.png")
    assert os.listdir(tmp_path) == ["none.png"]


def test_explanation_is_where_the_class_is_seen():
    """By a network whose classes are redness and greenness, each of which speaks against the other."""
    contrast = nn.Linear(3, 2)
    contrast.weight.data = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]])
    net = nn.Sequential(nn.AvgPool2d(4), nn.ReLU(), nn.Dropout2d(0.5), nn.AvgPool2d(8), nn.Flatten(), contrast).eval()
    image = torch.zeros(3, 32, 32)
    image[0, :12, :12] = 1
    image[1, 20:, 20:] = 0.1
    red, green = report.explain(net, torch.stack([image, image]), torch.tensor([0, 1]))
    for seen, unseen, part in ((red, green, slice(2, 8)), (green, red, slice(24, 30))):
        assert seen.shape == (32, 32)
        torch.testing.assert_close(seen[part, part], torch.ones(6, 6))
        assert not unseen[part, part].any()


def test_augmentations_are_those_of_the_training(s8, monkeypatch):
    shown = []
    plot = report.plot_augmentations
    monkeypatch.setattr(
        report, "plot_augmentations", lambda *args: shown.append((args[0], plot(*args))) or shown[-1][1]
    )
    assert s8("--epochs", "1", "--run-dir", "run", report=True) == 0
    batches, figure = shown[0]
    index = int((batches.labels == 1).nonzero()[0])
    row = [images_of(axes)[0] for axes in figure.axes[10:20]]
    assert np.array_equal(row[0], batches.images[index])
    seen = batches[(3, np.array([index]))][0][0]  # what epoch 3 trains on
    mean, std = (np.array(load_checkpoint("run/last.pt")[name]) for name in ("mean", "std"))
    np.testing.assert_allclose(row[3] / 255, seen.permute(1, 2, 0).numpy() * std + mean, atol=1e-5)
