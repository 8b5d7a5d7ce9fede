"""The logits among what a network returns, as one pass over a few images tells."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.config import TaskKind
from secateur.graph.forward import forward_of, with_forward
from secateur.models.examine import form_of_outputs, logits_of, run_network
from secateur.models.task import select_logits
from secateur.runtime.errors import UsageError
from secateur.runtime.torch_internals import Convolution

FEW = 2
"""Images that a network is tried on."""
VALUES = ("detection", "regression")
"""Tasks whose outputs are compared tensor by tensor."""


def through_logits(
    network: nn.Module, images: Tensor, kind: TaskKind | Literal["auto"] = "auto"
) -> nn.Module:
    """Return a network as it is, or as it runs through `logits_of` if it needs that.

    The first entry of a tuple is taken for the logits, unless `kind` says that all are compared as
    values. The network is tried on a few of the images; one that can't take them, or that runs
    through a function of the user's, is returned as it is.
    """
    if forward_of(network) is None:
        with contextlib.suppress(UsageError):
            output = _try(network, images)
            is_tuple = isinstance(output, tuple | list) and not hasattr(output, "logits")
            is_values = form_of_outputs(output, len(images[:FEW])) == "values"
            is_taken = not is_values and not (is_tuple and kind in VALUES)
            if select_logits(output) is not output and is_taken:
                return with_forward(network, logits_of)
    return network


def with_logits(
    network: nn.Module, images: Tensor, kind: TaskKind | Literal["auto"] = "auto"
) -> nn.Module:
    """Return the network that returns logits: as it is, or through `logits_of` if need be.

    One that returns other tensors, with more than one row for each image, is returned as it is.
    Raises `UsageError` that says what to do where the network can't take the images, or returns
    several things without saying which are the logits.
    """
    original, network = network, through_logits(network, images, kind)
    output = _try(network, images)
    if kind in VALUES or isinstance(output, Tensor) or _is_values(output, len(images[:FEW])):
        return network
    raise UsageError(
        f"the network must return logits [image, class]; it returns {_description(output)}: say "
        f"which they are, {_remedy(output, has_forward=forward_of(original) is not None)}"
    )


def _try(network: nn.Module, images: Tensor) -> object:
    """Return the network's output; raise `UsageError` that says why it can't take the images."""
    images = images[:FEW]
    try:
        with torch.inference_mode():
            return run_network(network, images)
    except UsageError as error:
        remedy = _channel_remedy(network, images)
        if not remedy:
            raise
        shape = list(images.shape)
        raise UsageError(f"the network can't be run on images {shape}: {remedy}") from error


def _is_values(output: object, images: int) -> bool:
    """Return whether outputs hold no logits, but something else that can be compared."""
    try:
        return form_of_outputs(output, images) == "values"
    except UsageError:
        return False


def _channel_remedy(network: nn.Module, images: Tensor) -> str:
    """Return what to do if the images have other channels than the first convolution takes."""
    first = _first_convolution(network)
    if first is None or images.ndim != len(first.kernel_size) + 2:
        return ""
    wanted, channels = first.in_channels, images.shape[1]
    if channels == wanted:
        return ""
    if images.shape[-1] == wanted:
        return (
            f"they look like [image, height, width, channel]: pass images.movedim(-1, 1), with the "
            f"{wanted} channels second"
        )
    remedy = "pass images with the channels that it was trained with"
    if channels == 1:
        remedy = f"repeat it, images.repeat_interleave({wanted}, dim=1)"
    have = f"they have {channels} channel{'s' if channels > 1 else ''}"
    return f"{have}, and its first convolution takes {wanted}: {remedy}"


def _first_convolution(model: nn.Module) -> Convolution | None:
    return next((module for module in model.modules() if isinstance(module, Convolution)), None)


def _description(output: object) -> str:
    """Return what an output holds, in words."""
    if isinstance(output, Mapping):
        return f"{type(output).__name__} with {', '.join(map(str, output))}"
    if isinstance(output, tuple | list):
        parts = (
            str(list(part.shape)) if isinstance(part, Tensor) else type(part).__name__
            for part in output
        )
        return f"a {type(output).__name__} of {' and '.join(parts)}"
    return type(output).__name__


def _remedy(output: object, *, has_forward: bool) -> str:
    part = ""
    if isinstance(output, Mapping) and output:
        part = f"[{next(iter(output))!r}]"
    elif isinstance(output, tuple | list):
        part = "[0]"
    if has_forward:
        return f"by letting forward return one tensor{part and f', such as its output{part}'}"
    return f"such as forward=lambda model, images: model(images){part or '.logits'}"
