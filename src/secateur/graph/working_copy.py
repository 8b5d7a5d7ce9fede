"""The network that a run works on, and its result in the form of the user's network.

Runs are computed in float32 on the network's device, and with weights that gradients can go
through.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from secateur.graph.module_state import as_input, copy_of, device_of, evaluating, owner_of
from secateur.runtime.torch_internals import is_compiled_in_place


def working_copy(model: nn.Module, images: Tensor | None = None) -> nn.Module:
    """Return `model`, or a copy of it if it can't be worked on as it is.

    A network whose parameters are all bfloat16, float16 or float64 becomes a float32 one. One with
    parameters of several types stays as it is, unless it can't be run on the `images`. One that is
    spread over several devices is copied to that of its first parameter.
    """
    tensors = [*model.parameters(), *model.buffers()]
    types = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if (
        types <= {torch.float32}
        and len({tensor.device for tensor in tensors}) <= 1
        and not any(tensor.is_inference() for tensor in tensors)
        and not any(map(is_compiled_in_place, model.modules()))
    ):
        return model
    candidates = _candidates(model, types)
    first = next(candidates)
    if images is None or can_run(first, images):
        return first
    return next((network for network in candidates if can_run(network, images)), first)


def _candidates(model: nn.Module, types: set[torch.dtype]) -> Iterator[nn.Module]:
    """Yield copies on one device, the likelier first: in float32, and with the types they have."""
    device = device_of(model)
    if len(types) == 1 and types != {torch.float32}:
        yield copy_of(model, share_tensors=False).to(device, torch.float32)
    yield copy_of(model, share_tensors=False).to(device)
    if len(types) > 1:
        yield copy_of(model, share_tensors=False).to(device, torch.float32)


def can_run(model: nn.Module, images: Tensor) -> bool:
    """Return whether a network can be run on images, in evaluation mode and on its device."""
    try:
        with evaluating(model), torch.no_grad():
            model(as_input(model, images))
    except Exception:  # the network is the user's: it may raise anything
        return False
    return True


def like_original(smaller: nn.Module, original: nn.Module) -> nn.Module:
    """Return a copy of a cut network with the devices and types of the network it was cut from."""
    result = copy_of(smaller, share_tensors=False)
    tensors = {**dict(original.named_parameters()), **dict(original.named_buffers())}
    for name, tensor in [*result.named_parameters(), *result.named_buffers()]:
        before = tensors.get(name)
        owner = name
        while before is None:  # a convolution that is two now, or a constant: what it replaces
            owner = owner_of(owner)
            inside = (t for n, t in tensors.items() if n.startswith(f"{owner}.") or not owner)
            before = next((t for t in inside if t.is_floating_point()), None)
        tensor.data = tensor.data.to(before.device, before.dtype)
    return result
