"""The plain loop of most tutorials, which the benchmark compares this project with.

Per image PIL -> numpy -> the five transforms -> float32 tensor; a default DataLoader with 2 workers; float32;
contiguous tensors; `.item()` at every step. Augmentation has the specification's probabilities (0.3).
"""

import albumentations as A
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from dataset import channel_statistics
from model import Net

BATCH_SIZE = 128


class PlainImages(Dataset):
    def __init__(self, split, mean, std, training):
        self.images, self.labels = split
        spec = {"p": 0.3} if training else {"p": 0.0}
        self.transform = A.Compose(
            [
                A.HorizontalFlip(**spec),
                A.Affine(scale=(0.9, 1.1), translate_percent=(-0.0625, 0.0625), rotate=(-15, 15), **spec),
                A.CoarseDropout((1, 1), (16, 16), (16, 16), fill=tuple(255 * channel for channel in mean), **spec),
                A.Normalize(mean, std),
                A.ToTensorV2(),
            ][0 if training else 3 :]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = np.array(Image.fromarray(self.images[index]))
        return self.transform(image=image)["image"], int(self.labels[index])


def plain_epoch(net, loader, device, optimizer=None):
    """Train, or validate without an optimizer."""
    net.train(optimizer is not None)
    loss_sum = correct = 0.0
    with torch.set_grad_enabled(optimizer is not None):
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            log_probs = net(images)
            loss = F.nll_loss(log_probs, labels)
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            loss_sum += loss.item()
            correct += log_probs.argmax(dim=1).eq(labels).sum().item()


def one_epoch(batches):
    """Read an epoch of a loader."""
    for _ in batches:
        pass


def plain_functions(split, device):
    """The plain loop: name -> function that handles every image of the split once."""
    mean, std = channel_statistics(split.images)
    images = PlainImages(split, mean, std, training=True)
    loader = DataLoader(images, BATCH_SIZE, shuffle=True, num_workers=2)
    pipeline = DataLoader(images, BATCH_SIZE, shuffle=True)
    test_loader = DataLoader(PlainImages(split, mean, std, training=False), BATCH_SIZE, num_workers=2)
    net = Net().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    return {
        "training": lambda: plain_epoch(net, loader, device, optimizer),
        "validation": lambda: plain_epoch(net, test_loader, device),
        "input pipeline": lambda: one_epoch(pipeline),
    }
