"""python -m tools.evaluate RUN_DIR|CHECKPOINT: loss and accuracy on the test images."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import model
import train
from config import UsageError
from dataset import load_datasets
from model import BlockSpec, Net
from tests.conftest import ROOT, flags
from tools import evaluate
from utils import load_checkpoint, save_checkpoint


@pytest.fixture
def figures(capsys):
    """Return a function that evaluates on the CPU, and gives the numbers of all lines that it prints."""

    def run(*argv):
        evaluate.main([*map(str, argv), "--device", "cpu"])
        return [float(number) for number in re.findall(r"(?:Loss|Acc): (\d+\.\d{4})", capsys.readouterr().out)]

    return run


def test_run_and_checkpoint_have_the_accuracy_that_the_run_itself_had(finished, figures):
    last = load_checkpoint(finished / "last.pt")["metrics"][-1]  # of the same images, for none were held out
    for path in (finished, finished / "last.pt"):
        assert figures(path) == pytest.approx([last["valid_loss"], last["valid_accuracy"]], abs=2e-4)


def test_only_the_test_images_are_needed_wherever_they_are(finished, figures, pictures, tmp_path):
    shutil.copytree(pictures / "test", tmp_path / "test")
    assert figures(finished, "--data-dir", tmp_path) == figures(finished)
    shutil.rmtree(tmp_path / "test" / "bar")
    with pytest.raises(UsageError, match="trained on other classes"):
        figures(finished, "--data-dir", tmp_path)


def test_tta_averages_the_probabilities_of_an_image_and_of_its_mirror_image(figures, tiny):
    path = ROOT / "weights" / "shapes.pt"
    net, _ = evaluate.load_network(path)
    images, labels = load_datasets(replace(tiny, dataset="shapes")).test[list(range(300))]
    with torch.no_grad():
        probabilities = (net(images).exp() + net(images.flip(3)).exp()) / 2
    loss = -probabilities[range(len(labels)), labels].log().mean().item()
    accuracy = 100 * (probabilities.argmax(dim=1) == labels).double().mean().item()
    assert figures(path, "--tta", "--precision", "float32")[2:] == pytest.approx([loss, accuracy], abs=1e-4)


def test_held_out_images_choose_the_network_that_is_tested(cli, tiny, monkeypatch, before, capsys, figures):
    made = []
    monkeypatch.setattr(train, "Net", lambda **options: made.append(Net(**options)) or made[0])
    # All that the network has learnt is lost after the first epoch, when that is saved.
    before("best.pt", lambda: [parameter.data.zero_() for parameter in made[0].parameters()])
    assert cli(*flags(tiny, valid_split=0.2, run_dir="run"), "--no-report") == 0
    of_run = re.search(r"\(epoch 1\)\..+\nTest Loss: (.+), Test Acc: (.+)\n", capsys.readouterr().out)
    tested = pytest.approx([float(number) for number in of_run.groups()], abs=2e-4)
    assert figures("run") == figures("run/best.pt") == tested
    assert figures("run/last.pt") != tested
    assert len(load_checkpoint("run/last.pt")["right"]) == 30  # held out of 150; the test images are 50


def test_edited_table_of_blocks_spoils_no_older_checkpoint(finished, figures, monkeypatch):
    before, generator = figures(finished), torch.random.get_rng_state()
    monkeypatch.setattr(model, "default_blocks", lambda base_channels: (BlockSpec(3, 8, last="unpadded"),))
    assert figures(finished) == before
    assert torch.equal(torch.random.get_rng_state(), generator)  # a notebook's random numbers go on as they would


def test_network_of_a_run_by_other_code_comes_with_a_note(copy_of_finished, capsys):
    last = load_checkpoint(copy_of_finished / "last.pt")
    last["made_by"][-1]["modules"]["model.py"] += "# edited since"
    save_checkpoint(copy_of_finished / "last.pt", last)
    evaluate.load_network(copy_of_finished)
    assert re.fullmatch("Note: model.py has changed since .+last.pt was made: .+\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("tool", "names", "words"),
    [
        ("evaluate", ["own.pt"], "MyNet: give net=MyNet"),
        ("predict", ["last.pt", "a.png"], "1 of 1 images cannot be read"),
        ("predict", ["last.pt", "empty"], "empty is empty"),
        ("evaluate", ["begun/last.pt"], "begun/last.pt: no epoch is finished"),
        ("report", ["begun"], "begun/last.pt: no epoch is finished"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(finished, tmp_path, tool, names, words):
    for folder in ("begun", "empty"):
        (tmp_path / folder).mkdir()
    changes = {"last.pt": {}, "begun/last.pt": {"epoch": 0, "metrics": []}}
    changes["own.pt"] = {"network": ["", " MyNet"]}  # a subclass of Net may fit its weights, and mean another network
    for name, change in changes.items():
        save_checkpoint(tmp_path / name, load_checkpoint(finished / "last.pt") | change)
    command = [sys.executable, "-m", f"tools.{tool}", *(tmp_path / name for name in names)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(f"^tools.{tool}: error: .*{words}.*\n", done.stderr, re.MULTILINE)


def test_weights_that_are_not_finite_are_refused(copy_of_finished):
    last = load_checkpoint(copy_of_finished / "last.pt")
    last["model"]["classifier.bias"][0] = float("nan")
    save_checkpoint(copy_of_finished / "last.pt", last)
    with pytest.raises(UsageError, match="weights that are not finite"):
        evaluate.load_network(copy_of_finished)


def test_checkpoint_can_be_tested_on_images_of_ones_own(figures, pictures):
    loss, accuracy = figures(ROOT / "weights" / "shapes.pt", "--dataset", "folder", "--data-dir", pictures)
    assert accuracy >= 96
    assert loss < 0.5
    assert all(evaluate.load_network(path) for path in (ROOT / "weights").glob("*.pt"))
