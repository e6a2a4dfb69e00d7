"""Worker processes that leave signals and output to the main process: open it when a DataLoader's workers misbehave."""

import contextlib
import multiprocessing.queues
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker

import cv2
from torch.utils.data import DataLoader

NO_SHARED_MEMORY = 75  # a worker's exit code, which the main process reads in torch's message

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}


class QuietDataLoader(DataLoader):
    """A DataLoader whose workers, set up by start_worker, end without a word on Ctrl-C."""

    def check_worker_number_rationality(self):
        """Allow more workers than there are cores, without torch's ten lines of warning."""

    def __iter__(self):
        """Start the workers with the stop signals blocked: start_worker unblocks them once it is ready."""
        if not hasattr(signal, "pthread_sigmask"):  # Windows
            return super().__iter__()
        blocked = STOP_SIGNALS
        if multiprocessing.get_start_method() != "fork":
            resource_tracker.ensure_running()  # or its start, with the first worker's, would unblock the signals
            blocked = {signal.SIGINT}  # a fresh Python's SIGTERM is silent, and ends a worker that is slow to start
        before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def close_after(loader: DataLoader) -> Iterator[None]:
    """End the loader's workers with the block. A notebook keeps an error's traceback, and with it the loader."""
    try:
        yield
    finally:
        if loader._iterator is not None:  # it was begun, with workers that stay from epoch to epoch
            loader._iterator._shutdown_workers()
            loader._iterator = None


def start_worker(worker: int) -> None:
    """Set up a worker process: one thread, and signals such that only the main process speaks."""
    cv2.setNumThreads(0)  # OpenCV's own threads would fight the other workers for the cores
    # The thread that hands batches over would write to stderr when the main process, stopped by a signal, drops one.
    # An error in the pipeline does not come this way: the main process gets and reports it.
    sys.excepthook = lambda *args: None
    # A batch that cannot be handed over would be lost, and the main process would wait for it for ever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)
    # A terminal's Ctrl-C and a cluster's SIGTERM reach the whole process group. The main process ends its
    # workers itself; SIGTERM must still work, and with exit code 0 torch does not take it for a crash.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, frame: os._exit(0))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _end_worker(error: Exception, batch: object) -> None:
    os._exit(NO_SHARED_MEMORY if "shared memory" in str(error) or "torch_shm" in str(error) else 1)
