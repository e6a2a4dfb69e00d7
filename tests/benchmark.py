"""How fast the parts are, against the plain loop that the specification describes; prints one table.

python -m tests.benchmark [--dataset cifar10 | shapes] [--data-dir DIR] [--device DEVICE] [--precision PRECISION]
                          [--rounds 7] [--images 1152]

The plain loop is that of plain.py. It runs in a process of its own, because train.py changes settings of its
process. Everything is measured in one run, in turn, so that what else the machine does strikes all alike; a figure is
the median over the rounds, with their spread. Augmentation has the specification's probabilities (0.3) on both sides.
"""

import argparse
import dataclasses
import functools
import itertools
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
from pathlib import Path
from typing import NamedTuple

import torch

from config import config
from dataset import ImageDataset, channel_statistics, make_augmentation, make_loader
from extras.sources import SHAPES, Split, load_source
from extras.speed import keep_freed_memory
from model import Net
from tests.plain import BATCH_SIZE, one_epoch, plain_functions
from train import make_optimizers, train_one_epoch, train_step, validate
from utils import DTYPES, choose_device, choose_precision, choose_workers, describe_device

ROOT = Path(__file__).parent.parent
ROW = "| {:30} | {:25} | {:34} | {:7} |"


def seconds(function, device):
    """Seconds that a call takes, work queued on the device included."""
    begin = time.perf_counter()
    function()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - begin


def interleave(timed, rounds):
    """Call each function once to warm up, then all in turn; return the seconds that each returned, a list for each."""
    for function in timed.values():
        function()
    times = {name: [] for name in timed}
    for _ in range(rounds):
        for name, function in timed.items():
            times[name].append(function())
    return times


@functools.cache  # made at the first call in the process of the plain loop
def plain_setup(options):
    device = choose_device(options.device)
    return plain_functions(load_split(options), device), device


def plain_seconds(name, options):
    functions, device = plain_setup(options)
    return seconds(functions[name], device)


def functions(split, device, dtype):
    """This project's: name -> function that handles every image of the split once."""
    as_specified = {"shift_limit": 0.0625, "hole_size": 16, "scale_limit": 0.1, "rotate_limit": 15.0}
    as_specified |= {f"{name}_probability": 0.3 for name in ("flip", "shift_scale_rotate", "coarse_dropout")}
    settings = dataclasses.replace(config, **as_specified)
    mean, std = channel_statistics(split.images)
    fixed = ImageDataset(*split, SHAPES, mean, std)
    augmented = ImageDataset(*split, SHAPES, mean, std, make_augmentation(settings, mean))
    loader = make_loader(augmented, BATCH_SIZE, shuffle=True, num_workers=choose_workers(-1, device))
    pipeline = make_loader(augmented, BATCH_SIZE, shuffle=True)
    valid_loader = make_loader(fixed, BATCH_SIZE)
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


# A script that ends at its first step; with the same interpreter and wrapper as this one.
UNTIL_FIRST_STEP = "import os, train; train.train_step = lambda *args: os._exit(0); train.command_line.run(train.main)"


def run_script(code, *argv, watch=lambda pid: None):
    """Run Python code in a process of its own, started as this one was; return its seconds."""
    prefix = sys.orig_argv[: sys.orig_argv.index("-m")]
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")
        script.write_text(code)
        begin = time.perf_counter()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        argv = [*prefix, script, *argv, *(("--no-report", "--run-dir", Path(folder, "run")) if argv else ())]
        process = subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            watch(process.pid)
            time.sleep(0.02)
        if process.returncode:
            sys.exit(f"{' '.join(map(str, argv))} failed")
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
    argv = ("--dataset", options.dataset, "--data-dir", options.data_dir)
    argv += ("--device", options.device, "--precision", options.precision)
    times = {"import torch": [], "from model import Net": [], "first step": []}
    for _ in range(3):
        times["import torch"].append(run_script("import torch"))
        times["from model import Net"].append(run_script("from model import Net"))
        times["first step"].append(run_script(UNTIL_FIRST_STEP, *argv))
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    floor = medians.pop("import torch")
    for name, value in medians.items():
        yield f"start: {name}", f"{value:.1f} s", f"import torch: {floor:.1f} s", f"{value - floor:+.1f} s"
    if Path("/proc/self/smaps_rollup").exists():
        peak = 0.0

        def watch(pid):
            nonlocal peak
            peak = max(peak, proportional_memory(pid))

        code = "import itertools, os, train; steps = itertools.count(); step = train.train_step\n"
        code += "train.train_step = lambda *args: os._exit(0) if next(steps) == 50 else step(*args)\n"
        code += "train.command_line.run(train.main)"
        run_script(code, *argv, watch=watch)
        yield "memory, workers included", f"{peak / 1024:.2f} GiB", "", ""


