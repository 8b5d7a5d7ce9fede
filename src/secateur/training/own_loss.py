"""A loss of the user's: a function of what the network returns and of the labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.objects import Objects
from secateur.models import user_code, zoo
from secateur.runtime.errors import SecateurError, UsageError

LossFunction = Callable[[Any, Any], Tensor]
"""`loss(output, labels)` returns a tensor of one number, a mean over the images."""
AUTO = "auto"
"""The name of the loss that suits the task."""


class OwnLoss:
    """The loss that a function computes; raises `UsageError` if that can't be called with two."""

    def __init__(self, function: LossFunction, name: str = "") -> None:
        self.name: str = name or name_of(function)
        if not callable(function) or not _takes_two(function):
            raise UsageError(
                f"loss {self.name} must be a function of what the network returns and of the "
                "labels: loss(output, labels) returns a tensor of one number"
            )
        self._function = function

    @property
    def module(self) -> nn.Module | None:
        """The loss, if it is a module, whose tensors must lie where the network's do."""
        return self._function if isinstance(self._function, nn.Module) else None

    def __call__(self, output: object, labels: Tensor | Sequence[Objects]) -> Tensor:
        """Return the loss for what the network returned for a batch, and the batch's labels.

        Raises `UsageError` if the function fails, or returns anything but one number that can be
        differentiated.
        """
        try:
            loss: object = self._function(output, labels)
        except SecateurError:
            raise
        except Exception as error:  # user code may raise anything
            reason = " ".join(str(error).split())
            raise UsageError(
                f"loss {self.name} failed on {_description(output)} and "
                f"{_description(labels)}: {type(error).__name__}: {reason}"
            ) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            raise UsageError(
                f"loss {self.name} must return a tensor of one number, a mean over the images; it "
                f"returned {_description(loss)}"
            )
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise UsageError(
                f"loss {self.name} returned a number without a gradient: compute it from the "
                "output by torch's functions, without argmax, item or detach"
            )
        return loss.reshape(())


def find_loss(name: str, passed: LossFunction | None = None) -> OwnLoss | None:
    """Return the loss `path/to/file.py:function`, or the one that was passed from Python.

    It is None for `auto`. Raises `UsageError` or `UnknownName` if there is no such function.
    """
    if passed is not None:
        return OwnLoss(passed)
    check_name(name)
    if name == AUTO:
        return None
    return OwnLoss(user_code.find(name, "loss"), name.rpartition(":")[2])


def check_name(name: str) -> None:
    """Raise `UsageError` if a name is not that of a loss."""
    if name.startswith(f"{zoo.IN_MEMORY}:"):
        raise UsageError(f"{name}: the loss was passed from Python: pass it again")
    if user_code.is_user_code(name):
        user_code.check_file(name, "loss")
    elif name != AUTO:
        raise UsageError(f"loss {name!r} is neither auto nor path/to/file.py:function")


def name_of(function: object) -> str:
    """Return what a function is called in records and messages."""
    return getattr(function, "__name__", type(function).__name__)


def _takes_two(function: Callable[..., Any]) -> bool:
    if isinstance(function, type):
        return False  # of a class it would be an instance that is called
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # some functions written in C have no signature
        return True
    return True


def _description(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__
