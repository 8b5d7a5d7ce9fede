"""A network as exporters take it: tensors in, a tuple of tensors out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engines.output_structure import Structure, take_apart
from secateur.graph.forward import forward_of, inputs_of, with_forward, without_forward
from secateur.graph.module_state import evaluating
from secateur.models.divergence import relative_error


def flat_network(model: nn.Module) -> nn.Module:
    """Return a network whose call takes its inputs one by one and returns a tuple of its tensors.

    It shares modules and tensors with `model`. See `with_inputs` for several inputs.
    """
    inputs, function = inputs_of(model), forward_of(model)

    def flat(network: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        args: tuple[Any, ...] = tensors
        kwargs: dict[str, Any] = {}
        if inputs is not None:
            args, kwargs = inputs.arguments(tensors)
        call = network if function is None else function
        first = () if function is None else (network,)
        return take_apart(call(*first, *args, **kwargs))[0]

    return with_forward(without_forward(model), flat)


def run_flat(model: nn.Module, batch: Tensor) -> tuple[tuple[Tensor, ...], Structure]:
    """Return the tensors that a network returns in evaluation mode, and their structure.

    `batch` is what the network takes: several inputs in one tensor. Raises what `take_apart` does,
    and what the network does.
    """
    with evaluating(model), torch.no_grad():
        return take_apart(model(batch))


def outputs_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest relative error of several outputs; infinite if shapes differ.

    Whole numbers and booleans must be equal: any difference counts as infinite.
    """
    largest = 0.0
    for tensor, wanted in zip(actual, expected, strict=True):
        if tensor.shape != wanted.shape:
            return math.inf
        if not wanted.is_floating_point():
            error = 0.0 if torch.equal(tensor.to(wanted), wanted) else math.inf
        elif not wanted.numel():
            continue
        else:
            error = relative_error(tensor.to(wanted), wanted)
        largest = error if not error <= largest else largest  # keeps a NaN
    return largest


def inputs_in(model: nn.Module, batch: Tensor) -> tuple[Tensor, ...]:
    """Return the inputs of a network in a batch, as `flat_network` takes them."""
    inputs = inputs_of(model)
    return (batch,) if inputs is None else inputs.unpack(batch)
