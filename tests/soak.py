"""Kill one training at random times, again and again, and compare it with one that was left alone.

python -m tests.soak [KILLS]     (default 50; about 12 s each on 2 cores; not part of the test suite)
"""

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.conftest import equal, outcome
from utils import load_checkpoint

TRAIN = Path(__file__).parent.parent / "train.py"
NEW = ("--dataset", "shapes", "--batch-size", "64", "--dropout", "0.1", "--epochs")


def start(folder, *argv):
    command = [sys.executable, TRAIN, *argv]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def saved_epoch(run_dir):
    return load_checkpoint(run_dir / "last.pt")["epoch"] if (run_dir / "last.pt").exists() else 0


def main(kills):
    rng = random.Random(0)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        killed, straight = Path(folder, "killed"), Path(folder, "straight")
        epochs = str(kills)
        argv = (*NEW, epochs, "--run-dir", "killed")
        count = 0
        while True:
            process = start(folder, *argv, "--num-workers", str(rng.randint(0, 3)))
            try:
                # From the first import to well after an epoch's end; kills before the first step count too.
                process.wait(timeout=rng.uniform(1, 12) if count < kills else None)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                count += 1
                print(f"kill {count}: epoch {saved_epoch(killed)} of {epochs} is saved", flush=True)
            else:
                if process.returncode:
                    sys.exit(process.stderr.read())
                break
            argv = ("--resume", "killed") if (killed / "config.json").exists() else argv
        if start(folder, *NEW, epochs, "--run-dir", "straight").wait():
            sys.exit("the undisturbed run failed")
        assert equal(outcome(killed), outcome(straight)), "the runs differ"
    print(
        f"{count} kills in {time.monotonic() - begin:.0f} s: the same weights, optimizer state and metrics, bit for bit"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
