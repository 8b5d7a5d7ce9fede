"""State dicts: names and versions of modules, as they are today and as they were."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from secateur.graph.module_state import copy_of
from secateur.runtime.torch_internals import with_versions

COUNTER = "num_batches_tracked"
"""Of batch norms: files older than PyTorch 0.4.1 lack it."""


def load_state(model: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Copy tensors, named as in `model.state_dict()`, into a network.

    They count as what the modules' classes write today: see `with_versions`.
    """
    model.load_state_dict(with_versions(model, tensors), strict=strict)


def count_misfits(model: nn.Module, tensors: Mapping[str, Tensor]) -> int:
    """Return how many tensors are missing, unexpected or of another shape than the network's."""
    expected: dict[str, Tensor] = model.state_dict()
    counted = {name for name in expected.keys() ^ tensors.keys() if not name.endswith(COUNTER)}
    common = expected.keys() & tensors.keys()
    return len(counted) + sum(expected[name].shape != tensors[name].shape for name in common)


def renamed_by_modules(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the names that the network's modules give to those of old files.

    PyTorch lets a module translate an older state dict while it loads it
    (`_load_from_state_dict`, hooks); this loads into a copy of the network. The tensors are
    returned as they are if the network can't be copied or a module refuses them.
    """
    expected = model.state_dict()
    misshapen = {
        name: tensor
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name].shape
    }
    others = {name: tensor for name, tensor in tensors.items() if name not in misshapen}
    try:
        trial = copy_of(model, share_tensors=True)
        missing, unexpected = trial.load_state_dict(others, strict=False, assign=True)
    except Exception:  # modules of the user's may raise anything
        return dict(tensors)
    loaded = {name: t.detach() for name, t in trial.state_dict().items() if name not in missing}
    return loaded | misshapen | {name: tensors[name] for name in unexpected if name in tensors}
