import copy

import pytest
import torch
from extras.architecture import describe_network, load_weights
from extras.distributed import SharedBatchNorm2d

from config import UsageError
from model import Net, default_blocks
from tests.conftest import equal


class Wider(Net):
    pass


FIRST, *OTHERS = default_blocks()
PLAIN = [FIRST._replace(last="plain"), *OTHERS]  # has weights of the same shapes


def checkpoint_of(net):
    return {"model": net.state_dict(), "network": describe_network(net)}


@pytest.mark.parametrize(
    ("net", "words"),
    [(Net(PLAIN), r"blocks.0.6.dilation is \(2, 2\) there, \(1, 1\) here"), (Wider(), "type is Net there, Wider here")],
)
def test_another_network_is_refused_though_its_weights_would_fit(net, words):
    before = copy.deepcopy(dict(net.state_dict()))
    with pytest.raises(UsageError, match=f"checkpoint a.pt is of another architecture than .*{words}"):
        load_weights(net, checkpoint_of(Net()), "a.pt")
    assert equal(before, dict(net.state_dict()))


def test_the_same_network_is_loaded_whatever_its_dropout_and_however_many_processes_trained_it():
    net, other = Net(dropout=0.3), Net()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.__class__ = SharedBatchNorm2d
    load_weights(other, checkpoint_of(net), "a.pt")
    assert equal(dict(net.state_dict()), dict(other.state_dict()))


def test_an_older_checkpoint_is_compared_by_its_shapes_which_is_said(capsys):
    load_weights(Net(), {"model": Net().state_dict()}, "old.pt")
    assert "warning: checkpoint old.pt, of an older version, does not say what network it is" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"classifier.bias.shape is \(9,\) there, \(10,\) here"):
        load_weights(Net(), {"model": Net(num_classes=9).state_dict()}, "old.pt")
