"""Which network a checkpoint's weights belong to: open it when a checkpoint is refused as another network's."""

from pathlib import Path

from torch import Tensor, nn

from config import UsageError
from extras.failures import warn


def describe_network(net: nn.Module) -> dict[str, object]:
    """Return what each module was made with, in plain values: {"blocks.0.0.type": "Conv2d", "blocks.0.0.stride": ...}.

    Dropout is left out: it is a setting of the training. What `forward` does between the modules cannot be seen.
    """
    described = {}
    for name, module in net.named_modules():
        if not isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)):
            described[f"{name}.type"] = type(module).__name__.removeprefix("Shared")  # of SharedBatchNorm2d
            for key, value in vars(module).items():
                parts = value if type(value) is tuple else (value,)
                plain = all(type(part) in (bool, int, float, str) for part in parts)  # others could not be loaded back
                if plain and key[0] != "_" and key != "training":
                    described[f"{name}.{key}"] = value
    return described


def _shapes(weights: dict[str, Tensor]) -> dict[str, tuple]:
    return {f"{name}.shape": tuple(tensor.shape) for name, tensor in weights.items()}


def load_weights(net: nn.Module, checkpoint: dict, path: str | Path) -> None:
    """Load the weights of a checkpoint, read from path. Raises UsageError, loading none, for another network's."""
    here, there = _shapes(net.state_dict()), _shapes(checkpoint["model"])
    if "network" in checkpoint:
        here |= describe_network(net)
        there |= checkpoint["network"]
    else:
        warn(f"checkpoint {path}, of an older version, does not say what network it is of: only shapes are compared")
    for key in sorted(here.keys() | there.keys()):
        both = key in here and key in there  # another version of torch may know other options of a module
        if here.get(key) != there.get(key) and (both or key.endswith((".type", ".shape"))):
            raise UsageError(
                f"checkpoint {path} is of another architecture than the one in model.py: {key} is "
                f"{there.get(key, 'missing')} there, {here.get(key, 'missing')} here"
            )
    net.load_state_dict(checkpoint["model"])
