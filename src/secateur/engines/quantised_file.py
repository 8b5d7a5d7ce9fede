"""Quantise an ONNX file to int8. Needs the extra `export`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from secateur.engines.onnx_file import cause, check_packages, quiet
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
