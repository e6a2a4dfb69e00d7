"""train.py on a few shapes, in a process of its own, perhaps one of torchrun's.

What may come first: `--kill-at N CALL`: a real SIGKILL at the Nth such call (of Meter.update if CALL is "worker");
`--start-method NAME`: how workers start; `--on-rank R` before --kill-at: in this one of torchrun's processes only;
`--record FOLDER`: each process leaves what it has in its own memory there.
"""

import atexit
import gc
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import torch

import processes
import sources
import train
import utils
from model import Net
from optimizer import make_optimizers
from tests.conftest import few_shapes


def kill_at(count, owner, name, kill):
    original = getattr(owner, name)

    def counted(*args, **kwargs):
        nonlocal count
        count -= 1
        if count == 0:
            kill()
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def kill_myself():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_a_worker():
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


def terminate_torchrun():
    time.sleep(1)  # the other processes wait for this one by then, and fail after it: they must not speak
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)  # until it passes the signal on


CALLS = {
    "update": (utils.Meter, "update", kill_myself),
    "fsync": (os, "fsync", kill_myself),
    "replace": (os, "replace", kill_myself),
    "worker": (utils.Meter, "update", kill_a_worker),
    "torchrun": (utils.Meter, "update", terminate_torchrun),
}


def float64_steps():
    """Return the weights and buffers after steps on 7 images and on 2, in float64, where rounding hides nothing."""
    torch.manual_seed(0)
    net = Net().double().to(memory_format=torch.channels_last)
    processes.share_statistics(net, torch.device("cpu"))
    optimizers = make_optimizers(net, learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for count in (7, 2):
        images, labels = torch.randn(count, 3, 32, 32, dtype=torch.float64), torch.arange(count)
        part = slice(processes.rank(), None, processes.world_size())
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        train.train_step(net, images[part], labels[part], optimizers, scaler, torch.float32)
    return net.state_dict()


def record(folder):
    """Save, after the training: the sums of each step's losses, the batches' sizes, the weights, float64_steps().

    Each process draws first weights of its own here, as on machines that are not alike: rank 0's must count.
    """
    steps, fit, train_step = [], train.fit, train.train_step

    def recorded_step(net, images, *rest):
        loss, log_probs = train_step(net, images, *rest)
        steps.append((loss.item(), len(images)))
        return loss, log_probs

    def recorded_fit(config, data, net, *rest):
        fit(config, data, net, *rest)
        Path(folder).mkdir(exist_ok=True)
        content = {"steps": list(steps), "model": net.state_dict(), "float64": float64_steps()}
        torch.save(content, f"{folder}/{processes.rank()}.pt")

    def seed_torch(seed, epoch, rank=0):
        utils.seed_torch(seed + processes.rank() if epoch == 0 else seed, epoch, rank)

    train.train_step, train.fit, train.seed_torch = recorded_step, recorded_fit, seed_torch


if __name__ == "__main__":
    atexit.register(gc.freeze)  # or the interpreter takes a second to collect what torch has left
    sources.load_shapes = few_shapes
    if sys.argv[1] == "--record":
        record(sys.argv[2])
        del sys.argv[1:3]
    chosen = True
    if sys.argv[1] == "--on-rank":
        chosen = os.environ["RANK"] == sys.argv[2]
        del sys.argv[1:3]
    if sys.argv[1] == "--kill-at":
        if chosen:
            kill_at(int(sys.argv[2]), *CALLS[sys.argv[3]])
        del sys.argv[1:4]
    if sys.argv[1] == "--start-method":
        multiprocessing.set_start_method(sys.argv[2])
        del sys.argv[1:3]
    sys.argv.append("--no-report")  # pictures take seconds
    train.run()
