"""Kill one training at random moments, again and again, and compare it with one that was left alone.

python -m tests.soak [KILLS]     (default 20; about 12 s each on 2 cores; not part of the test suite)
"""

import random
import sys
import tempfile
import threading
from pathlib import Path

from tests.conftest import equal, outcome, start
from utils import load_checkpoint

NEW = ("--dataset", "shapes", "--batch-size", 64, "--dropout", 0.1, "--schedule", "cosine")


def go_on(run: Path, kills: int, workers: int, patience: float = 1e6, **moment: str) -> None:
    """Begin the run, or continue it, for so many seconds."""
    argv = ("--resume", run) if (run / "last.pt").exists() else (*NEW, "--epochs", kills, "--run-dir", run)
    process = start(*argv, "--num-workers", workers, "--no-report", cwd=run.parent, **moment)
    clock = threading.Timer(patience, process.kill)
    clock.start()
    _, err = process.communicate()
    clock.cancel()
    assert process.returncode in (0, -9), err
    epoch = load_checkpoint(run / "last.pt")["epoch"] if (run / "last.pt").exists() else "nothing"
    print(f"{'ended' if process.returncode == 0 else 'killed'}: {epoch} of {kills} is saved", flush=True)


def main(kills: int) -> None:
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        killed, straight = Path(folder, "killed"), Path(folder, "straight")
        go_on(killed, kills, 1, DIE_AT="replace best.pt 1")  # between last.pt and best.pt
        for _ in range(kills - 1):  # from the first import to well after an epoch's end
            go_on(killed, kills, rng.randint(0, 3), rng.uniform(1, 12))
        go_on(killed, kills, 1)
        go_on(straight, kills, 0)
        assert equal(outcome(killed), outcome(straight)), "the runs differ"
    print("The same weights, optimizer state and metrics, bit for bit")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
