"""Networks that run through a function of the user's, or take several inputs in one tensor."""

from __future__ import annotations

import copy
import types
from typing import Any, ClassVar

from torch import nn

from secateur.graph.network_graph import Forward
from secateur.graph.wrappers import unwrapped
from secateur.runtime.errors import UsageError
from secateur.runtime.packed_inputs import Inputs


class RunsThroughForward:
    """Mixed into the class of a network whose call runs `forward(model, images)`.

    Such a network is another view of the user's: it has the same modules, tensors, hooks and
    attributes under the same names, and shares them. Its copies run in the same way. With `inputs`
    it is called with one tensor, which holds them all.
    """

    function: ClassVar[Forward | None]
    inputs: ClassVar[Inputs | None]
    original_class: ClassVar[type[nn.Module]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the function's output."""
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the function's output."""
        kind = type(self)
        network = _view(self, self.original_class)
        if kind.inputs is not None:
            (packed,) = args
            args, kwargs = kind.inputs.arguments(kind.inputs.unpack(packed))
        if kind.function is None:
            return network(*args, **kwargs)
        return kind.function(network, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """Return a copy that runs in the same way."""
        network = copy.deepcopy(_view(self, self.original_class), memo)
        copied = _running(network, type(self).function, type(self).inputs)
        memo[id(self)] = copied
        return copied


def with_forward(model: nn.Module, forward: Forward | None) -> nn.Module:
    """Return `model` as a network whose call is `forward(model, images)`; None: `model` itself.

    Nothing is copied: both share their modules and tensors. Of a compiled network it is the
    original. A network that takes several inputs (`with_inputs`) passes them to the function.
    Raises `UsageError` if `forward` can't be called.
    """
    if forward is None or forward is forward_of(model):
        return model
    if not callable(forward):
        raise UsageError(
            f"forward must be a function of the network and the images, not {forward!r}: "
            "forward=lambda model, images: model(images).logits"
        )
    return _running(model, forward, inputs_of(model))


def with_inputs(model: nn.Module, inputs: Inputs | None) -> nn.Module:
    """Return `model` as a network that takes several inputs in one tensor; None: `model` itself.

    Nothing is copied: both share their modules and tensors.
    """
    if inputs is None or inputs == inputs_of(model):
        return model
    return _running(model, forward_of(model), inputs)


def without_forward(model: nn.Module) -> nn.Module:
    """Return the network in its own class, whose modules and tensors it shares."""
    return _view(model, model.original_class) if isinstance(model, RunsThroughForward) else model


def forward_of(model: nn.Module) -> Forward | None:
    """Return the function that a network runs through; None for its own forward pass."""
    return type(model).function if isinstance(model, RunsThroughForward) else None


def inputs_of(model: nn.Module) -> Inputs | None:
    """Return the inputs that a network takes in one tensor; None for one that takes a tensor."""
    return type(model).inputs if isinstance(model, RunsThroughForward) else None


def _running(model: nn.Module, function: Forward | None, inputs: Inputs | None) -> nn.Module:
    """Return a view of a network that runs through a function, or takes inputs in one tensor."""
    network = without_forward(unwrapped(model))
    original_class = type(network)
    attributes = {
        "function": None if function is None else staticmethod(function),
        "inputs": inputs,
        "original_class": original_class,
        "__module__": original_class.__module__,
    }
    kind = types.new_class(
        original_class.__name__,
        (RunsThroughForward, original_class),
        exec_body=lambda namespace: namespace.update(attributes),
    )
    return _view(network, kind)


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
