"""secateur's safetensors files: the same bytes each time, and damage is noticed."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from secateur.models import checkpoint_files
from secateur.runtime import safetensors_io
from secateur.runtime.errors import WeightsError

TENSORS = {
    "größe": torch.arange(6.0).reshape(2, 3),
    "half": torch.ones(5).bfloat16(),
    "count": torch.tensor(7),
    "none": torch.zeros(0),
}


def same(tensors: dict[str, Tensor]) -> bool:
    return tensors.keys() == TENSORS.keys() and all(
        torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype
        for name, tensor in TENSORS.items()
    )


def test_written_tensors_are_read_back(tmp_path: Path) -> None:
    content = safetensors_io.to_bytes(TENSORS, {"facts": '{"epoch": 1}'})
    assert same(safetensors_io.from_bytes(content))
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    tensors, facts = safetensors_io.read(path)
    assert same(tensors)
    assert facts["facts"] == '{"epoch": 1}'


def test_the_same_tensors_are_the_same_bytes() -> None:
    shared = torch.rand(4, 4)
    tensors = {"a": shared, "b": shared.T}  # safetensors refuses memory that two share
    assert len({safetensors_io.to_bytes(tensors, {"facts": "x"}) for _ in range(8)}) == 1


def test_a_bit_that_has_flipped_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    content = safetensors_io.to_bytes(TENSORS)
    (length,) = struct.unpack("<Q", content[:8])
    path = tmp_path / "w.safetensors"
    for place in range(8 + length, len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 4
        with pytest.raises(ValueError, match="damaged"):
            safetensors_io.from_bytes(bytes(damaged))
        path.write_bytes(damaged)
        with pytest.raises(WeightsError, match="damaged"):
            checkpoint_files.read_checkpoint(path)


def test_a_missing_hash_is_an_error(tmp_path: Path) -> None:
    content = safetensors_io.to_bytes(TENSORS)
    with pytest.raises(ValueError, match="damaged"):
        safetensors_io.from_bytes(content.replace(b".sha256", b".sha255"))


def test_files_of_others_have_no_hash_and_are_read() -> None:
    assert same(safetensors_io.from_bytes(save(TENSORS)))
    assert same(
        safetensors_io.from_bytes(save(TENSORS, {"format": "pt", "sha256": "of something else"}))
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        struct.pack("<Q", 2**62),
        struct.pack("<Q", 2) + b"[]",
        save({"a": TENSORS["half"]})[:-1],
    ],
)
def test_another_file_is_a_value_error(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r".+"):
        safetensors_io.from_bytes(content)
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r".+"):
        safetensors_io.read(path)


def test_metadata_equals_that_read_by_safetensors(tmp_path: Path) -> None:
    content = safetensors_io.to_bytes(TENSORS)
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header["__metadata__"]["format"] == "pt"
    assert length % 8 == 0
