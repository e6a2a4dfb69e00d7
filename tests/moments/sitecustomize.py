"""Lets a test end `python train.py` at a moment that has a name; Python imports this file at its start.

DIE_AT="write last.pt": when that file's temporary is opened; DIE_AT="replace best.pt": when it would get its name;
DIE_AT="import torch": when that module is imported. DIE_OF="SIGINT": of that signal instead of SIGKILL.
DIE_IN_RANK="1": only in that one of torchrun's processes.
START_METHOD="spawn": how the processes that augment are started.
QUICK_END="yes": Python does not collect what torch has left at the end, which takes it a second.
"""

import atexit
import gc
import multiprocessing
import os
import signal
import sys

what, _, name = os.environ.get("DIE_AT", "").partition(" ")
EVENT = {"write": "open", "replace": "os.rename", "import": "import"}.get(what)


def watch(event, args):
    """Python tells this function of each file that is opened or renamed, and of each module."""
    if event == EVENT:
        found = os.path.basename(str(args[1] if what == "replace" else args[0]))
        if found.startswith(name) and found.endswith(".tmp" if what == "write" else name):
            os.kill(os.getpid(), signal.Signals[os.environ.get("DIE_OF", "SIGKILL")])


if what and os.environ.get("RANK") == os.environ.get("DIE_IN_RANK"):
    sys.addaudithook(watch)
if "START_METHOD" in os.environ:
    multiprocessing.set_start_method(os.environ["START_METHOD"])
if "QUICK_END" in os.environ:
    atexit.register(gc.freeze)
