"""Formats of other engines: each package is needed for its own test only."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from networks import Chain
from secateur.config import FormatName
from secateur.experiments.other_formats import FORMATS, export_as
from secateur.runtime.errors import ExportError, UsageError

PACKAGES = {
    "ort": "onnxruntime",
    "openvino": "openvino",
    "executorch": "executorch",
    "coreml": "coremltools",
    "litert": "litert_torch",
}


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return Chain().eval()


IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "name",
    [*PACKAGES, pytest.param("aotinductor", marks=pytest.mark.slow)],
)
def test_a_file_computes_what_the_network_does(
    name: FormatName, network: nn.Module, tmp_path: Path
) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name], reason=f"needs {PACKAGES[name]}")
    elif shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    path = tmp_path / f"model{FORMATS[name].suffix}"
    result = export_as(name, network, IMAGES, path)
    assert path.exists()
    assert result.bytes > 0
    assert result.batch == FORMATS[name].batch
    if name == "coreml":
        assert result.error is None
    else:
        assert result.error is not None
        assert result.error < 1e-5
    with pytest.raises(ExportError, match="--overwrite"):
        export_as(name, network, IMAGES, path)
    export_as(name, network, IMAGES, path, overwrite=True)
    with pytest.raises(UsageError, match=f"ends in {FORMATS[name].suffix}"):
        export_as(name, network, IMAGES, tmp_path / "model")


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_a_package_that_is_not_installed_is_named(
    name: FormatName, network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in [module for module in sys.modules if module.split(".")[0] == PACKAGES[name]]:
        monkeypatch.delitem(sys.modules, package)
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(UsageError, match=rf"the format {name} needs its package: pip install"):
        export_as(name, network, IMAGES, tmp_path / f"model{FORMATS[name].suffix}")
    assert list(tmp_path.iterdir()) == []


def test_no_file_beside_the_named_one_is_lost(network: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="needs openvino")
    weights = tmp_path / "model.bin"
    weights.write_text("precious")
    with pytest.raises(ExportError, match=r"model\.bin exists already"):
        export_as("openvino", network, IMAGES, tmp_path / "model.xml")
    assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]
    assert weights.read_text() == "precious"
