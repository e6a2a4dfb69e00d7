import multiprocessing
import resource
import socket
import time
from dataclasses import replace
from multiprocessing.resource_sharer import DupFd
from unittest.mock import Mock

import albumentations as A
import numpy as np
import pytest
import torch
from extras.sources import SHAPES, draw_shapes
from extras.transforms import RepeatableCompose
from extras.workers import start_worker
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

import train
from dataset import ImageDataset, make_loader


def shapes(augmentation=None, num_workers=1):
    """A loader of two batches."""
    dataset = ImageDataset(*draw_shapes(20, np.random.default_rng(0)), SHAPES, (0.5,) * 3, (0.25,) * 3, augmentation)
    return make_loader(dataset, 16, num_workers=num_workers)


def let_go_of_a_batch():
    """What a worker sees when the main process, as it ends, does not come for a batch that it asked for."""
    start_worker(0)
    socket.socket(socket.AF_UNIX).connect(DupFd(0)._id[0])
    time.sleep(0.5)


def test_worker_says_nothing_when_the_main_process_lets_go_of_a_batch(capfd):
    worker = multiprocessing.get_context("fork").Process(target=let_go_of_a_batch)
    worker.start()
    worker.join()
    assert (worker.exitcode, capfd.readouterr().err) == (0, "")


def leave_no_room(image, **kwargs):
    """Let this worker find no more shared memory."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    return image


def test_batch_that_cannot_be_handed_over_is_an_error_and_not_waited_for():
    loader = shapes(RepeatableCompose([A.Lambda(image=leave_no_room, p=1)]))
    loader.multiprocessing_context, loader.timeout = "fork", 6
    loader.collate_fn = list  # so that the shared memory is needed late, by the thread that hands batches over
    with pytest.raises(RuntimeError, match=r"DataLoader worker .* exited unexpectedly"):
        next(iter(loader))


@pytest.mark.filterwarnings("error")
def test_more_workers_than_cores_are_nobodys_mistake():
    shapes(num_workers=200)


def test_interrupted_run_leaves_no_worker_and_no_setting_in_a_notebook(tiny, tmp_path, monkeypatch):
    interrupt = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_get_data", interrupt)  # while it waits for a batch
    with pytest.raises(KeyboardInterrupt) as kept:  # a traceback that is kept keeps the loader
        train.main(replace(tiny, run_dir=str(tmp_path / "run"), num_workers=1, deterministic=True))
    assert kept.tb
    assert not multiprocessing.active_children()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.allow_tf32  # torch.export asks for it, which is an error beside "ieee"
