import pytest
import torch

import model
from config import UsageError
from extras.architecture import describe_network, load_weights
from extras.distributed import SharedBatchNorm2d
from model import BlockSpec, Net, default_blocks

FIRST, SECOND, THIRD, FOURTH = default_blocks()
OTHERS = {
    "plain instead of dilated": (
        [FIRST._replace(last="plain"), SECOND, THIRD, FOURTH],
        "blocks.0.6.dilation is (2, 2)",
    ),
    "plain instead of strided": ([FIRST, SECOND, THIRD._replace(last="plain"), FOURTH], "blocks.2.7.stride is (2, 2)"),
    "other channels": ([BlockSpec(3, 10)], "blocks.0.0.bias.shape is (16,)"),
}


def checkpoint_of(net):
    return {"model": net.state_dict(), "network": describe_network(net)}


@pytest.mark.parametrize(("blocks", "words"), OTHERS.values(), ids=OTHERS.keys())
def test_another_network_is_refused_though_its_weights_may_fit(blocks, words):
    net = Net(blocks)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(UsageError, match="another architecture") as refusal:
        load_weights(net, checkpoint_of(Net()))
    assert words in str(refusal.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_another_value_of_the_dilation_is_refused(monkeypatch):
    checkpoint = checkpoint_of(Net())
    monkeypatch.setitem(model.LAST_CONV, "dilated", {"padding": 3, "dilation": 3})
    with pytest.raises(UsageError, match=r"blocks.0.6.dilation is \(2, 2\) there, \(3, 3\) here"):
        load_weights(Net(), checkpoint)


def test_a_class_of_its_own_is_another_network():
    class Wider(Net):
        def __init__(self):
            super().__init__()
            self.extra = torch.nn.ReLU6()

    with pytest.raises(UsageError, match=r"type is Net there, Wider here"):
        load_weights(Wider(), checkpoint_of(Net()))


def test_the_same_network_is_loaded_whatever_its_dropout_and_however_many_processes_trained_it():
    net = Net(dropout=0.3)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.__class__ = SharedBatchNorm2d
    other = Net()
    load_weights(other, checkpoint_of(net))
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in net.state_dict().items())


def test_an_older_checkpoint_is_compared_by_its_shapes():
    load_weights(Net(), {"model": Net().state_dict()})
    with pytest.raises(UsageError, match=r"classifier.bias.shape is \(9,\) there, \(10,\) here"):
        load_weights(Net(), {"model": Net(num_classes=9).state_dict()})
