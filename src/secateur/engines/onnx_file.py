"""Write a network to an ONNX file. Needs the extra `export` (onnx, onnxscript, onnxruntime)."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.engines.flat_network import flat_network, inputs_in, run_flat
from secateur.engines.output_structure import names_of
from secateur.graph.forward import inputs_of
from secateur.graph.module_state import evaluating
from secateur.graph.trace import open_batch
from secateur.runtime.errors import ExportError, UsageError
from secateur.runtime.timing import repeat_to_batch

LARGEST_FILE = 2**31 - 2**20
"""Bytes of weights in one ONNX file: protobuf's limit, less some space for the graph."""
FIRST_WITH_EXPORTER = (2, 8)
"""First torch whose exporter works with onnxscript 0.6; older ones use that of TorchScript."""

Images = Float[Tensor, "image *axis"]


def check_packages() -> None:
    """Raise `UsageError` if the extra `export` is not installed."""
    try:
        with quiet():
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"ONNX needs the extra: pip install 'secateur[export]' (no module {error.name})"
        ) from error


def write_onnx(
    model: nn.Module,
    example: Images,
    path: Path,
    input_names: Sequence[str] = ("images",),
    opset: int | None = None,
) -> int:
    """Write the file of a network in evaluation mode, with the weights inside; return its opset.

    The exporter chooses the `opset` if none is asked for.
    Raises `ExportError` if the network can't be exported or is too large for one file.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size > LARGEST_FILE:
        raise ExportError(
            f"the network's weights take {size / 2**30:.1f} GiB, and an ONNX file holds 2 GiB"
        )
    if len(example) < 2:  # one image would fix the batch size in the graph
        example = repeat_to_batch(example, 2)
    try:
        with quiet(), evaluating(model), torch.no_grad():
            written = _export(model, example, path, list(input_names), opset)
    except Exception as error:  # the exporter raises many unrelated types
        raise ExportError(f"the network can't be exported to ONNX: {cause(error)}") from error
    if opset not in (None, written):
        raise ExportError(
            f"torch's exporter can't write opset {opset}, and wrote {written}: ask for {written} "
            f"or for another that torch {torch.__version__} knows"
        )
    return written


def _export(
    model: nn.Module, example: Images, path: Path, input_names: list[str], opset: int | None
) -> int:
    """Let torch write the file, and return its opset."""
    outputs, structure = run_flat(model, example)
    is_one = structure == {"tensor": 0}
    network = model if is_one and inputs_of(model) is None else flat_network(model)
    inputs, output_names = inputs_in(model, example), list(names_of(structure))
    if is_one and outputs[0].ndim and outputs[0][0].numel() == outputs[0].shape[1:2].numel():
        output_names = ["logits"]
    names: dict[str, Any] = {
        "input_names": input_names,
        "output_names": output_names,
        "opset_version": opset,
    }
    if _torch_release() < FIRST_WITH_EXPORTER:
        import onnx

        torch.onnx.export(
            network,
            inputs,
            str(path),
            dynamo=False,
            dynamic_axes={name: {0: "batch"} for name in input_names},
            **names,
        )
        opsets = onnx.load(str(path)).opset_import
        return int(next(one.version for one in opsets if one.domain in ("", "ai.onnx")))
    program = torch.onnx.export(
        network,
        inputs,
        dynamo=True,
        dynamic_shapes=open_batch(network, torch.export.Dim("batch"), len(inputs)),
        verbose=False,
        **names,
    )
    assert program is not None
    program.save(path, external_data=False)
    return int(program.model.opset_imports[""])


def _torch_release() -> tuple[int, int]:
    """Return torch's major and minor version."""
    major, minor, *_ = torch.__version__.split(".")
    return int(major), int(minor)


def cause(error: BaseException) -> str:
    """Return the first line of the root cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's warnings, prints and logs from the terminal."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        logging.disable(disabled)
