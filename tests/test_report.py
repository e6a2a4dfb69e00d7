"""python -m tools.report RUN_DIR: report.md and its pictures."""

import shutil
from collections import OrderedDict

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image
from torch import nn

from config import UsageError, config
from dataset import ImageDataset, make_augmentation
from parts.images import draw_shapes
from tools import pictures as plots
from tools import report
from utils import load_checkpoint, save_checkpoint

PICTURES = {"curves.png", "confusion_matrix.png", "predictions.png", "misclassified.png", "augmentations.png"}
RIGHT = torch.eye(10).repeat(3, 1).clamp(min=0.01)  # probabilities of the images below


def shapes(names=tuple(f"class {number}" for number in range(10))):
    """Thirty images, of the classes in turn."""
    (images, labels), mean = draw_shapes(30, np.random.default_rng(1)), (0.5,) * 3
    return ImageDataset(images, labels % len(names), names, mean, (0.25,) * 3, make_augmentation(config, mean))


def drawn(folder):
    """The names of the pictures in a folder that have something on them."""
    colours = {path.name: Image.open(path).convert("RGB").getcolors(maxcolors=10**7) for path in folder.glob("*.png")}
    return {name for name in colours if len(colours[name]) > 10}


def texts(figure):
    return {text.get_text() for text in figure.findobj(Text)}


def shown(figure):
    """What lies in each part of a figure that has any pictures, one above the other."""
    return [[image.get_array() for image in axes.images] for axes in figure.axes if axes.images]


