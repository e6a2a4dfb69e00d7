"""python -m tools.evaluate RUN_DIR|CHECKPOINT: loss and accuracy on the test images."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model
import train
from config import UsageError
from dataset import load_datasets, make_loader
from model import BlockSpec, Net
from tests.conftest import ROOT, equal, flags
from tools import evaluate
from utils import load_checkpoint, save_checkpoint


@pytest.fixture
def figures(capsys):
    """Return a function that evaluates on the CPU, and gives loss and accuracy of each printed line, all in one list."""

    def run(*argv):
        evaluate.main([*map(str, argv), "--device", "cpu"])
        return [float(number) for number in re.findall(r"(?:Loss|Acc): (\d+\.\d{4})", capsys.readouterr().out)]

    return run


def test_run_and_checkpoint_have_the_accuracy_that_the_run_itself_had(finished, figures):
    last = load_checkpoint(finished / "last.pt")["metrics"][-1]  # of the same images, for none were held out
    for path in (finished, finished / "last.pt"):
        assert figures(path) == pytest.approx([last["valid_loss"], last["valid_accuracy"]], abs=2e-4)


def test_precision_may_be_another_than_in_the_training(finished, figures):
    assert figures(finished, "--precision", "float32") == figures(finished)
    assert figures(finished, "--precision", "bfloat16") != figures(finished)


def test_only_the_test_images_are_needed_wherever_they_are(finished, figures, pictures, tmp_path):
    shutil.copytree(pictures / "test", tmp_path / "test")
    assert figures(finished, "--data-dir", tmp_path) == figures(finished)
    shutil.rmtree(tmp_path / "test" / "bar")
    with pytest.raises(UsageError, match="trained on other classes"):
        figures(finished, "--data-dir", tmp_path)


def test_tta_averages_the_probabilities_of_an_image_and_of_its_mirror_image(finished, figures, tiny):
    net, _ = evaluate.load_network(finished)
    test = load_datasets(tiny).test
    images, labels = next(iter(make_loader(test, len(test))))
    with torch.no_grad():
        probabilities = (net(images).exp() + net(images.flip(3)).exp()) / 2
    loss = -probabilities[range(len(labels)), labels].log().mean().item()
    accuracy = 100 * (probabilities.argmax(dim=1) == labels).double().mean().item()
    assert figures(finished, "--tta") == pytest.approx([*figures(finished), loss, accuracy], abs=2e-4)


def test_held_out_images_choose_the_network_that_is_tested(cli, tiny, monkeypatch, before, capsys, figures):
    made = []
    monkeypatch.setattr(train, "Net", lambda **options: made.append(Net(**options)) or made[0])
    # All that the network has learnt is lost after the first epoch, when that is saved.
    before("best.pt", lambda: [parameter.data.zero_() for parameter in made[0].parameters()])
    assert cli(*flags(tiny, valid_split=0.2, run_dir="run"), "--no-report") == 0
    of_run = re.search(r"\(epoch 1\)\..+\nTest Loss: (.+), Test Acc: (.+)\n", capsys.readouterr().out)
    tested = pytest.approx([float(number) for number in of_run.groups()], abs=2e-4)
    assert figures("run") == tested
    assert figures("run/best.pt") == tested
    assert figures("run/last.pt") != tested


def test_test_images_play_no_part_before_the_end(cli, tiny, narrow, pictures):
    shutil.copytree(pictures, "others")
    for path in Path("others", "test").glob("*/*"):
        shutil.copy(next(pictures.glob("train/*/*")), path)
    for name, data_dir in (("one", str(pictures)), ("other", "others")):
        assert cli(*flags(tiny, valid_split=0.2, data_dir=data_dir, run_dir=name), "--no-report") == 0
    one, other = load_checkpoint("one/best.pt"), load_checkpoint("other/best.pt")
    assert [row["valid_loss"] for row in one["metrics"]] == [row["valid_loss"] for row in other["metrics"]]
    assert equal(dict(one["model"]), dict(other["model"]))


def test_edited_table_of_blocks_spoils_no_older_checkpoint(finished, figures, monkeypatch):
    before = figures(finished)
    monkeypatch.setattr(model, "default_blocks", lambda base_channels: (BlockSpec(3, 8, last="unpadded"),))
    assert len(Net().blocks) == 1
    assert figures(finished) == before


def test_weights_that_model_py_has_no_place_for_are_refused(copy_of_finished):
    last = load_checkpoint(copy_of_finished / "last.pt")
    last["model"]["blocks.4.0.weight"] = torch.zeros(1)
    save_checkpoint(copy_of_finished / "last.pt", last)
    with pytest.raises(UsageError, match="is of another network than model.py makes"):
        evaluate.load_network(copy_of_finished)


def test_loading_a_network_leaves_a_notebooks_random_numbers_as_they_would_be(finished):
    before = torch.random.get_rng_state()
    net, _ = evaluate.load_network(finished)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not net.training


@pytest.mark.parametrize(
    ("tool", "argv", "words"),
    [
        ("evaluate", ["old.pt"], "old.pt is not of format"),
        ("predict", ["last.pt", "a.png"], "a.png cannot be read"),
        ("report", ["begun"], "begun: no epoch is finished"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(finished, tmp_path, tool, argv, words):
    (tmp_path / "begun").mkdir()
    changes = {"last.pt": {}, "old.pt": {"format": "s8erav3-2"}, "begun/last.pt": {"epoch": 0, "metrics": []}}
    for name, change in changes.items():
        save_checkpoint(tmp_path / name, load_checkpoint(finished / "last.pt") | change)
    command = [sys.executable, "-m", f"tools.{tool}", *argv]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(f"tools.{tool}: error: .*{words}.*\n", done.stderr)
