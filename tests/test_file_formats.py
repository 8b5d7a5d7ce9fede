"""Files are known by their content, and what is no weight file is said to be that."""

from __future__ import annotations

import gzip
import io
import shlex
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from secateur.models.checkpoint_files import read_checkpoint
from secateur.models.file_formats import format_of
from secateur.models.weights import load_weights
from secateur.models.zoo import load
from secateur.runtime.errors import UsageError, WeightsError

SUFFIXES = ("", ".pth", ".pt", ".th", ".ckpt", ".bin", ".pkl", ".pth.tar", ".safetensors", ".onnx")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_suffixes_do_not_decide(suffix: str, tmp_path: Path) -> None:
    state = nn.Conv2d(3, 2, 1).state_dict()
    path = tmp_path / f"w{suffix}"
    for is_zip in (True, False):
        torch.save(state, path, _use_new_zipfile_serialization=is_zip)
        assert format_of(path) == "torch"
        assert torch.equal(read_checkpoint(path)["weight"], state["weight"])
    save_file(state, path)
    assert format_of(path) == "safetensors"
    assert torch.equal(read_checkpoint(path)["weight"], state["weight"])


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return buffer.getvalue()


def tarred(*names: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return buffer.getvalue()


def arrays() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(2))
    return buffer.getvalue()


SAFE = save({"weight": torch.ones(3)})
OTHERS = [
    (b"", "is empty: download or copy it again"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer"),
    (b"<!DOCTYPE html><html>sign in</html>", r"is a web page \(HTML\)"),
    (b"\n\n<HTML><head>", r"is a web page \(HTML\)"),
    (b"\xef\xbb\xbf<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "is an XML or HTML"),
    (b'{"error": "Repository not found"}', "is a JSON text"),
    (gzip.compress(b"weights", mtime=0), "is a gzip archive, not weights: unpack it"),
    (b"\x89HDF\r\n\x1a\n" + bytes(9), "is an HDF5 file, as Keras writes"),
    (b"\x1c\0\0\0TFL3" + bytes(9), "is a TensorFlow Lite file"),
    (b"\x08\x0a\x12\x07pytorch\x1a", "is an ONNX file"),
    (b"GGUF\x03\0\0\0", "is a GGUF file"),
    (zipped("model.weights.h5", "config.json"), "is a Keras file"),
    (zipped("best.pth", "readme.txt"), r"is a zip archive of best\.pth, readme\.txt, not weights"),
    (arrays(), r"is a NumPy archive \(\.npz\)"),
    (zipped("a/data.pkl", "a/constants.pkl"), "is a TorchScript archive"),
    (tarred("run/best.pth"), r"is a tar archive of run/best\.pth, not weights: unpack it"),
    (tarred("sys_info", "pickle", "tensors"), r"the tar format of torch before 0\.1\.10"),
    (b"no pickle at all", "is not a file that torch.save or safetensors wrote"),
    (b".", "is not a file that torch.save or safetensors wrote"),
    (b"\x08", "is not a file that torch.save or safetensors wrote"),
]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
@pytest.mark.parametrize(("content", "message"), OTHERS, ids=[message for _, message in OTHERS])
def test_other_files_are_said_to_be_that(
    content: bytes, message: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    if suffix == ".safetensors" and "is not a file" in message:
        message = "is not a sound safetensors file"
    with pytest.raises(WeightsError, match=message) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 1, 10, 100, 1000, -10])
@pytest.mark.parametrize("file", ["w.pth", "w.th", "w.safetensors", "w.bin"])
def test_a_file_cut_short_is_refused_by_its_name(file: str, kept: int, tmp_path: Path) -> None:
    path, state = tmp_path / file, load("resnet20").state_dict()
    if file in ("w.safetensors", "w.bin"):
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=file == "w.pth")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(WeightsError, match=file):
        read_checkpoint(path)


def test_a_header_that_begins_like_another_format_is_still_safetensors(tmp_path: Path) -> None:
    header = SAFE[8 : 8 + int.from_bytes(SAFE[:8], "little")]
    padded = header + b" " * (0x88B1F - len(header))  # 1f 8b 08: the first bytes of gzip
    path = tmp_path / "w.bin"
    path.write_bytes(len(padded).to_bytes(8, "little") + padded + SAFE[8 + len(header) :])
    assert torch.equal(read_checkpoint(path)["weight"], torch.ones(3))


def test_torchscript_and_exported_programs_are_refused_with_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stored = nn.Sequential(nn.Conv2d(3, 2, 1))
    with warnings.catch_warnings(action="ignore"):  # torch.jit is deprecated, but in files
        torch.jit.trace(stored, torch.rand(1, 3, 4, 4)).save("script.pt")
    torch.export.save(torch.export.export(stored, (torch.rand(1, 3, 4, 4),)), "program.pt2")
    for file, message in (("script.pt", "TorchScript"), ("program.pt2", r"torch\.export")):
        with pytest.raises(WeightsError, match=message) as caught:
            read_checkpoint(Path(file))
        text = str(caught.value)
        with warnings.catch_warnings(action="ignore"):
            exec(shlex.split(text[text.index("python -c") :])[2])
        model = nn.Sequential(nn.Conv2d(3, 2, 1))
        load_weights(model, "weights.pth")
        assert torch.equal(model.get_parameter("0.weight"), stored.get_parameter("0.weight"))


def test_a_missing_file_and_an_address_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no weights file .*none\.pth"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(UsageError, match="is an address, not a path"):
        load("resnet20", "https://download.pytorch.org/models/resnet18-f37072fd.pth")
