"""What `torchrun --nproc-per-node 3 -m tests.shared_steps CONFIG.json` does in each of its processes."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import train
from config import Config, UsageError
from model import Net
from parts.distributed import process_group, share_training


def by_hand(net, batches, optimizers) -> None:
    for images, labels in batches:
        net.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizers[0].step()


def three_steps(wrap, take_steps) -> list:
    """Return the weights after three steps on this process's images, of networks that begin alike."""
    torch.manual_seed(0)
    net, images, labels = Net(base_channels=2), torch.randn(3, 3, 2, 3, 32, 32), torch.arange(18).view(3, 3, 2) % 10
    batches = list(zip(images[dist.get_rank()], labels[dist.get_rank()], strict=True))
    take_steps(wrap(net), batches, [torch.optim.SGD(net.parameters(), lr=0.1)])
    return [weight.detach() for weight in net.parameters()]


if __name__ == "__main__":
    with process_group("cpu"):
        expected = three_steps(DistributedDataParallel, by_hand)
        found = three_steps(lambda net: share_training(net, 6), train.train_one_epoch)
        torch.testing.assert_close(found, expected)
        with pytest.raises(UsageError, match="batch_size 7 must be a multiple"):
            share_training(Net(), 7)
        config = Config(**json.loads(Path(sys.argv[1]).read_text()))
        train.main(replace(config, run_dir="straight"))
        train.main(replace(config, run_dir="run", epochs=1))
