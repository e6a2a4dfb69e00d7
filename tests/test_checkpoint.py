import hashlib
import io
import os
import pickle
from pathlib import Path

import pytest
import torch

import sources
from checkpoint import RunError, load_checkpoint, load_weights, save_checkpoint, save_weights
from model import BlockSpec, Net


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "some.pt"
    content = {
        "model": Net().state_dict(),
        "class_names": list(sources.SHAPES),
        "config": {"dataset": "shapes", "precision": "float32"},
    }
    save_checkpoint(path, {**content, "mean": (0.5,) * 3, "std": (0.25,) * 3})
    return path


def test_checkpoint_is_what_torch_reads_too(checkpoint):
    assert torch.load(checkpoint, weights_only=True).keys() == load_checkpoint(checkpoint).keys()


def test_weights_alone_evaluate_as_the_whole_checkpoint(s8, capsys):
    assert s8("--epochs", "1", "--run-dir", "run") == 0
    save_weights(Path("weights.pt"), load_checkpoint("run/last.pt"))
    assert Path("weights.pt").stat().st_size < 0.6 * Path("run/last.pt").stat().st_size
    capsys.readouterr()
    assert s8("--evaluate", "run/last.pt") == s8("--evaluate", "weights.pt") == 0
    whole, alone = capsys.readouterr().out.splitlines()
    assert whole == alone


def test_checkpoint_of_a_version_with_another_setting_evaluates(s8, checkpoint):
    content = load_checkpoint(checkpoint)
    save_checkpoint(Path("older.pt"), {**content, "config": {**content["config"], "gone": 1}})
    assert s8("--evaluate", "older.pt") == 0


def test_flipped_bit_anywhere_is_found(checkpoint):
    content = bytearray(checkpoint.read_bytes())
    for position in [*range(0, len(content), len(content) // 97), len(content) - 1]:
        content[position] ^= 8
        checkpoint.write_bytes(content)
        content[position] ^= 8
        with pytest.raises(RunError, match="damaged"):
            load_checkpoint(checkpoint)


@pytest.mark.parametrize("size", [0, 10, 1000, -1])
def test_truncated_checkpoint_is_refused(s8, checkpoint, size, refusal):
    checkpoint.write_bytes(checkpoint.read_bytes()[:size])
    assert s8("--evaluate", str(checkpoint)) == 2
    assert f"checkpoint {checkpoint} is damaged" in refusal()


def test_missing_checkpoint_is_refused(s8, refusal):
    assert s8("--evaluate", "nowhere.pt") == 2
    assert "checkpoint nowhere.pt cannot be read" in refusal()


def test_other_format_is_refused(s8, checkpoint, refusal, monkeypatch):
    monkeypatch.setattr("checkpoint.FORMAT", "s8erav3-99")
    assert s8("--evaluate", str(checkpoint)) == 2
    assert "is not of format s8erav3-99" in refusal()


@pytest.mark.parametrize("net", [Net(num_classes=9), Net([BlockSpec(3, 10)])], ids=["classes", "blocks"])
def test_other_architecture_is_refused_and_changes_nothing(s8, checkpoint, net, refusal):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(RunError, match="another architecture"):
        load_weights(net, load_checkpoint(checkpoint))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    save_checkpoint(checkpoint, {**load_checkpoint(checkpoint), "model": net.state_dict()})
    assert s8("--evaluate", str(checkpoint)) == 2
    assert "another architecture" in refusal()


def test_other_classes_are_refused(s8, checkpoint, refusal):
    save_checkpoint(checkpoint, {**load_checkpoint(checkpoint), "class_names": ["cat"] * 10})
    assert s8("--evaluate", str(checkpoint)) == 2
    assert "other classes" in refusal()


@pytest.mark.parametrize("sealed", [False, True], ids=["plain", "with a correct SHA-256"])
@pytest.mark.parametrize("zipped", [False, True], ids=["pickle", "zip"])
def test_malicious_checkpoint_never_runs(s8, tmp_path, sealed, zipped, refusal):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "marker"),)

    buffer = io.BytesIO()
    torch.save(Malicious(), buffer) if zipped else buffer.write(pickle.dumps(Malicious()))
    content = buffer.getvalue()
    (tmp_path / "bad.pt").write_bytes(content + hashlib.sha256(content).digest() * sealed)
    assert s8("--evaluate", "bad.pt") == 2
    assert "checkpoint bad.pt" in refusal()
    assert not (tmp_path / "marker").exists()
