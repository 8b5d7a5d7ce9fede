"""What the machine or torch does not grant, in one line: memory, a disk, the other processes."""

from __future__ import annotations

import torch
import torch.distributed as dist

OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "cannot allocate memory")
"""What torch's allocators say in errors that have no type of their own."""
LOST_PROCESS = ("connection closed by peer", "connection reset by peer", "connection refused")
LOST_PROCESS_PLACE = "gloo"
LOST_READER = ("dataloader worker",)
UNUSED = ("expected to have finished reduction in the prior iteration",)
"""What torch says in training over processes where parameters get no gradients."""


def explain(error: BaseException) -> str | None:
    """One line on an error that is no fault of the code; None for any other."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _says(error, OUT_OF_MEMORY):
        return (
            "there is not enough memory: --set data.batch_size=N, or in training "
            f"finetune.gradient_accumulation_steps=N, takes less{f' ({text})' if text else ''}"
        )
    if _says(error, LOST_READER):
        return (
            "a process that reads images has ended, as it does where memory is short: --set "
            f"finetune.workers=0 reads in this one ({text})"
        )
    if _says(error, UNUSED):
        return (
            "the network has parameters that its forward does not use, which can't be trained "
            "over several processes: take them out, set their requires_grad to False, or train in "
            "one process"
        )
    is_of_processes = isinstance(error, dist.DistError) or LOST_PROCESS_PLACE in text.lower()
    if isinstance(error, RuntimeError) and (is_of_processes or _says(error, LOST_PROCESS)):
        return f"another process of this run has ended or can't be reached ({text})"
    if isinstance(error, OSError):
        return text
    return None


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
