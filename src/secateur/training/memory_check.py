"""Check that a training step fits into memory."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.graph.module_state import device_of, evaluating
from secateur.runtime.errors import SecateurError
from secateur.runtime.memory import free_bytes
from secateur.runtime.torch_internals import storage_key


def check_training(
    model: nn.Module, images: Float[Tensor, "image channel *position"], batch_size: int
) -> None:
    """Raise `SecateurError` if a training step on `batch_size` images needs more than free memory.

    What autograd saves is measured on half of the few `images` and on all of them, and
    extrapolated: values that don't grow with the batch, such as kernels in another precision, count
    once.
    """
    half = max(1, len(images) // 2)
    few, more = (_saved_bytes(model, batch) for batch in (images[:half], images))
    growing = (more - few) / max(1, len(images) - half) if len(images) > half else float(more)
    needed = more + growing * (batch_size - len(images))
    free = free_bytes(device_of(model))
    if needed > free:
        raise SecateurError(
            f"a training step on {batch_size} images takes about {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free: a smaller batch_size or a larger "
            "gradient_accumulation_steps takes less"
        )


def _saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Return the bytes that autograd saves for a step on images, without the network's tensors."""
    network = {storage_key(tensor) for tensor in model.state_dict().values()}
    saved: dict[int, torch.UntypedStorage] = {}
    """By `storage_key`; kept alive, so that no other tensor gets the same one."""

    def record(tensor: Tensor) -> None:
        if storage_key(tensor) not in network:
            saved[storage_key(tensor)] = tensor.untyped_storage()
        # Returns nothing: the graph would keep the tensor alive, and the tensor the graph.

    with evaluating(model), torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(record, lambda nothing: nothing):
            outputs = model(images)
        del outputs
    return sum(storage.nbytes() for storage in saved.values())
