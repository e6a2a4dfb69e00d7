"""One run that several processes share, started by the real torchrun."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import processes
import utils
from checkpoint import load_checkpoint
from dataset import AugmentedBatches, EpochBatches, FixedBatches, make_augmentation, make_normalization
from model import Net
from sources import draw_shapes
from tests.conftest import equal, outcome

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")

# 150 images: four batches of 37 and one of 2, in which the third process has no part; 50 to test on, in 37 and 13.
NEW = ("--dataset", "shapes", "--batch-size", "37", "--num-workers", "0", "--epochs", "2")
NEW += ("--schedule", "constant", "--learning-rate", "0.01", "--device", "cpu", "--precision", "float32")


def torchrun(count, *argv, folder):
    """Start tests.driver in so many processes."""
    module = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m", "tests.driver")
    return subprocess.Popen(
        [sys.executable, *module, *argv],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process):
    """Wait for torchrun; return whether all went well, the output, and our own lines of stderr."""
    out, err = process.communicate(timeout=300)
    print(err)  # for whoever looks into a failure
    return process.returncode == 0, out, [line for line in err.splitlines() if line.startswith("train.py: ")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with runs "1", "2" and "3" of as many processes, and what each process recorded in "of1" to "of3"."""
    folder = tmp_path_factory.mktemp("runs")
    started = [torchrun(n, "--record", f"of{n}", *NEW, "--run-dir", str(n), folder=folder) for n in (1, 2, 3)]
    for process in started:
        well, out, ours = end(process)
        assert (well, ours) == (True, [])
        assert out.count("Epoch 2/2 Summary") == out.count("Best Valid Acc") == 1  # rank 0 alone prints
    return folder


def recorded(folder, count):
    return [torch.load(folder / f"of{count}" / f"{rank}.pt") for rank in range(count)]


def step_losses(parts):
    """The mean loss of each step over the images of all processes."""
    sums = np.array([part["steps"] for part in parts]).sum(axis=0)  # (steps, 2): losses, images
    assert sums[:, 1].tolist() == [37, 37, 37, 37, 2] * 2
    return sums[:, 0] / sums[:, 1]


@pytest.mark.parametrize("count", [2, 3])
def test_all_processes_have_the_same_weights(runs, count):
    models = [part["model"] for part in recorded(runs, count)]
    saved = load_checkpoint(runs / str(count) / "last.pt")
    assert all(equal(dict(model), dict(saved["model"])) for model in models)
    assert saved["processes"] == count
    assert [part["steps"][4][1] for part in recorded(runs, 3)] == [1, 1, 0]


