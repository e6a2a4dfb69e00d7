"""How an end before time is told, in one line: open it to see what each error ends in."""

import errno
import re
import signal

from torch import distributed as dist

from config import UsageError
from utils import RunStopped


class Stop(BaseException):
    """Ctrl-C or SIGTERM; no Exception, so that no library takes it for an error that it can handle."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


def describe_failure(error: BaseException) -> tuple[int, str] | None:
    """Return exit code and message for a user's mistake or what befell the run; None for a mistake of ours."""
    text = str(error).partition("\n")[0]
    if isinstance(error, UsageError):
        return 2, f"error: {text}"
    if isinstance(error, Stop):
        return 128 + error.signum, f"stopped by {signal.Signals(error.signum).name}"
    if isinstance(error, RunStopped):
        return 1, f"stopped: {text}"
    out_of_memory = re.search("out of memory|not enough memory|can't allocate memory", text)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and out_of_memory):
        return 1, "stopped: out of memory; a new run needs a smaller --batch-size"
    if isinstance(error, BrokenPipeError):
        return 1, "stopped: nobody reads the output any more"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return 1, "stopped: the output cannot be written, there is no space left"
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in text):
        return 1, "stopped: another process of the run died or does not answer"
    worker_died = isinstance(error, RuntimeError) and text.startswith("DataLoader worker")
    if worker_died or isinstance(error, (ConnectionError, EOFError)):  # the latter, while its batch is received
        return 1, f"stopped: a process that augments images died ({text or 'its batch broke off'})"
    return None
