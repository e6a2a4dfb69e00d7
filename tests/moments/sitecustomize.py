"""Lets a test kill `python train.py` at a moment that has a name; Python imports this file at its start.

DIE_AT="write last.pt": when that file's temporary is opened; DIE_AT="replace best.pt": when it would get its name;
DIE_IN_RANK="1": only in that one of torchrun's processes.
"""

import os
import signal
import sys

what, _, name = os.environ.get("DIE_AT", "").partition(" ")


def watch(event, args):
    """Python tells this function of each file that is opened or renamed."""
    if (event, what) not in (("open", "write"), ("os.rename", "replace")):
        return
    path = str(args[0] if event == "open" else args[1])
    if os.path.basename(path).startswith(name) and (what == "replace" or path.endswith(".tmp")):
        os.kill(os.getpid(), signal.SIGKILL)


if what and os.environ.get("RANK") == os.environ.get("DIE_IN_RANK"):
    sys.addaudithook(watch)
