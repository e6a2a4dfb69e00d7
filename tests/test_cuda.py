"""What only a GPU can show; without one these tests are skipped."""

import pytest
import torch
from extras.speed import RecordedStep

from config import config
from model import Net
from tests.conftest import equal, flags, outcome, start
from train import make_optimizers, train_one_epoch, train_step
from utils import DTYPES, load_checkpoint, numerics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.mark.parametrize("precision", DTYPES)
def test_every_precision_trains_and_evaluates(cli, tiny, capsys, precision):
    argv = flags(tiny, device="cuda", precision=precision, optimizer="sgd", learning_rate=0.1, epochs=8, run_dir="run")
    assert cli(*argv, "--no-report") == 0
    out = capsys.readouterr().out
    assert f"Device: cuda ({torch.cuda.get_device_name()}), precision {precision}," in out
    last = load_checkpoint("run/last.pt")
    losses = [row["train_loss"] for row in last["metrics"]]
    assert losses[-1] < losses[0]
    assert bool(last["scaler"]) == (precision == "float16")  # its state is saved, to be continued
    assert cli("--evaluate", "run/last.pt", "--precision", precision, "--no-report") == 0
    assert f"Test Loss: {last['metrics'][-1]['valid_loss']:.4f}" in capsys.readouterr().out


def test_answers_are_those_of_the_cpu_in_float32(net):
    images = torch.randn(8, 3, 32, 32)
    here = net(images)  # as in training: else an untrained network says nearly the same of every image
    with numerics(deterministic=False):
        there = net.to("cuda", memory_format=torch.channels_last)(images.cuda()).cpu()
    torch.testing.assert_close(there, here, rtol=0, atol=1e-5)  # TF32 would be 5e-4 off


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_recorded_step_trains_alike(cli, tiny, precision):
    argv = flags(tiny, device="cuda", precision=precision, compile=True, dropout=0.0, batch_size=16, epochs=8)
    assert cli(*argv, "--run-dir", "recorded", "--no-report") == 0
    assert cli(*argv, "--run-dir", "plain", "--compile", "false", "--no-report") == 0
    recorded, plain = (load_checkpoint(f"{name}/last.pt")["metrics"] for name in ("recorded", "plain"))
    assert [row["train_loss"] for row in recorded] == pytest.approx([row["train_loss"] for row in plain], rel=0.05)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_replayed_steps_are_the_steps(precision):
    torch.manual_seed(0)
    images, labels = torch.randn(30, 16, 3, 32, 32), torch.randint(10, (30, 16))
    sizes = [10 if number % 7 == 6 else 16 for number in range(30)]  # some before the recording, some after it
    batches = [(x[:size], y[:size]) for x, y, size in zip(images, labels, sizes, strict=True)]
    factors = [1 - number / 30 for number in range(30)]
    weights = []
    for steps_before in (12, 1000):  # recorded, and never
        torch.manual_seed(1)
        net = Net(dropout=0.2).to("cuda", memory_format=torch.channels_last)
        optimizers, take_step = make_optimizers(net, config), RecordedStep(train_step, steps_before)
        with numerics(deterministic=True):
            train_one_epoch(net, batches, optimizers, factors, DTYPES[precision], take_step=take_step)
        weights.append(net.state_dict())
    assert equal(*weights)


def test_float16_is_not_recorded(cli, tiny, refusal):
    assert cli(*flags(tiny, device="cuda", precision="float16", compile=True)) == 2
    assert "compile is for float32 and bfloat16 on CUDA, not for float16: give --compile false" in refusal()


@pytest.mark.parametrize("precision", DTYPES)
def test_killed_and_continued_it_is_the_same_run_if_deterministic(tiny, tmp_path, precision):
    argv = [*flags(tiny, device="cuda", precision=precision, num_workers=2, deterministic=True), "--no-report"]
    for run_dir, moment in (("straight", ""), ("killed", "write last.pt"), ("killed", "replace best.pt")):
        again = (tmp_path / run_dir).exists()
        command = ["--resume", run_dir, "--no-report"] if again else [*argv, "--run-dir", run_dir]
        process = start(*command, cwd=tmp_path, DIE_AT=moment)
        _, err = process.communicate(timeout=300)
        assert (err, process.returncode < 0) == ("", bool(moment))
    process = start("--resume", "killed", "--no-report", cwd=tmp_path)
    assert process.communicate(timeout=300)[1] == ""
    assert equal(outcome(tmp_path / "killed"), outcome(tmp_path / "straight"))
