"""The widths that a cut network states of itself, as its library means them."""

from __future__ import annotations

import importlib

from torch import nn

from secateur.graph.dependency import DependencyGraph, Removed
from secateur.graph.widths import Widths
from secateur.graph.widths import update_widths as update_common_widths
from secateur.runtime.errors import UsageError

LIBRARIES = {
    "segmentation_models_pytorch": "segmentation_models",
    "timm": "timm",
    "torchvision": "torchvision",
    "transformers": "transformers",
}
"""Package that a module's class is from -> module of `secateur.integrations` that knows it."""


def update_widths(
    model: nn.Module, smaller: nn.Module, dependencies: DependencyGraph, removed: Removed
) -> None:
    """Let the modules of `smaller`, cut from `model`, state the widths that they have now."""
    widths = Widths(dependencies, removed)
    update_common_widths(model, smaller, widths)
    modules = dict(smaller.named_modules())
    for path, module in model.named_modules():
        package = type(module).__module__.partition(".")[0]
        if package in LIBRARIES and path in modules:
            library = importlib.import_module(f"secateur.integrations.{LIBRARIES[package]}")
            library.update_widths(path, module, modules[path], widths)


def refuse_save_pretrained(smaller: nn.Module) -> None:
    """Let `save_pretrained` of a network with other layers than its configuration's be an error.

    `from_pretrained` would fill the layers that the file lacks at random, with no more than a
    warning. Where layers only have fewer channels it raises an error itself.
    """
    for module in smaller.modules():
        if callable(getattr(type(module), "save_pretrained", None)):
            module.save_pretrained = _refuse  # type: ignore[assignment]


def _refuse(*_: object, **__: object) -> None:
    raise UsageError(
        "save_pretrained can't describe a network with split convolutions or dropped branches: "
        "from_pretrained would fill their layers at random. Write a run folder (secateur.save), "
        "or save its state_dict(); with a Trainer, set save_strategy='no'"
    )
