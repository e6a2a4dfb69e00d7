"""How fast the parts are, against the plain loop that the specification describes; prints one table.

python -m tests.benchmark [--dataset cifar10 | shapes] [--data-dir DIR] [--device DEVICE] [--precision PRECISION]
                          [--rounds 7] [--images 1152]

The plain loop is that of plain.py. It runs in a process of its own, because train.py changes settings of its
process. Everything is measured in one run, in turn, so that what else the machine does strikes all alike; a figure is
the median over the rounds, with their spread. Augmentation has the specification's probabilities (0.3) on both sides.
"""

import argparse
import functools
import multiprocessing
import operator
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from extras.distributed import process_group, share_training
from extras.sources import SHAPES, Split, load_source
from extras.speed import keep_freed_memory
from tests.plain import BATCH_SIZE, one_epoch, plain_functions
from torch import distributed as dist

from config import config
from dataset import ImageDataset, channel_statistics, make_augmentation, make_loader
from model import Net
from train import make_optimizers, train_one_epoch, train_step, validate
from utils import DTYPES, choose_device, choose_precision, choose_workers, device_name

ROOT = Path(__file__).parent.parent
ROW = "| {:30} | {:25} | {:34} | {:7} |"
SPECIFIED = {f"{name}_probability": 0.3 for name in ("flip", "shift_scale_rotate", "coarse_dropout")}
SPECIFIED |= {"shift_limit": 0.0625, "scale_limit": 0.1, "rotate_limit": 15.0, "hole_size": 16}


@dataclass(frozen=True)
class Options:
    dataset: str = "shapes"
    data_dir: str = "data"
    device: str = "auto"
    precision: str = "auto"
    rounds: int = 7
    images: int = 1152  # a multiple of 128


def load_split(options):
    split = load_source(options.dataset, options.data_dir).train
    return Split(*(array[: options.images] for array in split))


def seconds(function, device):
    """Seconds that a call takes, work queued on the device included."""
    begin = time.perf_counter()
    function()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - begin


def rate(count, times):
    """Images per second: the median and its spread."""
    rates = sorted(count / time for time in times)
    return f"{statistics.median(rates):,.0f} ({rates[0]:,.0f} to {rates[-1]:,.0f})"


@functools.cache  # made at the first call in the process of the plain loop
def plain_setup(options):
    device = choose_device(options.device)
    return plain_functions(load_split(options), device), device


def plain_seconds(name, options):
    functions, device = plain_setup(options)
    return seconds(functions[name], device)


