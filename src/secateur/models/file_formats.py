"""Tell by their content which files hold weights, and what the others are and how to get weights.

Suffixes don't decide: `.pth`, `.pth.tar`, `.ckpt`, `.bin`, `.th`, `.pkl` and no suffix are all in
use for what `torch.save` writes.
"""

from __future__ import annotations

import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Literal

from secateur.models.torch_files import conversion
from secateur.runtime.errors import WeightsError
from secateur.runtime.input_limits import HEADER

Format = Literal["safetensors", "torch"]
FIRST = 512
"""Bytes that are looked at."""
LEGACY = b"l\xfc\x9cF\xf9 j\xa8P\x19"
"""The number that files of torch before 1.6 start with, as it is pickled."""
ONNX_TAGS = b"\x12\x1a\x22\x2a\x3a\x42"
"""The fields that follow the version in an ONNX file."""
UNPACK = "unpack it and name the file in it"
EXPORT = "load it where its library is installed, and save the tensors with torch.save"
UNKNOWN = "is not a file that torch.save or safetensors wrote: save the network's state_dict()"
MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer", "run git lfs pull in its repository"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes", EXPORT),
    (b"GGUF", "a GGUF file", EXPORT),
    (b"\x93NUMPY", "a NumPy array (.npy)", EXPORT),
    (b"\x1f\x8b", "a gzip archive", UNPACK),
    (b"BZh", "a bzip2 archive", UNPACK),
    (b"\xfd7zXZ\0", "an xz archive", UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!", "a RAR archive", UNPACK),
)
"""First bytes, what they mean, and what to do."""


def format_of(path: Path) -> Format:
    """Return how the tensors of a file are stored; raise `WeightsError` if it is something else."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(FIRST)
    except OSError as error:
        raise WeightsError(f"{path} can't be read: {error}") from error
    if not first:
        raise WeightsError(f"{path} is empty: download or copy it again")
    if _is_safetensors(first, size):
        return "safetensors"
    for magic, meaning, remedy in MAGIC:
        if first.startswith(magic):
            raise WeightsError(f"{path} is {meaning}, not weights: {remedy}")
    if first.startswith(b"PK\x03\x04"):
        _check_zip(path)
        return "torch"
    if first[:1] == pickle.PROTO and LEGACY in first[:64]:
        return "torch"
    meaning = _describe(path, first)
    if not meaning and path.suffix == ".safetensors":
        return "safetensors"  # a damaged one, which the reader explains
    raise WeightsError(f"{path} {meaning or UNKNOWN}")


def _is_safetensors(first: bytes, size: int) -> bool:
    """Return whether a file starts with the length of a JSON header that fits into it."""
    if len(first) < 10:
        return False
    (length,) = struct.unpack("<Q", first[:8])
    return bool(length <= min(HEADER, size - 8)) and first[8:9] == b"{"


def _check_zip(path: Path) -> None:
    """Raise `WeightsError` if a zip file is not of `torch.save`, or is damaged.

    `torch.load` does not look at the checksums.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            is_torch = any(name.endswith("/data.pkl") for name in names)
            is_script = any(name.endswith("/constants.pkl") for name in names)
            if not is_torch or is_script:
                raise WeightsError(f"{path} {_describe_zip(path, names, is_script=is_script)}")
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        raise WeightsError(
            f"{path} is cut short or damaged ({error}): download or copy it again"
        ) from error
    except (OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise WeightsError(f"{path} can't be read: {error}") from error
    if damaged is not None:
        raise WeightsError(
            f"{path} can't be read: the checksum of {damaged!r} does not match: the file is "
            "damaged, or was written without checksums (torch.serialization.set_crc32_options)"
        )


def _describe_zip(path: Path, names: list[str], *, is_script: bool) -> str:
    """Return what a zip file is that is not of `torch.save`, and what to do."""
    if is_script:
        command = conversion(path, 'torch.jit.load(FILE, map_location="cpu").state_dict()')
        return f"is a TorchScript archive, which holds code: convert it with {command}"
    if any(name.endswith(("archive_format", "serialized_state_dict.pt")) for name in names):
        command = conversion(path, "torch.export.load(FILE).state_dict")
        return f"is a program of torch.export, which holds code: convert it with {command}"
    if "model.weights.h5" in names:
        return f"is a Keras file: {EXPORT}"
    if names and all(name.endswith(".npy") for name in names):
        return f"is a NumPy archive (.npz): {EXPORT}"
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"is a zip archive of {shown or 'nothing'}, not weights: {UNPACK}"


def _describe(path: Path, first: bytes) -> str:
    """Return what a file is that holds no weights in a format of ours, and what to do, if known."""
    text = first.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.lower().startswith((b"<!doctype html", b"<html")):
        return (
            "is a web page (HTML), not weights: the download went wrong; the address may need a "
            "login, or the file has moved"
        )
    if text.startswith(b"<"):
        return "is an XML or HTML text, not weights: the download went wrong; download it again"
    if text.startswith((b"{", b"[")):
        return "is a JSON text, not weights: name the weight file itself"
    if tarfile.is_tarfile(path):
        return _describe_tar(path)
    if first[:1] == pickle.PROTO:
        load = 'pickle.load(open(FILE, "rb"))'
        command = conversion(path, load).replace("import torch;", "import pickle, torch;", 1)
        return (
            "is a pickle that torch.save did not write, and is not read, since that could run "
            f"code: if you trust the file, convert it with {command}"
        )
    if first[4:8] == b"TFL3":
        return f"is a TensorFlow Lite file: {EXPORT}"
    is_onnx = len(first) > 2 and first[0] == 8 and first[1] < 32 and first[2] in ONNX_TAGS
    if path.suffix == ".onnx" or is_onnx:
        return (
            "is an ONNX file, not weights: use the checkpoint of the network that it was exported "
            "from"
        )
    return ""


def _describe_tar(path: Path) -> str:
    try:
        with tarfile.open(path) as archive:
            names = archive.getnames()[:3]
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        return f"is a damaged tar archive ({error}): download or copy it again"
    if {"pickle", "tensors", "storages"} & set(names):
        command = conversion(path, 'torch.load(FILE, map_location="cpu", weights_only=False)')
        return (
            "is in the tar format of torch before 0.1.10, which could run code: if you trust the "
            f"file, convert it with {command}"
        )
    return f"is a tar archive of {', '.join(names) or 'nothing'}, not weights: {UNPACK}"
