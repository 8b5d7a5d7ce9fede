"""Quantise an OpenVINO file to int8 with NNCF. Needs the packages openvino and nncf."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor, nn

from secateur.engines.file_engine import arrays_of
from secateur.engines.flat_network import inputs_in
from secateur.engines.onnx_file import cause, quiet
from secateur.runtime.atomic_io import move_file
from secateur.runtime.errors import ExportError, UsageError

REPORTING = "openvino_telemetry"
"""The package by which NNCF reports to its makers what it quantises; it does so without asking."""


def check_nncf() -> None:
    """Raise `UsageError` if a package that quantises is missing."""
    for package in ("nncf", "openvino"):
        if find_spec(package) is None:
            raise UsageError(
                f"int8 for OpenVINO needs NNCF: pip install 'nncf>=3.4' (no module {package})"
            )


def quantise_openvino(
    network: nn.Module, source: Path, target: Path, batches: Sequence[Tensor]
) -> None:
    """Write the int8 form of a file: activations uint8, weights int8 by channel.

    `source` is the float file of the network, whose `batches` of images are run to find the range
    of each activation. NNCF corrects the biases itself. Both files consist of an
    `.xml` and a `.bin`. NNCF reports nothing, unless it was imported before. Raises `ExportError`,
    and `UsageError` without the packages.
    """
    check_nncf()
    with quiet(), _without(REPORTING):
        import nncf
        import openvino
    images = [arrays_of(inputs_in(network, one)) for one in batches]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        draft = Path(folder) / target.name
        try:
            with quiet():
                quantised = nncf.quantize(
                    openvino.Core().read_model(source),
                    nncf.Dataset(images),
                    preset=nncf.QuantizationPreset.MIXED,
                    target_device=nncf.TargetDevice.CPU,
                    subset_size=len(images),
                )
                openvino.save_model(quantised, draft, compress_to_fp16=False)
        except Exception as error:  # NNCF raises many unrelated types
            raise ExportError(f"the file can't be quantised: {cause(error)}") from error
        for suffix in (".bin", ".xml"):
            move_file(draft.with_suffix(suffix), target.with_suffix(suffix))


@contextmanager
def _without(package: str) -> Iterator[None]:
    """Let a package be missing for what is imported in the block."""
    module = sys.modules.get(package)
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if module is None:
            del sys.modules[package]
        else:
            sys.modules[package] = module
