"""How much memory a pass over images takes, and how much there is: looked at before it is short."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.evaluation.evaluate import device_of
from secateur.graph.dependency import Wiring
from secateur.graph.trace import evaluating
from secateur.pruning.cost.memory import all_bytes, peak_bytes

SHARE = 0.5
"""Of what is free, for the values of a batch; the rest is for what operations take meanwhile."""
LEAST_BATCH = 2
CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still have on a device, within its container where it is in one.

    Raises nothing where the system does not tell: then it is as if there were no bound.
    """
    if device.type == "cuda":
        # What torch keeps of what was freed is there for the next tensors.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return min(int(psutil.virtual_memory().available), _container_bytes())


def _container_bytes() -> int:
    try:
        most = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        for line in (CGROUP / "memory.stat").read_text().splitlines():
            name, _, size = line.partition(" ")
            if name == "inactive_file":  # read from files, and given up when memory is short
                used -= int(size)
    except (OSError, ValueError):  # no container, or no bound
        return 2**63
    return max(0, most - used)


def batch_that_fits(wiring: Wiring, asked: int, free: int, *, with_gradients: bool) -> int:
    """The largest number of images at a time, at most `asked`, that a pass has memory for.

    `free` is in bytes. A pass with gradients holds all values, one without those still needed.
    """
    each = all_bytes(wiring) if with_gradients else peak_bytes(wiring)({})
    fits = int(SHARE * free / max(each, 1.0))
    return max(LEAST_BATCH, min(asked, fits))


def check_training(
    model: nn.Module, images: Float[Tensor, "image channel *position"], at_once: int
) -> None:
    """Raises `SecateurError` where a step on so many images at once takes more memory than is free.

    What a step holds is measured on half of the few `images` and on all of them: the values that
    gradients are computed from, of which those that don't grow with the batch, such as kernels in
    another precision, count once.
    """
    half = max(1, len(images) // 2)
    few, more = (_held_bytes(model, some) for some in (images[:half], images))
    growing = (more - few) / max(1, len(images) - half) if len(images) > half else float(more)
    needed = more + growing * (at_once - len(images))
    free = free_bytes(device_of(model))
    if needed > free:
        raise SecateurError(
            f"a training step on {at_once} images takes about {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free: a smaller batch_size or a larger accumulate "
            "takes less"
        )


def _held_bytes(model: nn.Module, images: Tensor) -> int:
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
