import copy
import re
import runpy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model import BlockSpec, Net, default_blocks, print_summary, receptive_fields
from tests.conftest import ROOT, equal

# The specification's table of layers: type, channels, side of the image, parameters.
SUMMARY = """
Conv2d 16 32 448, BatchNorm2d 16 32 32, Dropout2d 16 32 0, Conv2d 16 32 2320, BatchNorm2d 16 32 32, Dropout2d 16 32 0,
Conv2d 16 32 2320, BatchNorm2d 16 32 32, Dropout2d 16 32 0, Conv2d 16 32 160, Conv2d 32 32 544, BatchNorm2d 32 32 64,
Dropout2d 32 32 0, Conv2d 32 32 9248, BatchNorm2d 32 32 64, Dropout2d 32 32 0, Conv2d 32 16 9248, BatchNorm2d 32 16 64,
Dropout2d 32 16 0, Conv2d 32 16 320, Conv2d 64 16 2112, BatchNorm2d 64 16 128, Dropout2d 64 16 0, Conv2d 64 16 36928,
BatchNorm2d 64 16 128, Dropout2d 64 16 0, Conv2d 64 8 36928, BatchNorm2d 64 8 128, Dropout2d 64 8 0, Conv2d 32 8 18464,
BatchNorm2d 32 8 64, Dropout2d 32 8 0, Conv2d 32 8 9248, BatchNorm2d 32 8 64, Dropout2d 32 8 0, Conv2d 32 6 9248,
AvgPool2d 32 1 0, Conv2d 10 1 330"""


def test_summary_is_the_table_of_the_specification_and_changes_nothing(net, capsys):
    random_state, before = torch.get_rng_state(), copy.deepcopy(dict(net.state_dict()))
    print_summary(net)
    out = capsys.readouterr().out
    rows = re.findall(r"(\w+)-\d+ +\[-1, (\d+), (\d+), \3\] +([\d,]+)\n", out)
    assert [" ".join(row).replace(",", "") for row in rows] == re.split(r",\s", SUMMARY.strip())
    assert "Total params: 138,666\nTrainable params: 138,666\nNon-trainable params: 0\n" in out
    assert net.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert equal(dict(net.state_dict()), before)


def test_python_model_py_prints_receptive_fields_and_layers(capsys):
    runpy.run_path(str(ROOT / "model.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert re.findall(r"x\d+ +([\d, ]+)\n", out)[:4] == ["3, 5, 9", "11, 13, 15", "19, 23, 27", "35, 43, 51"]


def test_output_is_log_probabilities_in_float32():
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            log_probs = Net(num_classes=7)(x=torch.randn(5, 3, 32, 32))
        assert (log_probs.shape, log_probs.dtype) == ((5, 7), torch.float32)
        torch.testing.assert_close(log_probs.exp().sum(dim=1), torch.ones(5))


def test_wrapped_layer_computes_what_it_did(net):
    """As by LoRA, a checkpoint wrapper, an observer."""
    images = torch.randn(2, 3, 32, 32)
    expected = net.eval()(images)
    for block in net.blocks:
        for position, layer in enumerate(block):
            block[position] = nn.Sequential(layer)
        block.gate = nn.Sigmoid()  # an attribute, which an edit of forward may use, is no layer
    assert torch.equal(net(images), expected)


def test_activation_follows_each_normalization(net):
    x = torch.randn(2, 3, 32, 32)
    for first, activation in ((net.eval().blocks[0], F.relu), (Net(activation="silu").eval().blocks[0], F.silu)):
        y = x
        for position in (0, 3, 6):
            y = activation(first[position + 1](first[position](y)))
        assert torch.equal(first(x), y)
    for block in net.blocks[:3]:
        x = block(x)
        assert x.min() == 0
    assert net.blocks[3](x).min() < 0  # the last convolution has nothing after it


def measured_receptive_field(blocks, depth):
    """Side of the input patch that one pixel after the first `depth` blocks depends on, from gradients."""
    net = Net(blocks, image_size=96).eval().double()
    for p in net.parameters():
        nn.init.uniform_(p, 0.01, 0.1)  # all positive: no ReLU closes, no two paths cancel
    x = torch.ones(1, 3, 96, 96, dtype=torch.double, requires_grad=True)
    y = x
    for block in net.blocks[:depth]:
        y = block(y)
    y[0, :, y.shape[2] // 2, y.shape[3] // 2].sum().backward()
    pixels = x.grad[0].abs().sum(dim=0).nonzero()
    height, width = (pixels.amax(dim=0) - pixels.amin(dim=0) + 1).tolist()
    assert height == width
    return height


OTHER_BLOCKS = (BlockSpec(3, 4, 1, last="strided"), BlockSpec(4, 6, 2, True, "dilated"), BlockSpec(6, 4, 3))


def test_receptive_field_agrees_with_gradients():
    for blocks in (default_blocks(), OTHER_BLOCKS):
        computed = [fields[-1] for fields in receptive_fields(blocks)]
        assert computed == [measured_receptive_field(blocks, depth) for depth in range(1, len(blocks) + 1)]


@pytest.mark.parametrize("size", [33, 52, 64])
def test_image_of_another_size_fails_at_the_loss(net, size):
    with pytest.raises((RuntimeError, ValueError)):
        F.cross_entropy(net(torch.randn(4, 3, size, size)), torch.arange(4))


@pytest.mark.parametrize("net", [Net(OTHER_BLOCKS, num_classes=3, dropout=0.25, image_size=33), Net(activation="silu")])
def test_its_arguments_in_plain_values_make_the_same_network_again(net, tmp_path):
    torch.save(net.arguments, tmp_path / "arguments")
    again = Net(**torch.load(tmp_path / "arguments", weights_only=True))
    assert {type(spec) for spec in net.arguments["blocks"]} == {tuple}
    assert (str(again), again.arguments) == (str(net), net.arguments)
    again.load_state_dict(net.state_dict())
    images = torch.randn(2, 3, net.arguments["image_size"], net.arguments["image_size"])
    assert torch.equal(again.eval()(images), net.eval()(images))
    assert again(images).shape == (2, net.arguments["num_classes"])
    assert {layer.p for layer in again.modules() if isinstance(layer, nn.Dropout2d)} == {net.arguments["dropout"]}


def test_table_that_cannot_work_is_refused_with_the_block_and_the_reason():
    half, cut = BlockSpec(8, 8, 1, last="strided"), BlockSpec(8, 8, 1, last="unpadded")
    for blocks, message in (
        ([BlockSpec(1, 8)], "block 1: in_channels is 1, but the image has 3"),
        ([(3, 8, 4), (9, 8)], "block 2: in_channels is 9, but block 1 has 8"),
        ([BlockSpec(3, 8, last="stride")], "block 1: .+ plain, dilated, strided, unpadded: .+last='stride'"),
        ([(3, 8), (8, 8, 0)], "block 2: it needs a layer"),
        ([BlockSpec(3, 8, 1, last="strided"), *[cut] * 9], "block 9: nothing"),
        ([BlockSpec(3, 8, 1, last="strided"), *[half] * 4], "block 5: a 1x1 image"),
    ):
        with pytest.raises(ValueError, match=message):
            Net(blocks)


def test_network_can_be_exported_for_any_number_of_images(net):
    images = torch.randn(4, 3, 32, 32)
    exported = torch.export.export(net.eval(), (images,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    for other in (exported.module(), torch.fx.symbolic_trace(net)):
        torch.testing.assert_close(other(images[:2]), net(images[:2]))
