"""Networks that run through a function of the user's: `forward(model, images)`."""

from __future__ import annotations

import copy
import types
from typing import Any, ClassVar

from torch import Tensor, nn

from secateur.graph.network_graph import Forward
from secateur.graph.wrappers import unwrapped
from secateur.runtime.errors import UsageError


class RunsThroughForward:
    """Mixed into the class of a network whose call runs `forward(model, images)`.

    Such a network is another view of the user's: it has the same modules, tensors, hooks and
    attributes under the same names, and shares them. Its copies run through the function, too.
    """

    function: ClassVar[Forward]
    original_class: ClassVar[type[nn.Module]]

    def __call__(self, images: Tensor) -> Any:
        """Return the function's output."""
        return self.forward(images)

    def forward(self, images: Tensor) -> Any:
        """Return the function's output."""
        return type(self).function(_view(self, self.original_class), images)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """Return a copy that runs through the same function."""
        network = copy.deepcopy(_view(self, self.original_class), memo)
        copied = with_forward(network, type(self).function)
        memo[id(self)] = copied
        return copied


def with_forward(model: nn.Module, forward: Forward | None) -> nn.Module:
    """Return `model` as a network whose call is `forward(model, images)`; None: `model` itself.

    Nothing is copied: both share their modules and tensors. Of a compiled network it is the
    original. Raises `UsageError` if `forward` can't be called.
    """
    if forward is None or forward is forward_of(model):
        return model
    if not callable(forward):
        raise UsageError(
            f"forward must be a function of the network and the images, not {forward!r}: "
            "forward=lambda model, images: model(images).logits"
        )
    network = without_forward(unwrapped(model))
    original_class = type(network)
    attributes = {
        "function": staticmethod(forward),
        "original_class": original_class,
        "__module__": original_class.__module__,
    }
    kind = types.new_class(
        original_class.__name__,
        (RunsThroughForward, original_class),
        exec_body=lambda namespace: namespace.update(attributes),
    )
    return _view(network, kind)


def without_forward(model: nn.Module) -> nn.Module:
    """Return the network in its own class, whose modules and tensors it shares."""
    return _view(model, model.original_class) if isinstance(model, RunsThroughForward) else model


def forward_of(model: nn.Module) -> Forward | None:
    """Return the function that a network runs through; None for its own forward pass."""
    return type(model).function if isinstance(model, RunsThroughForward) else None


def name_of(forward: Forward | None) -> str | None:
    """Return the name of a function, for records: `my_module.my_forward`."""
    if forward is None:
        return None
    name = getattr(forward, "__qualname__", type(forward).__qualname__)
    return f"{getattr(forward, '__module__', None) or type(forward).__module__}.{name}"


def _view(model: Any, kind: type[nn.Module]) -> nn.Module:
    """Return an object of another class with the same attributes, shared and not copied."""
    view: nn.Module = object.__new__(kind)
    view.__dict__ = model.__dict__
    return view
