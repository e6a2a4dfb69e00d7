"""What only a GPU can show; without one these tests are skipped."""

import pytest
import torch

from config import config
from model import Net
from parts.speed import RecordedStep
from tests.conftest import equal, flags, outcome, start
from train import make_optimizers, train_one_epoch, train_step
from utils import set_numerics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.mark.parametrize("options", ["bfloat16", "float16", "float32 --compile"])
def test_killed_and_continued_it_is_the_same_run_if_deterministic(tiny, tmp_path, options):
    new = flags(tiny, batch_size=10, device="cuda", num_workers=2, deterministic=True)  # 15 steps, of which 3 recorded
    new += ["--precision", *options.split(), "--run-dir"]
    for argv, moment in (
        ([*new, "straight"], {}),
        ([*new, "killed"], {"DIE_AT": "write last.pt 2"}),
        (["--resume", "killed"], {"DIE_AT": "replace best.pt 1"}),
        (["--resume", "killed"], {}),
    ):
        process = start(*argv, "--no-report", cwd=tmp_path, **moment)
        _, err = process.communicate(timeout=300)
        assert process.returncode == (-9 if moment else 0), err
    assert equal(outcome(tmp_path / "killed"), outcome(tmp_path / "straight"))


def test_answers_are_those_of_the_cpu_in_float32(net):
    images = torch.randn(8, 3, 32, 32)
    here = net(images)  # as in training: else an untrained network says nearly the same of every image
    set_numerics(deterministic=False)
    there = net.to("cuda", memory_format=torch.channels_last)(images.cuda()).cpu()
    torch.testing.assert_close(there, here, rtol=0, atol=1e-5)  # TF32 would be 5e-4 off


def test_replayed_steps_are_the_steps():
    sizes = [10 if number % 7 == 6 else 16 for number in range(30)]  # some before the recording, some after it
    batches = [(torch.randn(size, 3, 32, 32), torch.randint(10, (size,))) for size in sizes]
    factors, weights = [1 - number / 30 for number in range(30)], []
    set_numerics(deterministic=True)
    for steps_before in (12, 1000):  # recorded, and never
        torch.manual_seed(1)
        net = Net(dropout=0.2).to("cuda", memory_format=torch.channels_last)
        train_one_epoch(net, batches, make_optimizers(net, config), factors, RecordedStep(train_step, steps_before))
        weights.append(net.state_dict())
    torch.use_deterministic_algorithms(False)
    assert equal(*weights)