# A run that trains on some of the images, and prints each epoch's seconds of training.
TIMED_EPOCHS = """
import time, dataset, train
from extras.sources import Source, Split

def load_some(*args, load=dataset.load_source):
    source = load(*args)
    return Source(Split(*(array[:IMAGES] for array in source.train)), source.test, source.class_names)

def train_one_epoch(*args, train_one_epoch=train.train_one_epoch):
    begin = time.perf_counter()
    result = train_one_epoch(*args)
    print("seconds", time.perf_counter() - begin, flush=True)
    return result

dataset.load_source, train.train_one_epoch = load_some, train_one_epoch
train.validate = lambda *args: {"loss": 0.0, "accuracy": 0.0}
train.command_line.run(train.main)
"""


def epoch_seconds(processes, options):
    """Run three epochs on the CPU in processes of one thread each; return the seconds of the last two."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")
        script.write_text(TIMED_EPOCHS.replace("IMAGES", str(options.images)))
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--no-python")
        prefix = sys.orig_argv[: sys.orig_argv.index("-m")]
        argv = ("--dataset", options.dataset, "--data-dir", options.data_dir, "--device", "cpu", "--num-workers", "0")
        argv = (*argv, "--precision", "float32", "--epochs", "3", "--no-report", "--run-dir", Path(folder, "run"))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        argv = [sys.executable, *torchrun, *prefix, script, *argv]
        out = subprocess.run(argv, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [float(line.split()[1]) for line in out.splitlines() if line.startswith("seconds")][1:]


def two_processes(options):
    """The row on two processes that share a run, against one; each has one thread."""
    rounds = [(epoch_seconds(1, options), epoch_seconds(2, options)) for _ in range(3)]
    one, two = (list(itertools.chain(*part)) for part in zip(*rounds, strict=True))
    ratio = statistics.median(one) / statistics.median(two)
    name = "2 processes, images/s"
    yield name, rate(options.images, two), f"1 process: {rate(options.images, one)}", f"{ratio:.2f}x"


def rate(count, seconds):
    """Images per second: the median and its spread."""
    rates = sorted(count / second for second in seconds)
    return f"{statistics.median(rates):,.0f} ({rates[0]:,.0f} to {rates[-1]:,.0f})"


def throughput(options, plain):
    """Rows on training, validation and the input pipeline: ours, plain, and the median of their ratios."""
    device, dtype = choose_device(options.device), DTYPES[options.precision]
    timed = {}
    for name, function in functions(load_split(options), device, dtype).items():
        if name != "bare steps":
            timed[f"{name}, plain"] = lambda name=name: plain.submit(plain_seconds, name, options).result()
        timed[name] = lambda function=function: seconds(function, device)
    times = interleave(timed, options.rounds)
    for name in ("training", "validation", "input pipeline"):
        plain_times = times[f"{name}, plain"]
        ratio = statistics.median(map(operator.truediv, plain_times, times[name]))
        ours, theirs = rate(options.images, times[name]), rate(options.images, plain_times)
        yield f"{name}, images/s", ours, f"plain: {theirs}", f"{ratio:.2f}x"
    overhead = statistics.median(map(operator.truediv, times["training"], times["bare steps"]))
    ours, bare = rate(options.images, times["training"]), rate(options.images, times["bare steps"])
    yield "loop overhead (time), images/s", ours, f"bare steps: {bare}", f"{overhead:.2f}x"


class Options(NamedTuple):
    dataset: str
    data_dir: str
    device: str
    precision: str
    rounds: int
    images: int


def load_split(options):
    """The first of the training images."""
    split = load_source(options.dataset, options.data_dir).train
    return Split(*(array[: options.images] for array in split))


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark")
    parser.add_argument("--dataset", default="shapes", choices=["cifar10", "shapes"])
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=1152, help="a multiple of 128 (default: 1152)")
    options = Options(**vars(parser.parse_args()))
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as plain:
        plain.submit(os.getpid).result()  # forked here, before torch has threads or CUDA, or the memory is kept
        keep_freed_memory()
        device = choose_device(options.device)
        options = options._replace(device=str(device), precision=choose_precision(options.precision, device))
        print(describe_device(device), platform.machine(), options.precision, end=", ")
        print(f"torch {torch.__version__}, {options.dataset}\n")
        print(ROW.format("", "here", "compared with", "ratio"))
        print(ROW.format("", "", "", "").replace(" ", "-"))
        rows = throughput(options, plain), start_and_memory(options), two_processes(options)
        for name, here, compared, ratio in itertools.chain(*rows):
            print(ROW.format(name, here, compared, ratio), flush=True)


if __name__ == "__main__":
    main()
