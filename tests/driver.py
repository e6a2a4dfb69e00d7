"""train.py on a few shapes, in a process of its own.

`--kill-at N CALL` first: a real SIGKILL at the Nth such call (of Meter.update if CALL is "worker");
`--start-method NAME` first: how workers start.
"""

import multiprocessing
import os
import signal
import sys

import sources
import train
import utils
from tests.conftest import few_shapes


def kill_at(count, owner, name, victim):
    original = getattr(owner, name)

    def counted(*args, **kwargs):
        nonlocal count
        count -= 1
        if count == 0:
            os.kill(victim(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


CALLS = {
    "update": (utils.Meter, "update", os.getpid),
    "fsync": (os, "fsync", os.getpid),
    "replace": (os, "replace", os.getpid),
    "worker": (utils.Meter, "update", lambda: multiprocessing.active_children()[0].pid),
}


if __name__ == "__main__":
    sources.load_shapes = few_shapes
    if sys.argv[1] == "--kill-at":
        kill_at(int(sys.argv[2]), *CALLS[sys.argv[3]])
        del sys.argv[1:4]
    if sys.argv[1] == "--start-method":
        multiprocessing.set_start_method(sys.argv[2])
        del sys.argv[1:3]
    sys.argv.append("--no-report")  # pictures take seconds
    train.run()
