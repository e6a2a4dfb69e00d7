"""Speed changes no numbers: `--compile`."""

import functools
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from torch import distributed as dist

from config import UsageError, config
from parts.speed import faster_step
from tests.conftest import flags
from train import train_step
from utils import load_checkpoint


def test_compiled_network_keeps_names_and_numbers(cli, tiny, narrow, monkeypatch):
    # Without the code generator, which takes half a minute.
    compiler = Mock(side_effect=functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch, "compile", compiler)
    for name, flag in (("compiled", "true"), ("plain", "false")):
        argv = flags(tiny, epochs=1, batch_size=50, run_dir=name)
        assert cli(*argv, "--compile", flag, "--no-report") == 0
    compiler.assert_called_once()
    ours, plain = (load_checkpoint(f"{name}/last.pt") for name in ("compiled", "plain"))
    assert ours["model"].keys() == plain["model"].keys()
    assert ours["metrics"][0]["train_loss"] == pytest.approx(plain["metrics"][0]["train_loss"], rel=1e-3)


@pytest.mark.parametrize(("several", "precision"), [(True, "float32"), (False, "float16")])
def test_compile_is_not_for_several_processes_and_not_for_float16(net, monkeypatch, several, precision):
    monkeypatch.setattr(dist, "is_initialized", lambda: several)
    with pytest.raises(UsageError, match="--compile false"):
        faster_step(train_step, net, replace(config, precision=precision))
