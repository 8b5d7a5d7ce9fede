"""Explain errors of the system and of torch in one line: memory, disk, other processes."""

from __future__ import annotations

import sys

OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "cannot allocate memory")
"""What torch's allocators write in errors that have no class of their own."""
LOST_PROCESS = ("connection closed by peer", "connection reset by peer", "connection refused")
LOST_PROCESS_BACKEND = "gloo"
LOST_DATA_WORKER = ("dataloader worker",)
UNUSED_PARAMETERS = ("expected to have finished reduction in the prior iteration",)
"""What torch writes if parameters get no gradients in distributed training."""


def explain(error: BaseException) -> str | None:
    """Return one line on an error that is not a bug of secateur; None for any other error."""
    text = " ".join(str(error).split())
    if _is_out_of_memory(error):
        return (
            "there is not enough memory: use less with --set data.batch_size=N or, in training, "
            f"--set finetune.gradient_accumulation_steps=N{f' ({text})' if text else ''}"
        )
    if _mentions(error, LOST_DATA_WORKER):
        return (
            "a process that reads images has died, usually for lack of memory: read them in the "
            f"main process with --set finetune.workers=0 ({text})"
        )
    if _mentions(error, UNUSED_PARAMETERS):
        return (
            "the network has parameters that its forward does not use, and distributed training "
            "can't handle these: remove them, set their requires_grad to False, or train in one "
            "process"
        )
    if _is_lost_process(error, text):
        return f"another process of this run has ended or can't be reached ({text})"
    if isinstance(error, OSError):
        return text
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or _mentions(error, OUT_OF_MEMORY):
        return True
    torch = sys.modules.get("torch")  # an error of torch's comes from a torch that is imported
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _is_lost_process(error: BaseException, text: str) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    dist = sys.modules.get("torch.distributed")
    if dist is not None and isinstance(error, dist.DistError):
        return True
    return LOST_PROCESS_BACKEND in text.lower() or _mentions(error, LOST_PROCESS)


def _mentions(error: BaseException, phrases: tuple[str, ...]) -> bool:
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in text for phrase in phrases)
