"""Networks by name, their weights, and their evaluation.

- `zoo`: networks by name (built-in, torchvision, timm, user code), and their preprocessing.
- `cifar`: the built-in ResNets and VGG-16 for CIFAR.
- `weights`: loads the weights of a checkpoint into a network.
- `checkpoint_files`, `file_formats`, `torch_files`: find and read files, shards and folders.
- `checkpoint_contents`, `checkpoint_matching`: find a network's tensors in what was read.
- `published`, `state_dict`: the names that published files have, and versions of modules.
- `user_code`, `user_modules`: factories in a user's own file, `path/to/file.py:factory`, which may
  import its neighbours.
- `evaluate`, `score`: accuracy, loss, MACs, parameters and latency.
- `divergence`: how far the outputs of two networks are apart, without labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.models.zoo import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from secateur.models.zoo import load  # not before it is needed: it imports torchvision

    return load
