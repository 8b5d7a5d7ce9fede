"""Freed memory is kept for the next feature map, not given back to the system and cleared anew."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of `mallopt`, from malloc.h."""
_KEEP_ALL = 2**31 - 1
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
"""The most to which glibc raises its threshold by itself (`DEFAULT_MMAP_THRESHOLD_MAX`)."""
_CHOICES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
"""Variables of the environment by which users set the same; also `GLIBC_TUNABLES`."""

_lock = threading.Lock()
_open_blocks = 0
"""Blocks of `kept_memory` in all threads: the settings are those of the process."""


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory in the process for a block, and give it back at the end.

    glibc maps large tensors from the system and unmaps them when they are freed. So the system
    clears the memory of every large feature map again, which can take longer than to compute it:
    without that EfficientNet-B0 is twice as fast at 16 images of 224². It also serves as a
    decorator. It does nothing where there is no glibc, or where the environment sets glibc's
    thresholds (`MALLOC_TRIM_THRESHOLD_` and others).

    glibc can't be asked for its thresholds, and adjusts them no longer once they are set. What
    stays behind in the process are the largest values to which it raises them by itself, 32 and
    64 MiB, as it does in a process that frees tensors of that size.
    """
    global _open_blocks
    libc = _glibc()
    if libc is None:
        yield
        return
    with _lock:
        _open_blocks += 1
        if _open_blocks == 1:
            libc.mallopt(_MMAP_THRESHOLD, _KEEP_ALL)
            libc.mallopt(_TRIM_THRESHOLD, _KEEP_ALL)
    try:
        yield
    finally:
        with _lock:
            _open_blocks -= 1
            if not _open_blocks:
                libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
                libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
                libc.malloc_trim(0)


def give_memory_back() -> None:
    """Give what `kept_memory` has kept back to the system, between two stages of a run.

    The pieces that one stage freed are seldom of the size that the next one asks for, so both would
    take memory at the same time.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Return glibc, if its thresholds may be set."""
    try:
        version = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):  # Windows, macOS, other C libraries
        return None
    is_chosen = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if not version.startswith("glibc") or is_chosen or any(name in os.environ for name in _CHOICES):
        return None
    return ctypes.CDLL(None)
