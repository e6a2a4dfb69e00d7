"""Kill one training at random times, again and again, and compare it with one that was left alone.

python -m tests.soak [KILLS]     (default 50; about 12 s each on 2 cores; not part of the test suite)
"""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.conftest import equal, outcome, start
from utils import load_checkpoint

NEW = ("--dataset", "shapes", "--batch-size", "64", "--dropout", "0.1", "--epochs")


def main(kills):
    rng, begin, count = random.Random(0), time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        killed, straight = Path(folder, "killed"), Path(folder, "straight")
        argv = (*NEW, kills, "--run-dir", killed)
        while True:
            process = start(*argv, "--num-workers", rng.randint(0, 3), cwd=folder, stdout=subprocess.DEVNULL)
            try:
                # From the first import to well after an epoch's end; kills before the first step count too.
                process.wait(timeout=rng.uniform(1, 12) if count < kills else None)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            count += 1
            saved = load_checkpoint(killed / "last.pt")["epoch"] if (killed / "last.pt").exists() else 0
            print(f"kill {count}: epoch {saved} of {kills} is saved", flush=True)
            argv = ("--resume", killed) if (killed / "config.json").exists() else argv
        with start(*NEW, kills, "--run-dir", straight, cwd=folder, stdout=subprocess.DEVNULL) as other:
            for each in (process, other):
                if errors := each.communicate()[1]:
                    sys.exit(errors)
        assert equal(outcome(killed), outcome(straight)), "the runs differ"
    took = f"{count} kills in {time.monotonic() - begin:.0f} s"
    print(f"{took}: the same weights, optimizer state and metrics, bit for bit")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
