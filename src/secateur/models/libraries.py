"""Networks of other libraries by name, `LIBRARY:NAME`: see `secateur.integrations`."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from secateur.data.detections import Decoder
from secateur.data.preprocessing import Preprocessing
from secateur.graph.output_values import OutputPart

LIBRARIES = {
    "smp": "segmentation_models",
    "transformers": "transformers",
    "ultralytics": "ultralytics",
    "yolox": "yolox",
}
"""Prefix of the names -> module of `secateur.integrations`."""


def is_library(name: str) -> bool:
    """Return whether a network's name is that of a library here and one of its networks."""
    return name.partition(":")[0] in LIBRARIES


def build(name: str, num_classes: int | None) -> nn.Module:
    """Return the named network in evaluation mode; raise `UnknownName` or `UsageError`.

    Without `num_classes` it has as many as its library gives it.
    """
    model: nn.Module = _module(name).build(name.partition(":")[2], num_classes=num_classes)
    return model


def preprocessing(name: str) -> Preprocessing:
    """Return what the named network expects of images, as its library says."""
    result: Preprocessing = _module(name).preprocessing(name.partition(":")[2])
    return result


def output_parts(name: str) -> tuple[OutputPart, ...]:
    """Return what is compared of the network's output; empty: what its outputs look like tells."""
    parts: tuple[OutputPart, ...] = getattr(_module(name), "OUTPUT_PARTS", ())
    return parts


def has_weights(name: str) -> bool:
    """Return whether the named network comes with its weights."""
    if not is_library(name) or not hasattr(_module(name), "has_weights"):
        return False
    return bool(_module(name).has_weights(name.partition(":")[2]))


def decoder(name: str, model: nn.Module) -> Decoder | None:
    """Return what makes boxes of the network's output; None for a network that is no detector."""
    module = _module(name)
    if not hasattr(module, "decoder"):
        return None
    result: Decoder | None = module.decoder(model)
    return result


def _module(name: str) -> Any:
    return importlib.import_module(f"secateur.integrations.{LIBRARIES[name.partition(':')[0]]}")
