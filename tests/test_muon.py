import pytest
import torch

from parts.muon import Muon


@pytest.mark.parametrize("channels", [(5, 7), (2, 60)], ids=["wide", "tall"])
def test_muon_is_torchs_on_the_flattened_weights(channels):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(*channels, 3).to(memory_format=torch.channels_last)
    before = conv.weight.detach().flatten(1).clone()
    matrix = torch.nn.Parameter(before.clone())
    ours = Muon([conv.weight], 0.02, weight_decay=2.0)
    torchs = torch.optim.Muon([matrix], 0.02, weight_decay=2.0)
    for _ in range(20):
        conv.weight.grad = torch.randn_like(conv.weight)
        matrix.grad = conv.weight.grad.flatten(1)
        ours.step()
        torchs.step()
        ours.load_state_dict(ours.state_dict())  # a run can be continued after any step
    difference = (conv.weight.flatten(1) - matrix).norm() / (matrix - before).norm()
    assert difference < 0.02  # torch's is computed in bfloat16
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_weight_without_a_gradient_stays_and_one_of_zero_is_only_shrunk():
    frozen, still = (torch.nn.Parameter(torch.ones(4, 3, 3, 3)) for _ in range(2))
    still.grad = torch.zeros_like(still)
    Muon([frozen, still], lr=0.1, weight_decay=1.0).step()
    assert ((frozen == 1).all(), (still == 0.9).all()) == (True, True)


def test_step_takes_a_closure_as_torchs_optimizers_do():
    weight = torch.nn.Parameter(torch.ones(4, 3, 3, 3))

    def closure():
        loss = weight.square().sum()
        loss.backward()  # which needs gradients switched on
        return loss

    assert Muon([weight], lr=0.1).step(closure).item() == 108
    assert (weight < 1).all()
