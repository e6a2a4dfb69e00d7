"""One run in several processes, started by the real torchrun."""

import json
from dataclasses import asdict, replace

import pytest

from config import Config
from dataset import load_datasets, make_loader
from tests.conftest import equal, outcome, start
from tools.evaluate import load_network
from train import validate

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """A folder in which three processes have left "straight", a run of two epochs, and the first of them in "run"."""
    folder = tmp_path_factory.mktemp("runs")
    # 70 images to train on, the last of which is left out; 80 to validate on, the last two without the third process.
    config = replace(tiny, batch_size=6, valid_split=0.5, schedule="constant")
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    process = start("config.json", cwd=folder, before=(*TORCHRUN, "3", "-m"), program="tests.shared_steps")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return folder


def test_steps_are_torchs_and_three_processes_of_which_one_speaks_resume_a_run_bit_for_bit(runs):
    process = start("--resume", "run", "--epochs", 2, cwd=runs, before=(*TORCHRUN, "3"))
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "train.py: " not in err
    assert [out.count(line) for line in ("Continuing after epoch 1", "Epoch 2/2 Summary", "Test Loss")] == [1, 1, 1]
    assert equal(outcome(runs / "run"), outcome(runs / "straight"))


def test_averages_are_over_each_image_once(runs):
    net, checkpoint = load_network(runs / "straight" / "last.pt")
    last = checkpoint["metrics"][-1]
    valid = validate(net, make_loader(load_datasets(Config(**checkpoint["config"])).valid, 80))
    assert (last["valid_loss"], last["valid_accuracy"]) == pytest.approx((valid["loss"], valid["accuracy"]))
    assert equal(checkpoint["right"], valid["right"])
    hits = 69 * last["train_accuracy"] / 100
    assert hits == pytest.approx(round(hits), abs=1e-9)
