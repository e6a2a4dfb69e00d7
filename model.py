"""The network: 138,666 parameters, receptive field 51, built from a table of blocks.

``python model.py`` prints the receptive field and the layers.
"""

import copy
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


class BlockSpec(NamedTuple):
    """One row of the table: a block of 3x3 convolutions, and what its last one does.

    in_channels, out_channels: channels of the block's input and of each of its layers' outputs.
    layers: 1 or more.
    separable: the first layer is a depthwise 3x3 followed by a pointwise 1x1 convolution.
    last: "plain" keeps the image size, "dilated" spreads its nine taps over 5x5 pixels, "strided" halves
        the image, "unpadded" trims a pixel from each side and is left linear: the head's pooling follows.
    """

    in_channels: int
    out_channels: int
    layers: int = 3
    separable: bool = False
    last: Literal["plain", "dilated", "strided", "unpadded"] = "plain"


BASE_CHANNELS = 16  # of the default table's first block


def default_blocks(base_channels: int = BASE_CHANNELS) -> tuple[BlockSpec, ...]:
    """Return the table that `Net` is built from: edit a row here, or pass another table to `Net`."""
    c = base_channels
    return (
        BlockSpec(3, c, last="dilated"),  # receptive field 9
        BlockSpec(c, 2 * c, separable=True, last="strided"),  # 15, 32x32 -> 16x16
        BlockSpec(2 * c, 4 * c, separable=True, last="strided"),  # 27, 16x16 -> 8x8
        BlockSpec(4 * c, 2 * c, last="unpadded"),  # 51, 8x8 -> 6x6
    )


# How the last convolution of a block differs from the others.
LAST_CONV = {
    "plain": {},
    "dilated": {"padding": 2, "dilation": 2},
    "strided": {"stride": 2},
    "unpadded": {"padding": 0},
}


def conv_options(index: int, layers: int, last: str) -> dict[str, int]:
    """Return nn.Conv2d's keyword arguments for the 3x3 convolution in layer `index` (from 0) of a block."""
    usual = {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1}
    return {**usual, **LAST_CONV[last]} if index == layers - 1 else usual


ACTIVATIONS = {"relu": F.relu, "silu": F.silu}  # SiLU, x * sigmoid(x): Elfwing et al. 2017, arXiv:1702.03118