def our_functions(split, device, dtype):
    """This project's: name -> function that handles every image of the split once."""
    settings = replace(config, **SPECIFIED)
    mean, std = channel_statistics(split.images)
    augmented = ImageDataset(*split, SHAPES, mean, std, make_augmentation(settings, mean))
    loader = make_loader(augmented, BATCH_SIZE, shuffle=True, num_workers=choose_workers(-1, device))
    pipeline = make_loader(augmented, BATCH_SIZE, shuffle=True)
    valid_loader = make_loader(ImageDataset(*split, SHAPES, mean, std), BATCH_SIZE)
    net = Net().to(device, memory_format=torch.channels_last)
    optimizers = make_optimizers(net, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    placed = [(images.to(device, memory_format=torch.channels_last), y.to(device)) for images, y in valid_loader]

    def bare_steps():
        net.train()
        for images, labels in placed:
            train_step(net, images, labels, optimizers, dtype, scaler)

    return {
        "training": lambda: train_one_epoch(net, loader, optimizers, dtype=dtype, scaler=scaler),
        "bare steps": bare_steps,
        "validation": lambda: validate(net, valid_loader, dtype),
        "input pipeline": lambda: one_epoch(pipeline),
    }


def throughput(options, plain):
    """Rows on training, validation and the input pipeline: ours, plain, and the median of their ratios."""
    device = choose_device(options.device)
    timed = {}
    for name, function in our_functions(load_split(options), device, DTYPES[options.precision]).items():
        if name != "bare steps":
            timed[f"{name}, plain"] = lambda name=name: plain.submit(plain_seconds, name, options).result()
        timed[name] = lambda function=function: seconds(function, device)
    for function in timed.values():
        function()  # to warm up
    rounds = [{name: function() for name, function in timed.items()} for _ in range(options.rounds)]
    times = {name: [times[name] for times in rounds] for name in timed}
    for name in ("training", "validation", "input pipeline"):
        plain_times = times[f"{name}, plain"]
        ratio = statistics.median(map(operator.truediv, plain_times, times[name]))
        ours, theirs = rate(options.images, times[name]), rate(options.images, plain_times)
        yield f"{name}, images/s", ours, f"plain: {theirs}", f"{ratio:.2f}x"
    overhead = statistics.median(map(operator.truediv, times["training"], times["bare steps"]))
    ours, bare = rate(options.images, times["training"]), rate(options.images, times["bare steps"])
    yield "whole loop, images/s", ours, f"bare steps: {bare}", f"{overhead:.2f}x"


PYTHON = sys.orig_argv[: sys.orig_argv.index("-m")]  # and its wrapper, if this was started by one

# train.py, left at the beginning of a step.
UNTIL_STEP = """
import itertools, os, train
steps, step = itertools.count(1), train.train_step
train.train_step = lambda *args: os._exit(0) if next(steps) == {} else step(*args)
train.command_line.run(train.main)
"""


def run_python(code, *argv, watch=lambda pid: None):
    """Seconds that Python code takes in a process of its own, started as this one was."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        command = [*PYTHON, "-c", code, *argv, "--run-dir", f"{folder}/run"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            watch(process.pid)
            time.sleep(0.02)
        if process.returncode:
            sys.exit(f"this failed: {code}")
        return time.perf_counter() - begin


def proportional_memory(pid):
    """Memory of a process and its children in MiB, a page that several share divided among them (Linux)."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has just ended
        return 0
    own = sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 1024
    return own + sum(map(proportional_memory, children))


def start_and_memory(options):
    """Rows on the start of a run, and on the memory of its first seconds of training."""
    argv = ("--dataset", options.dataset, "--data-dir", options.data_dir, "--no-report")
    argv += ("--device", options.device, "--precision", options.precision)
    codes = {"import torch": "import torch", "from model import Net": "from model import Net"}
    codes["first step"] = UNTIL_STEP.format(1)
    rounds = [{name: run_python(code, *argv) for name, code in codes.items()} for _ in range(3)]
    medians = {name: statistics.median(times[name] for times in rounds) for name in codes}
    floor = medians.pop("import torch")
    for name, value in medians.items():
        yield f"start: {name}", f"{value:.1f} s", f"import torch: {floor:.1f} s", f"{value - floor:+.1f} s"
    if Path("/proc/self/smaps_rollup").exists():
        peaks = [0.0]
        run_python(UNTIL_STEP.format(51), *argv, watch=lambda pid: peaks.append(proportional_memory(pid)))
        yield "memory, workers included", f"{max(peaks) / 1024:.2f} GiB", "", ""


def shared_epochs(options):
    """One of several processes: train for three epochs on the CPU; rank 0 prints the seconds of the last two."""
    keep_freed_memory()
    with process_group("cpu"):
        rank, world_size = dist.get_rank(), dist.get_world_size()
        split = load_split(options)
        mean, std = channel_statistics(split.images)
        train = ImageDataset(*split, SHAPES, mean, std, make_augmentation(config, mean))
        loader = make_loader(train, BATCH_SIZE, True, rank=rank, world_size=world_size)
        net = Net().to(memory_format=torch.channels_last)
        optimizers = make_optimizers(net, config)
        if world_size > 1:
            share_training(net, BATCH_SIZE)
        epoch = functools.partial(train_one_epoch, net, loader, optimizers)
        times = [seconds(epoch, torch.device("cpu")) for _ in range(3)]
        if rank == 0:
            print(*times[1:])


def two_processes(options):
    """The row on two processes that share a run, against one; each has one thread."""
    times = {1: [], 2: []}
    for _ in range(3):
        for count, so_far in times.items():
            torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "--no-python")
            argv = [sys.executable, *torchrun, *PYTHON, "-m", "tests.benchmark", *sys.argv[1:]]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
            out = subprocess.run(argv, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            so_far += map(float, out.split())
    one, two = (rate(options.images, so_far) for so_far in times.values())
    ratio = statistics.median(times[1]) / statistics.median(times[2])
    yield "2 processes, images/s", two, f"1 process: {one}", f"{ratio:.2f}x"


def main(options):
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as plain:
        plain.submit(os.getpid).result()  # forked here, before torch has threads or CUDA, or the memory is kept
        keep_freed_memory()
        device = choose_device(options.device)
        options = replace(options, device=str(device), precision=choose_precision(options.precision, device))
        print(device_name(device), platform.machine(), options.precision, end=", ")
        print(f"torch {torch.__version__}, {options.dataset}\n")
        print(ROW.format("", "here", "compared with", "ratio"))
        print(ROW.format("", "", "", "").replace(" ", "-"))
        for rows in (throughput(options, plain), start_and_memory(options), two_processes(options)):
            for row in rows:
                print(ROW.format(*row), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for field in fields(Options):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, default=field.default)
    options = Options(**vars(parser.parse_args()))
    shared_epochs(options) if dist.is_torchelastic_launched() else main(options)
