"""Quantise a network to int8 in ONNX. Needs the extra `export`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from secateur.engines.bias_correction import with_corrected_biases
from secateur.engines.file_engine import arrays_of
from secateur.engines.flat_network import inputs_in
from secateur.engines.onnx_file import cause, check_packages, quiet, write_onnx
from secateur.engines.onnxruntime import input_names
from secateur.runtime.atomic_io import move_file
from secateur.runtime.errors import ExportError

Inputs = dict[str, npt.NDArray[np.generic]]
"""Inputs of a file by name."""


def quantise_file(source: Path, target: Path, batches: Iterable[Inputs]) -> None:
    """Write the int8 form of a file: activations uint8, weights int8 by channel, in QDQ nodes.

    The `batches` are run to find the range of each activation: its minimum and maximum. Shapes are
    inferred and constants folded first, as onnxruntime's documentation asks. Raises `ExportError`.
    """
    check_packages()
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """The batches as onnxruntime takes them."""

        def __init__(self) -> None:
            self._batches: Iterator[Inputs] = iter(batches)

        def get_next(self) -> Inputs | None:
            """Return the next batch; None after the last one."""
            return next(self._batches, None)

    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        prepared, draft = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        settings: dict[str, Any] = {"ActivationSymmetric": False}
        try:
            with quiet():
                quant_pre_process(source, prepared, skip_symbolic_shape=True)
                quantize_static(
                    *(prepared, draft, Reader()),
                    quant_format=QuantFormat.QDQ,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    per_channel=True,
                    extra_options=settings,
                )
        except Exception as error:  # onnxruntime raises many unrelated types
            raise ExportError(f"the file can't be quantised: {cause(error)}") from error
        move_file(draft, target)


def quantise_network(
    network: nn.Module, source: Path, target: Path, batches: Sequence[Tensor]
) -> None:
    """Write the int8 form of a network in ONNX, with the inputs and the opset of its file `source`.

    The `batches` of images correct the biases for the rounded weights, and set the ranges of
    activations; see `quantise_file`. Raises `ExportError`.
    """
    check_packages()
    import onnx

    corrected = with_corrected_biases(network, batches)
    opsets = onnx.load(source, load_external_data=False).opset_import
    opset = next(one.version for one in opsets if one.domain in ("", "ai.onnx"))
    names = input_names(source)
    inputs = (arrays_of(inputs_in(network, images)) for images in batches)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        file = Path(folder) / "corrected.onnx"
        write_onnx(corrected, batches[0], file, names, opset)
        quantise_file(file, target, (dict(zip(names, arrays, strict=True)) for arrays in inputs))