class Block(nn.Sequential):
    """Convolution layers; each is convolution, BatchNorm, activation, Dropout2d.

    Input (N, in_channels, H, W), output (N, out_channels, H', W'). A separable first layer has one BatchNorm, after the
    pair of convolutions. An unpadded last convolution has nothing after it. The activation is applied in `forward`, for
    the specification's summary has no row for it.
    Depthwise-separable convolutions: Chollet 2017, arXiv:1610.02357; dilated: Yu & Koltun 2016, arXiv:1511.07122.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        layers: int = 3,
        separable: bool = False,
        last: str = "plain",
        dropout: float = 0.0,
        activation: str = "relu",
    ):
        modules, activated = [], []
        for index in range(layers):
            options = conv_options(index, layers, last)
            channels = in_channels if index == 0 else out_channels
            if separable and index == 0:
                modules.append(nn.Conv2d(channels, channels, groups=channels, **options))
                modules.append(nn.Conv2d(channels, out_channels, kernel_size=1))
            else:
                modules.append(nn.Conv2d(channels, out_channels, **options))
            if index < layers - 1 or last != "unpadded":  # an unpadded convolution has nothing after it
                activated.append(str(len(modules)))  # the BatchNorm's name in nn.Sequential
                modules += [nn.BatchNorm2d(out_channels), nn.Dropout2d(dropout)]
        super().__init__(*modules)
        self.activated = activated  # names, not types: a wrapper may stand there later; `insert` and `del` shift them
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name, layer in self._modules.items():
            x = layer(x) if name.isdigit() else x  # self.gate = ... would have a word for a name: call it here
            if name in self.activated:
                x = self.activation(x)
        return x


class Net(nn.Module):
    """The blocks of the table, average pooling over what is left of the image, a linear classifier.

    Input (N, 3, image_size, image_size), normalized; larger images, or much smaller ones, fail here or at the loss.
    Output (N, num_classes) float32 log-probabilities, for F.nll_loss or F.cross_entropy, which are equal on them.

    blocks: the table; base_channels: the first block's in the default table; the others' are its multiples.
    dropout: probability that Dropout2d zeroes a channel. activation: of ACTIVATIONS; no weight tells which.
    arguments: what makes this network again, `Net(**net.arguments)`, in plain values: a checkpoint carries them.
    Raises ValueError, naming the block and the reason, for a table that cannot work.
    """

    def __init__(
        self,
        blocks: Sequence[BlockSpec] | None = None,
        *,
        base_channels: int = BASE_CHANNELS,
        num_classes: int = 10,
        dropout: float = 0.0,
        image_size: int = 32,
        activation: str = "relu",
    ):
        super().__init__()
        blocks = default_blocks(base_channels) if blocks is None else tuple(BlockSpec(*spec) for spec in blocks)
        sizes = output_sizes(blocks, image_size)  # which checks the table
        self.arguments = {"blocks": [tuple(spec) for spec in blocks], "num_classes": num_classes}
        self.arguments |= {"dropout": dropout, "image_size": image_size, "activation": activation}
        self.blocks = nn.ModuleList(Block(*spec, dropout, activation) for spec in blocks)
        self.pool = nn.AvgPool2d(sizes[-1], stride=1)  # of a larger image more than one value is left
        self.classifier = nn.Conv2d(blocks[-1].out_channels, num_classes, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        logits = self.classifier(self.pool(x)).squeeze((2, 3))  # of a larger image H, W stay: the loss refuses
        return F.log_softmax(logits, dim=1, dtype=torch.float32)


def output_sizes(blocks: Sequence[BlockSpec], image_size: int = 32) -> list[int]:
    """Return the image size after each block; raise ValueError if the table cannot work."""
    sizes, channels = [], 3  # RGB
    for number, spec in enumerate(blocks, start=1):
        if spec.in_channels != channels:
            source = "the image" if number == 1 else f"block {number - 1}"
            raise ValueError(f"block {number}: in_channels is {spec.in_channels}, but {source} has {channels} channels")
        if spec.last not in LAST_CONV or spec.layers < 1:
            raise ValueError(f"block {number}: it needs a layer, and as last one of {', '.join(LAST_CONV)}: {spec}")
        before, channels = image_size, spec.out_channels
        last = conv_options(spec.layers - 1, spec.layers, spec.last)  # the others keep the size
        image_size = (before + 2 * last["padding"] - 2 * last["dilation"] - 1) // last["stride"] + 1  # a 3x3
        if image_size < 1:
            raise ValueError(f"block {number}: nothing is left of the {before}x{before} image after an unpadded 3x3")
        if image_size == 1 and spec.last != "unpadded":
            raise ValueError(f"block {number}: a 1x1 image is left, and BatchNorm cannot train on a batch of one")
        sizes.append(image_size)
    return sizes


def receptive_fields(blocks: Sequence[BlockSpec]) -> list[list[int]]:
    """Return the receptive field in input pixels after each 3x3 convolution, one list for each block.

    A convolution widens it by (kernel - 1) * dilation * jump; the jump, the distance in input pixels between
    neighbouring outputs, is the product of the strides so far. A 1x1 convolution widens nothing.
    Araujo et al. 2019, https://distill.pub/2019/computing-receptive-fields.
    """
    field, jump, fields = 1, 1, []
    for spec in blocks:
        fields.append([])
        for index in range(spec.layers):
            options = conv_options(index, spec.layers, spec.last)
            field += (options["kernel_size"] - 1) * options["dilation"] * jump
            jump *= options["stride"]
            fields[-1].append(field)
    return fields


def receptive_field_table(blocks: Sequence[BlockSpec], image_size: int = 32) -> str:
    """Return a table of the blocks: channels, first and last layer, image size, receptive fields."""
    lines = ["block  channels   first layer  last layer  output  receptive field"]
    rows = zip(blocks, output_sizes(blocks, image_size), receptive_fields(blocks), strict=True)
    for number, (spec, size, fields) in enumerate(rows, start=1):
        channels = f"{spec.in_channels} -> {spec.out_channels}"
        first = "separable" if spec.separable else "plain"
        growth = ", ".join(map(str, fields))
        lines.append(f"{number:<5}  {channels:<9}  {first:<11}  {spec.last:<10}  {f'{size}x{size}':<6}  {growth}")
    return "\n".join(lines)


def print_summary(net: nn.Module, image_size: int = 32) -> None:
    """Print torchsummary's table of layers, shapes and parameters; the network and all random states are unchanged."""
    import torchsummary

    # torchsummary runs the model in training mode on random numbers, and knows only "cpu" and "cuda".
    with torch.random.fork_rng(devices=[]):
        try:
            torchsummary.summary(copy.deepcopy(net).cpu(), (3, image_size, image_size), device="cpu")
        except Exception as error:  # of a network of your own
            print(f"(no summary by torchsummary: {error})")


if __name__ == "__main__":
    print(receptive_field_table(default_blocks()), end="\n\n")
    print_summary(Net())