@pytest.mark.parametrize("count", [2, 3])
def test_it_is_the_training_of_one_process(runs, count):
    one, several = recorded(runs, 1), recorded(runs, count)
    # Rounding grows from step to step, where an activation changes its sign: 1e-4 is the third step's.
    assert step_losses(several)[:1] == pytest.approx(step_losses(one)[:1], rel=1e-6)
    assert step_losses(several)[:3] == pytest.approx(step_losses(one)[:3], rel=1e-3)
    for name, expected in one[0]["float64"].items():
        torch.testing.assert_close(several[0]["float64"][name], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("count", [2, 3])
def test_averages_are_over_each_image_once(runs, count, s8, capsys):
    last = load_checkpoint(runs / str(count) / "last.pt")["metrics"][-1]
    assert s8("--evaluate", str(runs / str(count) / "last.pt")) == 0
    assert f"Test Loss: {last['valid_loss']:.4f}, Test Acc: {last['valid_accuracy']:.4f}" in capsys.readouterr().out
    losses = step_losses(recorded(runs, count))
    assert last["train_loss"] == pytest.approx(np.average(losses[5:], weights=[37, 37, 37, 37, 2]), rel=1e-6)
    hits = last["train_accuracy"] * 150 / 100
    assert hits == pytest.approx(round(hits), abs=1e-9)


def test_run_that_ends_early_says_why_once_and_can_be_continued(runs, tmp_path, s8, capsys):
    at = ("--kill-at", "9")  # in the second epoch
    killed = torchrun(2, "--on-rank", "0", *at, "update", *NEW, "--run-dir", "killed", folder=tmp_path)
    stopped = torchrun(2, "--on-rank", "1", *at, "torchrun", *NEW, "--run-dir", "stopped", folder=tmp_path)

    saved = "epoch 1 is saved; to continue: torchrun --nproc-per-node 2 train.py --resume"
    well, out, ours = end(killed)
    assert (well, out.count("Epoch 1/2 Summary"), len(ours)) == (False, 1, 1)
    # SIGTERM where torchrun sees the death before the other process does
    assert ours[0].startswith(("train.py: stopped: another process of the run died", "train.py: stopped by SIGTERM"))
    assert ours[0].endswith(f"; {saved} killed")
    assert end(stopped)[::2] == (False, [f"train.py: stopped by SIGTERM; {saved} stopped"])

    well, out, ours = end(torchrun(2, "--resume", "killed", folder=tmp_path))
    assert (well, ours) == (True, [])
    assert "Note" not in out
    assert equal(outcome(tmp_path / "killed"), outcome(runs / "2"))
    assert s8("--resume", "stopped") == 0
    assert "Note: processes: 2 before, 1 now" in capsys.readouterr().out


# --- the parts, in one process ---


def test_parts_of_the_processes_make_up_each_batch():
    for world_size in (2, 3):
        parts = [list(EpochBatches(150, 37, 0, rank, world_size)) for rank in range(world_size)]
        for (_, whole), *batch in zip(EpochBatches(150, 37, 0), *parts, strict=True):
            indices = [part[1].tolist() for part in batch]
            assert sorted(itertools.chain(*indices)) == sorted(whole.tolist())
            assert max(map(len, indices)) - min(map(len, indices)) <= 1


def test_part_without_an_image():
    split = draw_shapes(5, np.random.default_rng(0))
    normalization = make_normalization((0.5,) * 3, (0.25,) * 3)
    assert [len(labels) for _, labels in FixedBatches(split, normalization, 4, rank=1, world_size=2)] == [2]
    none = {f"{name}_probability": 0.0 for name in ("flip", "shift_scale_rotate", "coarse_dropout")}
    augmentation = make_augmentation((0.5,) * 3, **none, shift_limit=0, scale_limit=0, rotate_limit=0, hole_size=1)
    images, labels = AugmentedBatches(split, augmentation, normalization, 0)[1, np.arange(5)[5:]]
    assert (images.shape, labels.shape) == ((0, 3, 32, 32), (0,))


def test_shared_batchnorm_of_one_process_is_batchnorm():
    torch.manual_seed(0)
    plain, shared = nn.BatchNorm2d(8), processes.SharedBatchNorm2d(8)
    x = 3 + 5 * torch.randn(6, 8, 5, 5)
    outputs, gradients = [], []
    for layer in (plain, shared):
        inputs = x.clone().requires_grad_()
        outputs.append(layer(inputs))
        (outputs[-1] ** 3).sum().backward()
        gradients.append([inputs.grad, layer.weight.grad, layer.bias.grad])
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(dict(shared.state_dict()), dict(plain.state_dict()))
    torch.testing.assert_close(shared.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shared_statistics_leave_the_network_as_it_is(monkeypatch, device):
    plain, shared = Net().eval(), Net()
    before = list(shared.state_dict())
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    processes.share_statistics(shared, torch.device(device))
    kinds = {type(module) for module in shared.modules()}
    assert (nn.SyncBatchNorm if device == "cuda" else processes.SharedBatchNorm2d) in kinds
    assert nn.BatchNorm2d not in kinds
    assert list(shared.state_dict()) == before
    layers = [module for module in shared.modules() if type(module) in (nn.SyncBatchNorm, processes.SharedBatchNorm2d)]
    assert all(layer.forward._torchdynamo_disable for layer in layers)  # compiled, the losses were NaN
    shared.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(shared.eval()(x), plain(x))  # with the ReLUs


def test_only_the_first_process_is_heard(monkeypatch, capsys):
    monkeypatch.setattr(processes.dist, "is_torchelastic_launched", lambda: True)
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(processes.dist, name, lambda *args, **kwargs: None)
    for rank, heard in ((0, "a mistake\n"), (1, "")):
        with monkeypatch.context() as patch:
            for name in ("stdout", "stderr"):
                patch.setattr(sys, name, getattr(sys, name))  # to be put back
            patch.setattr(processes, "rank", lambda rank=rank: rank)
            with processes.process_group():
                print("a mistake", file=sys.stderr)
        assert capsys.readouterr().err == heard


def test_first_rank_does_it_and_the_others_get_the_result(monkeypatch):
    def broadcast(values):
        sent.append(values[0])
        values[0] = "result"

    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes.dist, "broadcast_object_list", broadcast)
    for rank, own in ((0, "result"), (1, None)):
        sent = []
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        assert processes.on_first_rank(lambda argument: argument, "result") == "result"
        assert sent == [own]


@pytest.mark.parametrize(("rank", "local_rank", "waits"), [(0, 0, "with.."), (8, 0, ".with."), (9, 1, "..with")])
def test_first_rank_then_the_first_of_each_machine_then_the_rest(monkeypatch, rank, local_rank, waits):
    order = []
    monkeypatch.setattr(processes, "sum_over_processes", lambda tensor: order.append("."))
    monkeypatch.setattr(processes, "rank", lambda: rank)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    with processes.first_rank_first():
        order.append("with")
    assert "".join(order) == waits


def test_processes_of_one_machine_divide_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert utils.choose_workers(-1, torch.device("cuda")) == 3
    assert [utils.choose_workers(-1, CPU), utils.choose_workers(5, CPU)] == [1, 5]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert [utils.choose_workers(-1, CPU), utils.choose_workers(-1, torch.device("cuda"))] == [0, 1]


def test_one_device_is_not_for_several_processes(monkeypatch):
    monkeypatch.setattr(utils, "world_size", lambda: 2)
    for name in ("cuda:1", "mps"):
        with pytest.raises(utils.UsageError, match=f"device '{name}' is not for 2 processes: give --device cuda"):
            utils.choose_device(name)
    assert utils.choose_device("cpu") == CPU


def test_dropout_differs_between_processes():
    numbers = []
    for rank in (0, 1, 0):
        utils.seed_torch(0, 1, rank)
        numbers.append(torch.rand(1).item())
    assert numbers[0] == numbers[2] != numbers[1]
