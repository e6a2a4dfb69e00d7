"""Lets a test kill `python train.py` at a moment that has a name; Python imports this file at its start.

DIE_AT="write last.pt 2": when its temporary is opened for the second time; DIE_AT="replace best.pt 1": when the file
would get its name for the first time.
QUICK_END="yes": Python does not collect what torch has left at the end, which takes it a second.
"""

import atexit
import gc
import itertools
import os
import signal
import sys

what, name, nth = os.environ.get("DIE_AT", "- - 0").split()
times = itertools.count(1)


def watch(event, args):
    """Python tells this function of each file that is opened or renamed."""
    if event == {"write": "open", "replace": "os.rename"}[what]:
        file = os.path.basename(str(args[what == "replace"]))
        if file.startswith(name) and file.endswith(".tmp" if what == "write" else name) and next(times) == int(nth):
            os.kill(os.getpid(), signal.SIGKILL)


if "DIE_AT" in os.environ:
    sys.addaudithook(watch)
if "QUICK_END" in os.environ:
    atexit.register(gc.freeze)
