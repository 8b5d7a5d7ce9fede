"""Whether a training step fits into memory."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.runtime.memory import free_bytes
from secateur.runtime.module_state import device_of, evaluating


def check_training(
    model: nn.Module, images: Float[Tensor, "image channel *position"], at_once: int
) -> None:
    """Raises `SecateurError` where a step on so many images at once takes more memory than is free.

    What a step holds is measured on half of the few `images` and on all of them: the values that
    gradients are computed from, of which those that don't grow with the batch, such as kernels in
    another precision, count once.
    """
    half = max(1, len(images) // 2)
    few, more = (_model_bytes(model, some) for some in (images[:half], images))
    growing = (more - few) / max(1, len(images) - half) if len(images) > half else float(more)
    needed = more + growing * (at_once - len(images))
    free = free_bytes(device_of(model))
    if needed > free:
        raise SecateurError(
            f"a training step on {at_once} images takes about {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free: a smaller batch_size or a larger accumulate "
            "takes less"
        )


def _model_bytes(model: nn.Module, images: Tensor) -> int:
    """What a step on these images holds for its gradients, beside the network itself."""
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    held: dict[int, torch.UntypedStorage] = {}
    """By address; held, so that no other value takes the place of one and is missed."""

    def note(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage
        # Nothing is left in place of the tensor: the graph would hold it, and it the graph.

    with evaluating(model), torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(note, lambda nothing: nothing):
            answers = model(images)
        del answers
    return sum(storage.nbytes() for storage in held.values())
