"""Two steps of training, on 7 images and on 3, the layers in float64, where rounding hides little.

`torchrun --nproc-per-node 3 -m tests.shared_steps FOLDER` leaves there what each process has in its memory then.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from extras.distributed import first_rank_first, share_training
from torch import distributed as dist

from config import config
from model import Net
from train import make_optimizers, train_step


def two_steps(rank: int = 0, world_size: int = 1) -> dict:
    """Return the weights after the steps, and for each step this process's mean loss and number of images."""
    torch.manual_seed(rank)  # each process draws weights of its own, of which rank 0's count
    net = Net().double().to(memory_format=torch.channels_last)
    if world_size > 1:
        share_training(net, batch_size=7)
    optimizers = make_optimizers(net, replace(config, optimizer="sgd"))  # Muon makes of small differences large ones
    steps, generator = [], torch.Generator().manual_seed(0)
    for count in (7, 3):
        images = torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=generator)
        part = slice(rank, None, world_size)
        loss, log_probs = train_step(net, images[part], torch.arange(count)[part], optimizers, label_smoothing=0.1)
        steps.append((loss.item(), len(log_probs)))
    return {"weights": net.state_dict(), "steps": steps}


def write_down(path: Path) -> None:
    """Add this process's rank to a file; the higher the rank, the sooner."""
    time.sleep(0.2 * (dist.get_world_size() - dist.get_rank()))
    with open(path, "a") as file:
        file.write(f"{dist.get_rank()} ")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    torch.save(two_steps(dist.get_rank(), dist.get_world_size()), folder / f"{dist.get_rank()}.pt")
    os.environ["LOCAL_RANK"] = str(dist.get_rank() % 2)  # as if rank 2 were the first on another machine
    first_rank_first(write_down, folder / "order.txt")
    dist.destroy_process_group()
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]  # Linux only, elsewhere none
    assert not any("gloo" in name for name in threads), threads  # one of them can abort the process at its end
