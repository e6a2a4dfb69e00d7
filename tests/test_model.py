import copy
import re
import runpy
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model import BlockSpec, Net, default_blocks, print_summary, receptive_fields
from tests.conftest import ROOT, equal

# The specification's table: type, shape, parameters.
SUMMARY = """\
Conv2d 16,32,32 448; BatchNorm2d 16,32,32 32; Dropout2d 16,32,32 0
Conv2d 16,32,32 2320; BatchNorm2d 16,32,32 32; Dropout2d 16,32,32 0
Conv2d 16,32,32 2320; BatchNorm2d 16,32,32 32; Dropout2d 16,32,32 0
Conv2d 16,32,32 160; Conv2d 32,32,32 544; BatchNorm2d 32,32,32 64; Dropout2d 32,32,32 0
Conv2d 32,32,32 9248; BatchNorm2d 32,32,32 64; Dropout2d 32,32,32 0
Conv2d 32,16,16 9248; BatchNorm2d 32,16,16 64; Dropout2d 32,16,16 0
Conv2d 32,16,16 320; Conv2d 64,16,16 2112; BatchNorm2d 64,16,16 128; Dropout2d 64,16,16 0
Conv2d 64,16,16 36928; BatchNorm2d 64,16,16 128; Dropout2d 64,16,16 0
Conv2d 64,8,8 36928; BatchNorm2d 64,8,8 128; Dropout2d 64,8,8 0
Conv2d 32,8,8 18464; BatchNorm2d 32,8,8 64; Dropout2d 32,8,8 0
Conv2d 32,8,8 9248; BatchNorm2d 32,8,8 64; Dropout2d 32,8,8 0
Conv2d 32,6,6 9248; AvgPool2d 32,1,1 0; Conv2d 10,1,1 330
"""


def test_summary_is_the_table_of_the_specification(capsys):
    print_summary(Net())
    lines = capsys.readouterr().out.splitlines()
    expected = [row.split() for row in SUMMARY.replace("\n", ";").split(";") if row]
    rows = [line.replace(", ", ",").split() for line in lines[3:41]]
    assert rows == [
        [f"{kind}-{number}", f"[-1,{shape}]", f"{int(parameters):,}"]
        for number, (kind, shape, parameters) in enumerate(expected, start=1)
    ]
    end = " ".join(line for line in lines[41:] if line.strip("-="))
    assert end == (
        "Total params: 138,666 Trainable params: 138,666 Non-trainable params: 0 Input size (MB): 0.01 "
        "Forward/backward pass size (MB): 3.95 Params size (MB): 0.53 Estimated Total Size (MB): 4.49"
    )


def test_summary_changes_nothing():
    net = Net()
    random_state, before = torch.get_rng_state(), copy.deepcopy(dict(net.state_dict()))
    print_summary(net)
    assert net.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert equal(dict(net.state_dict()), before)


def test_summary_of_a_network_that_torchsummary_cannot_follow_says_so(capsys):
    class Pair(nn.Module):
        def forward(self, x):
            return {"x": x}

    print_summary(nn.Sequential(Pair()))
    assert "no summary by torchsummary" in capsys.readouterr().out


