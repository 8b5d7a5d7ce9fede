"""Which numbers the network computes with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from secateur.config import Precision


@contextlib.contextmanager
def autocast(precision: Precision) -> Iterator[None]:
    """bfloat16 where `precision` asks for it or, with `auto`, where the CPU computes in it."""
    wanted = has_fast_bfloat16() if precision == "auto" else precision == "bfloat16"
    with torch.autocast("cpu", torch.bfloat16, enabled=wanted):
        yield


def has_fast_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 products."""
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("amx_bf16", "avx512_bf16", "bf16"))