def test_report_has_the_figures_of_the_run_its_settings_and_pictures(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dataset.channel_statistics", None)  # those of the training are taken
    kept = load_checkpoint(finished / "last.pt")
    going_on = {"epoch": 1, "metrics": [kept["metrics"][-1] | {"epoch": 1}], "images": []}
    save_checkpoint(tmp_path / "last.pt", kept | going_on)  # all that it needs
    report.main([str(tmp_path), "--device", "cpu"])
    assert "warning: the images have changed" in capsys.readouterr().err
    page, last = (tmp_path / "report.md").read_text(), load_checkpoint(tmp_path / "last.pt")["metrics"][-1]
    assert page.startswith(f"# folder: {last['valid_accuracy']:.2f} % of 50 test images\n")
    assert f"| 1 of 2 | {last['train_loss']:.4f} | {last['train_accuracy']:.2f} % | {last['valid_loss']:.4f} |" in page
    assert all(part in page for part in ("\nbatch_size = 32\n", *(f"]({name})" for name in PICTURES)))
    assert drawn(tmp_path) == PICTURES
    checkpoint = load_checkpoint(tmp_path / "last.pt")
    save_checkpoint(tmp_path / "last.pt", checkpoint | {"config": checkpoint["config"] | {"device": "gone"}})
    with pytest.raises(UsageError, match="device 'gone'"):  # that of the training, unless another is named
        report.report(tmp_path)


def test_images_of_other_classes_are_refused(finished, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "pictures")
    for part in ("train", "test"):
        (tmp_path / "pictures" / part / "bar").rename(tmp_path / "pictures" / part / "zebra")
    with pytest.raises(UsageError, match="trained on other classes: 'bar', where the images have"):
        report.report(finished, data_dir=str(tmp_path / "pictures"))


def test_picture_that_fails_is_one_line_and_the_others_are_drawn(finished, tmp_path, monkeypatch, capsys):
    shutil.copy(finished / "last.pt", tmp_path)
    monkeypatch.setattr(plots, "plot_confusions", lambda *args: [].index("a font\nthat is there"))
    report.report(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: confusion_matrix.png cannot be drawn (ValueError: ")
    assert drawn(tmp_path) == PICTURES - {"confusion_matrix.png"}


def test_curves_show_training_and_validation():
    row = {"learning_rate": 0.1, "train_loss": 3.0, "train_accuracy": 10.0, "valid_loss": 2.0, "valid_accuracy": 20.0}
    figure = plots.plot_curves([{"epoch": 1, **row}, {"epoch": 2, **row, "valid_loss": 1.0}])
    lines = [{line.get_label(): list(line.get_ydata()) for line in axes.lines} for axes in figure.axes]
    accuracies = {"train accuracy": [10, 10], "valid accuracy": [20, 20]}
    assert lines == [{"train loss": [3, 3], "valid loss": [2, 1]}, accuracies, {"learning rate": [0.1, 0.1]}]


def test_confusions_are_counted_true_by_predicted():
    labels, predictions = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 0, 0, 2])
    counts = plots.count_confusions(labels, predictions, 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [2, 0, 1]]
    figure = plots.plot_confusions(counts, ["cat", "dog", "eel"])
    assert texts(figure) >= {"cat  50.0 %", "dog  100.0 %", "eel  33.3 %"}


def test_class_names_of_any_bytes_are_drawn_as_they_are(tmp_path):
    names, net = ["$\\a$", "\udcff", "_"], nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    figures = [plots.plot_mistakes(net, shapes(names), torch.full((30, 3), -1.1))]
    figures += [plots.plot_confusions(torch.eye(3).long(), names), plots.plot_augmentations(shapes(names))]
    for figure in figures:
        figure.savefig(tmp_path / "picture.png")
        assert all(name in " ".join(texts(figure)) for name in ("$\\a$", "\\udcff"))


def test_mistakes_are_the_most_confident_first(net):
    assert "Mistakes: 0 in 30 images" in " ".join(texts(plots.plot_mistakes(net, shapes(), RIGHT.log())))
    probabilities = RIGHT.clone()
    for index, confidence, prediction in ((12, 0.7, 3), (20, 0.9, 1), (3, 0.6, 4)):
        probabilities[index] = (1 - confidence) / 9
        probabilities[index, prediction] = confidence
    figure = plots.plot_mistakes(net, shapes(), probabilities.log())
    titles = [title for axes in figure.axes if (title := axes.get_title(loc="left"))]
    assert titles == [f"class {k} {p} %\ntrue: class {t}" for k, p, t in ((1, 90, 0), (3, 70, 2), (4, 60, 3))]
    assert np.array_equal(shown(figure)[0][0], shapes().images[20])


def test_heat_maps_are_from_0_to_1_where_the_image_speaks_for_the_class():
    layers = {"blocks": nn.Sequential(nn.Conv2d(3, 2, 4, 4, bias=False)), "pool": nn.AvgPool2d(8), "end": nn.Flatten()}
    net, image = nn.Sequential(OrderedDict(layers)), torch.zeros(3, 32, 32)
    weight = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]])  # class 0 is red, and not green; class 1 green, not red
    net.blocks[0].weight.data = weight[..., None, None].repeat(1, 1, 4, 4)
    image[0, :12, :12], image[1, 20:, 20:] = 1, 0.1
    maps = plots.explain(net, torch.stack([image, image]), torch.tensor([0, 1]))
    assert torch.equal(maps, maps.clamp(0, 1))
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # of each class: upper left, lower right
    torch.testing.assert_close(maps[:, [4, 27], [4, 27]], expected)


def test_augmentations_are_those_that_the_epochs_train_on():
    images = shapes()
    assert report.of_each_class(torch.tensor([0, 0, 0, 0, 1, 1, 2]), 5) == [0, 4, 6, 1, 5]  # the classes in turn
    row = [picture for (picture,) in shown(plots.plot_augmentations(images, count=2))[10:]]  # the first of class 1
    assert np.array_equal(row, [images.images[1], *(images.augment(epoch, [1])[0] for epoch in range(1, 10))])


def test_page_has_each_class_and_the_worst_mistakes_and_no_matrix_of_more_than_100_classes(finished):
    counts, names = torch.eye(101, dtype=torch.int64), [f"class {number}" for number in range(101)]
    counts[3, 7] = 3
    page = report.describe(load_checkpoint(finished / "last.pt") | {"class_names": names}, counts, 1.0)
    assert "| class 3 | 25.00 % |" in page
    assert "| 99.26 % |" in page  # the mean of the classes
    assert "- class 3 taken for class 7: 3\n" in page
    assert "confusion_matrix.png" not in page