def test_python_model_py_prints_receptive_fields_and_layers(capsys):
    runpy.run_path(str(ROOT / "model.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert re.findall(r"x\d+ +([\d, ]+)\n", out)[:4] == ["3, 5, 9", "11, 13, 15", "19, 23, 27", "35, 43, 51"]
    assert "4      64 -> 32   plain        unpadded    6x6     35, 43, 51\n" in out
    assert "Total params: 138,666" in out


def test_model_imports_only_torch():
    """The file alone can be taken into another project."""
    lines = [line.split() for line in (ROOT / "model.py").read_text().splitlines()]
    imported = {words[1].partition(".")[0] for words in lines if words[:1] in (["import"], ["from"])}
    assert imported - sys.stdlib_module_names == {"torch", "torchsummary"}  # the latter in print_summary alone


# --- what it computes ---


@pytest.mark.parametrize("autocast", [False, True])
def test_output_is_log_probabilities_in_float32(autocast):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        log_probs = Net(num_classes=7)(x=torch.randn(5, 3, 32, 32))
    assert (log_probs.shape, log_probs.dtype) == ((5, 7), torch.float32)
    torch.testing.assert_close(log_probs.exp().sum(dim=1), torch.ones(5))


def test_every_hidden_convolution_is_rectified():
    net = Net().eval()
    x = torch.randn(2, 3, 32, 32)
    for block in net.blocks[:3]:
        x = block(x)
        assert x.min() == 0
    assert net.blocks[3](x).min() < 0  # the last convolution has nothing after it


def test_wrapped_layer_computes_what_it_did(net):
    """As by LoRA, a checkpoint wrapper, an observer."""
    x = torch.randn(2, 3, 32, 32)
    expected = net.eval()(x)
    wrapped = copy.deepcopy(net)
    for block in wrapped.blocks:
        for position, layer in enumerate(block):
            block[position] = nn.Sequential(layer)
    assert torch.equal(wrapped(x), expected)


def test_relu_follows_whatever_stands_in_a_normalizations_place(net):
    block, x = net.blocks[0], torch.randn(2, 3, 32, 32)
    names = [name for name in net.state_dict() if "running" not in name and "num_batches" not in name]
    convolutions = [layer for layer in block if isinstance(layer, nn.Conv2d)]
    norms = [nn.GroupNorm(4, 16) for _ in convolutions]
    block[1], block[4], block[7] = norms
    y = x
    for convolution, norm in zip(convolutions, norms, strict=True):
        y = F.relu(norm(convolution(y)))
    assert torch.equal(block(x), y)
    assert [name for name in net.state_dict() if "running" not in name and "num_batches" not in name] == names


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


@pytest.mark.parametrize("blocks", [default_blocks(), OTHER_BLOCKS], ids=["default", "other"])
def test_receptive_field_agrees_with_gradients(blocks):
    computed = [fields[-1] for fields in receptive_fields(blocks)]
    assert computed == [measured_receptive_field(blocks, depth) for depth in range(1, len(blocks) + 1)]


@pytest.mark.parametrize("size", [33, 52, 64])
def test_image_of_another_size_fails_at_the_loss(net, size):
    images, labels = torch.randn(4, 3, size, size), torch.arange(4)
    for mode in (net.train(), net.eval()):
        with pytest.raises((RuntimeError, ValueError)):
            F.cross_entropy(mode(images), labels)


# --- how it is made ---


def test_net_follows_its_arguments():
    net = Net(OTHER_BLOCKS, num_classes=3, dropout=0.25, image_size=33)
    assert net(torch.randn(2, 3, 33, 33)).shape == (2, 3)
    assert {m.p for m in net.modules() if isinstance(m, nn.Dropout2d)} == {0.25}
    assert Net(base_channels=8).classifier.in_channels == 16


@pytest.mark.parametrize("net", [Net(OTHER_BLOCKS, num_classes=3, dropout=0.25, image_size=33), Net(base_channels=2)])
def test_its_arguments_in_plain_values_make_the_same_network_again(net, tmp_path):
    torch.save(net.arguments, tmp_path / "arguments")
    again = Net(**torch.load(tmp_path / "arguments", weights_only=True))
    assert {type(spec) for spec in net.arguments["blocks"]} == {tuple}
    assert str(again) == str(net)
    assert again.arguments == net.arguments
    again.load_state_dict(net.state_dict())
    images = torch.randn(2, 3, net.arguments["image_size"], net.arguments["image_size"])
    assert torch.equal(again.eval()(images), net.eval()(images))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ((BlockSpec(1, 8),), "block 1: in_channels is 1, but the image has 3"),
        ([(3, 8, 4), (9, 8)], "block 2: in_channels is 9, but block 1 has 8"),
        ((BlockSpec(3, 8, 1, last="strided"), *[BlockSpec(8, 8, 1, last="unpadded")] * 9), "block 9: nothing"),
        ((BlockSpec(3, 8, 1, last="strided"), *[BlockSpec(8, 8, 1, last="strided")] * 4), "block 5: a 1x1 image"),
    ],
)
def test_table_that_cannot_work_is_refused_with_the_block_and_the_reason(blocks, message):
    with pytest.raises(ValueError, match=message):
        Net(blocks)


@pytest.mark.parametrize("kind", ["export", "fx"])
def test_network_can_be_exported_for_any_number_of_images(kind):
    net, x = Net().eval(), torch.randn(4, 3, 32, 32)
    if kind == "export":
        exported = torch.export.export(net, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}}).module()
    else:
        exported = torch.fx.symbolic_trace(net)
    for images in (x, x[:2]):
        torch.testing.assert_close(exported(images), net(images))
