"""torchvision's and timm's networks, built as their published weights want them.

A builder without weights and a builder with its published weights may return different networks:
another transform of the images, another epsilon of the norms, another image size. A published file
may hold other names than the network, or heads that serve training alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torchvision
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from secateur.models.state_dict import count_misfits, renamed_by_modules
from secateur.runtime.errors import UsageError

Remap = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Renames the tensors of a published file as a network names them."""

INPUT_TRANSFORMED = ("googlenet", "inception_v3")
"""torchvision's networks with weights from TensorFlow, for images in [-1, 1].

They take images normalised as for the others, and transform them themselves.
"""
OLD_DENSENET_NAME = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)$")
"""As in the published files, from when names of modules could hold a dot."""
POSITIONS = "encoder.pos_embedding"
"""Of torchvision's vision transformers, one for each patch and one more."""


def build_torchvision(name: str, num_classes: int) -> nn.Module:
    """Return torchvision's network as its `weights=` would build it, untrained."""
    options: dict[str, Any] = {}
    if name in INPUT_TRANSFORMED:
        options = {"init_weights": True, "aux_logits": False, "transform_input": True}
    elif name.startswith("vit_"):
        weights = next(iter(torchvision.models.get_model_weights(name)))
        options = {"image_size": weights.meta["min_size"][0]}
    model = torchvision.models.get_model(name, num_classes=num_classes, **options)
    assert isinstance(model, nn.Module)
    return model


def transform_notice(name: str) -> str:
    """Return what to know of a network that transforms its images; else nothing."""
    if name.removeprefix("torchvision:") not in INPUT_TRANSFORMED or ":" not in name:
        return ""
    return (
        f"{name} maps its images to [-1, 1] itself, as its published weights want it "
        "(transform_input=True). If yours were trained without this, build the network in a file "
        "of your own: -m net.py:build."
    )


def build_timm(name: str, num_classes: int) -> tuple[nn.Module, Remap]:
    """Return timm's network as `pretrained=True` would build it, untrained, and its renaming.

    Raises `UsageError` if timm is not installed.
    """
    timm = import_timm()
    with _without_pretrained_weights() as loads:
        model = timm.create_model(name, pretrained=True, num_classes=num_classes)

    def remap(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        for options in loads:
            if (rename := options.get("filter_fn")) is not None:
                try:
                    tensors = rename(dict(tensors), model)
                except TypeError:  # as timm does: some take no network
                    tensors = rename(dict(tensors))
        return tensors

    return model, remap


@contextmanager
def _without_pretrained_weights() -> Iterator[list[dict[str, Any]]]:
    """Keep timm from loading weights; yield the arguments of the calls that would have."""
    from timm.models import _builder

    loads: list[dict[str, Any]] = []
    load_pretrained = _builder.load_pretrained
    _builder.load_pretrained = lambda model, **options: loads.append(options)
    try:
        yield loads
    finally:
        _builder.load_pretrained = load_pretrained


def import_timm() -> Any:
    """Import timm; raise `UsageError` that names the extra if it is not installed."""
    try:
        import timm
    except ImportError as error:
        raise UsageError("timm: networks need the extra: pip install 'secateur[timm]'") from error
    return timm


def adapt(
    model: nn.Module, tensors: Mapping[str, Tensor], remap: Remap | None = None
) -> dict[str, Tensor]:
    """Return the tensors of a file under the names that `model.state_dict()` has.

    Old names are translated by `remap`, as torchvision does it and by the network's own modules;
    auxiliary heads that the network has switched off are left out. A change that makes no more
    tensors fit is undone. torchvision's vision transformer takes on the image size of the file.
    """
    best = dict(tensors)
    if isinstance(model, VisionTransformer) and POSITIONS in best:
        set_image_size(model, math.isqrt(best[POSITIONS].shape[1] - 1) * model.patch_size)
    changes = (
        remap or dict,
        _new_densenet_names,
        partial(renamed_by_modules, model),
        partial(_without_auxiliary_heads, model),
    )
    misfits = count_misfits(model, best)
    for change in changes:
        if misfits == 0:
            break
        try:
            changed = dict(change(best))
            remaining = count_misfits(model, changed)
        except Exception:  # a renaming may raise anything if the file is of another network
            continue
        if remaining < misfits:
            best, misfits = changed, remaining
    return best


def set_image_size(model: nn.Module, image_size: int) -> None:
    """Let torchvision's vision transformer take images of another size; others take any.

    Its embeddings of positions are then untrained.
    """
    if not isinstance(model, VisionTransformer) or model.image_size == image_size:
        return
    model.image_size = image_size
    model.seq_length = (image_size // model.patch_size) ** 2 + 1
    old = model.encoder.pos_embedding
    size = (1, model.seq_length, old.shape[2])
    model.encoder.pos_embedding = nn.Parameter(old.new_zeros(size), old.requires_grad)


def _new_densenet_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {OLD_DENSENET_NAME.sub(r"\1\2", name): tensor for name, tensor in tensors.items()}


def _without_auxiliary_heads(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out `aux….*` where the network has the attribute `aux…` and it is None."""
    heads = {name.partition(".")[0] for name in tensors if name.lower().startswith("aux")}
    off = {name for name in heads if getattr(model, name, model) is None}
    return {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] not in off}
