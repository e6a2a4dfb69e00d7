"""What a run that ends early says in one line, and what is only a warning: open it to see how each error ends."""

import contextlib
import errno
import functools
import re
import signal
import sys
import warnings
from collections.abc import Iterator

from torch import distributed as dist

from config import UsageError


class RunStopped(Exception):
    """The early end of a run that is not a bug of the program; the message is one line for the user.

    resumable: whether it makes sense to continue the run; not if it would end in the same way again.
    """

    def __init__(self, message: str, resumable: bool = True):
        super().__init__(message)
        self.resumable = resumable


class SignalReceived(BaseException):
    """Ctrl-C or SIGTERM; not an Exception, so that no library takes it for an error that it can handle."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


@functools.cache
def warn(message: str) -> None:
    """Print one line on stderr, once for each message; the run goes on."""
    print(f"train.py: warning: {message}", file=sys.stderr)


@contextlib.contextmanager
def only_warn(what: str) -> Iterator[None]:
    """Let mere decoration fail: a picture that cannot be drawn costs one warning line, not the run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        warn(f"{what} cannot be drawn ({type(error).__name__}: {str(error).partition(chr(10))[0][:150]})")


SHARED_MEMORY_FULL = "shared memory|/dev/shm|Bus error|torch_shm|</torch_|exit code 75"  # 75: see workers.py
OUT_OF_MEMORY = "out of memory|not enough memory|can't allocate memory|C(UBLAS|UDNN)_STATUS_ALLOC_FAILED"


def describe_failure(error: BaseException) -> tuple[int, str] | None:
    """Return exit code and message for a user's mistake or a mishap of the run; None for a bug of ours."""
    whole = " ".join(str(error).splitlines())
    text = str(error).partition("\n")[0]
    if isinstance(error, UsageError):
        return 2, f"error: {whole.rpartition('UsageError: ')[2]}"  # a worker's has its traceback in front
    if isinstance(error, SignalReceived):
        return 128 + error.signum, f"stopped by {signal.Signals(error.signum).name}"
    if isinstance(error, RunStopped):
        return 1, f"stopped: {whole}"
    if isinstance(error, BrokenPipeError):
        return 1, "stopped: nobody reads the output any more"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return 1, "stopped: the output cannot be written, there is no space left"
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in whole):
        return 1, f"stopped: another process of the run died or does not answer ({whole[:800]})"
    if isinstance(error, (MemoryError, RuntimeError)) and re.search(SHARED_MEMORY_FULL, whole):
        return 1, (
            "stopped: no shared memory is left for the processes that augment: give Docker --shm-size 1g, or "
            "fewer --num-workers, or a smaller --batch-size in a new run"
        )
    if isinstance(error, (OSError, RuntimeError)) and "Too many open files" in whole:
        return 1, "stopped: too many open files: raise the limit (ulimit -n 65536), or give fewer --num-workers"
    if isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.EAGAIN):
        return 1, "stopped: no memory or no process is left for those that augment: give fewer --num-workers"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and re.search(OUT_OF_MEMORY, whole)):
        return 1, "stopped: out of memory; a new run needs a smaller --batch-size"
    worker_died = isinstance(error, RuntimeError) and re.match("DataLoader worker|Pin memory thread", text)
    if worker_died or isinstance(error, (ConnectionError, EOFError)):  # the latter, while its batch is received
        return 1, f"stopped: a process that augments images died ({text or 'its batch broke off'})"
    return None
