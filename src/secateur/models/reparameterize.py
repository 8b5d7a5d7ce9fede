"""Blocks that train with several branches and run as one convolution: RepVGG, MobileOne, FastViT.

Their branches are added up over a whole stage, so that a cut of the unfolded network must spare
nearly all of it. Folded, they are plain convolutions. A block folds itself by one of the methods
that `timm.utils.reparameterize_model` calls.

Source: Ding et al., *RepVGG: Making VGG-style ConvNets Great Again*, CVPR 2021, section 3.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph.module_state import as_input, copy_of, evaluating
from secateur.models.divergence import relative_error
from secateur.runtime.errors import UsageError
from secateur.runtime.torch_internals import BatchOrInstanceNorm

METHODS = ("fuse", "reparameterize", "switch_to_deploy")
LARGEST_ERROR = 1e-3
"""Relative difference of the outputs above which a network counts as changed by folding."""
NOTHING_TO_FOLD = (
    "The network has no blocks to fold, so --reparameterize (model.reparameterize) changed nothing."
)


def reparameterized(model: nn.Module, images: Tensor | None = None) -> nn.Module:
    """Return a copy of a network whose blocks are folded, or `model` if it has no such blocks.

    With `images`, `[image, channel, …]`, its outputs are compared with those of `model`. Raises
    `UsageError` if they differ by more than `LARGEST_ERROR`.
    """
    if not _blocks(model):
        return model
    folded = copy_of(model, share_tensors=False)
    _fold_children(folded)
    if images is not None:
        error = _error(model, folded, images)
        if not error <= LARGEST_ERROR:
            raise UsageError(
                f"the network can't be reparameterized: folded, its outputs differ by {error:.1e} "
                f"(relative error; at most {LARGEST_ERROR:.0e} is rounding)"
            )
    return folded


def branched_blocks(model: nn.Module) -> int:
    """Return how many blocks with several normed branches would be folded."""
    blocks = _blocks(model)
    if not blocks:
        return 0
    folded = dict(reparameterized(model).named_modules())
    return sum(
        _norms(block) > 1 and (name not in folded or _norms(folded[name]) < _norms(block))
        for name, block in blocks.items()
    )


def hint(model: nn.Module) -> str:
    """Return what to try with a network that has unfolded blocks; empty for any other."""
    count = branched_blocks(model)
    if not count:
        return ""
    return (
        f"{count} blocks of the network have parallel branches, which may keep their channels from "
        "being cut, and can be folded into one convolution each: --reparameterize "
        "(model.reparameterize = true)"
    )


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules inside a network that can fold themselves, by name."""
    return {name: module for name, module in model.named_modules() if name and _method(module)}


def _fold_children(parent: nn.Module) -> None:
    """Fold the blocks of a network in place, as timm does: a block before those inside it."""
    for name, child in list(parent.named_children()):
        block: Any = child
        method = _method(child)
        if method:
            replacement = getattr(block, method)()
            if isinstance(replacement, nn.Module):
                setattr(parent, name, replacement)
                block = replacement
        _fold_children(block)


def _method(module: nn.Module) -> str:
    """Return the method by which a block folds itself; empty if it can't, or is folded."""
    if getattr(module, "reparam_conv", None) is not None:  # timm's, which fail when called again
        return ""
    return next((name for name in METHODS if callable(getattr(module, name, None))), "")


def _error(model: nn.Module, folded: nn.Module, images: Tensor) -> float:
    images = as_input(model, images)
    with evaluating(model), evaluating(folded), torch.no_grad():
        return relative_error(folded(images), model(images))


def _norms(module: nn.Module) -> int:
    return sum(isinstance(part, BatchOrInstanceNorm) for part in module.modules())
