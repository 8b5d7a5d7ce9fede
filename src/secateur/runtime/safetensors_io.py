"""Read and write safetensors files, with a hash that shows whether they are damaged.

The format has no checksum, so a flipped bit in a weight would go unnoticed. Files that secateur
writes hold the hash of their tensors in the metadata; files of others are read without one.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from secateur.runtime.hashing import weights_hash
from secateur.runtime.input_limits import check_safetensors

HASH, WRITER = "secateur.sha256", "written_by"
"""Keys of the metadata."""
OURS = "secateur"
ALIGNMENT = 8
"""Tensors start at multiples of this many bytes."""


def to_bytes(tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None) -> bytes:
    """Return the content of a file with these tensors, and with `facts` in its metadata.

    Tensors that share memory are written separately. Equal tensors and facts give equal bytes.
    """
    copies = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format).cpu()
        for name, tensor in tensors.items()
    }
    metadata = {"format": "pt", WRITER: OURS, HASH: weights_hash(copies), **(facts or {})}
    content = save(copies, metadata)
    header, start = _header(content)
    header["__metadata__"] = metadata  # safetensors writes these in an order that changes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text + content[start:]


def from_bytes(content: bytes) -> dict[str, Tensor]:
    """Return the tensors in a file's content; raises `ValueError` if it is damaged."""
    try:
        tensors = load(content)
        metadata = _header(content)[0].get("__metadata__", {})
    except (SafetensorError, KeyError, struct.error, RecursionError) as error:
        raise ValueError(str(error)) from error
    _check(tensors, metadata)
    return tensors


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file and its metadata.

    Raises `ValueError` if the file is damaged or its header is too large, and `OSError`.
    """
    check_safetensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, struct.error) as error:
        raise ValueError(str(error)) from error
    _check(tensors, metadata)
    return tensors, metadata


def _header(content: bytes) -> tuple[dict[str, Any], int]:
    """Return the header of a file's content, and the offset of the tensors' values."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), 8 + length


def _check(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    is_ours = metadata.get(WRITER) == OURS or HASH in metadata
    if is_ours and metadata.get(HASH) != weights_hash(tensors):
        raise ValueError("its tensors don't match their hash: the file is damaged")
