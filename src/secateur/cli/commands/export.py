"""`secateur export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from secateur.cli import options
from secateur.cli.options import ConfigOptions
from secateur.config import FormatName, RunConfig
from secateur.runtime.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from secateur.experiments.manifest import Manifest
    from secateur.experiments.onnx_export import ExportResult
    from secateur.experiments.other_formats import FormatResult

KEYS = (options.SOURCE, options.SKIP_UNREADABLE)
FORMAT_NAMES = get_args(FormatName)


def export(
    config_options: ConfigOptions,
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    *,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file (default: model.onnx in the run folder)."),
    ] = None,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="Write an int8 file, too (model.int8.onnx, or .xml for OpenVINO by NNCF), "
            "quantised on the run's images.",
        ),
    ] = False,
    file_format: Annotated[
        str,
        typer.Option("--format", help=f"onnx, {', '.join(FORMAT_NAMES)}."),
    ] = "onnx",
    opset: Annotated[
        int | None, typer.Option(help="The ONNX opset (default: the exporter's).", min=1)
    ] = None,
    latency: Annotated[
        bool,
        typer.Option(
            "--latency/--no-latency",
            help="Time the original and the pruned network, in PyTorch and in onnxruntime.",
        ),
    ] = True,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Export the pruned network of a run folder to ONNX, compare the outputs and time both.

    The original is timed with untrained weights, which take as long. Code of your own is not run:
    a network of yours is timed only as pruned. Needs the extra: pip install 'secateur\\[export]'
    """
    import torch

    from secateur.cli import output
    from secateur.experiments.int8_export import QUANTISERS, export_int8, int8_path
    from secateur.experiments.manifest import CONFIG, read_manifest
    from secateur.experiments.onnx_export import check_free, compare_latency, export_onnx
    from secateur.experiments.other_formats import FORMATS, export_as
    from secateur.experiments.run_folder import load_pruned, read_origin
    from secateur.experiments.user_code_keys import check_named
    from secateur.graph.forward import with_inputs

    is_onnx, suffix = file_format == "onnx", _suffix(file_format, int8=int8, opset=opset)
    path = out or run / f"model{suffix}"
    if is_onnx:
        check_free(path, overwrite=overwrite)
    network, origin = load_pruned(run), read_origin(run)
    config = None
    if int8:
        check_free(int8_path(path), overwrite=overwrite)
        config = config_options.make(RunConfig, base=run / CONFIG)
        check_named(run, config, {*config_options.changes(), "model.name", "model.forward"})
    original = _untrained_original(read_manifest(run))
    if original is not None:
        original = with_inputs(original, origin.inputs)
    example = torch.zeros(2, *origin.image_shape)
    packed = with_inputs(network, origin.inputs)
    result: ExportResult | FormatResult
    if file_format in FORMATS:
        result = export_as(file_format, packed, example, path, overwrite=overwrite)
    else:
        inputs = origin.unpacked(example)
        result = export_onnx(network, inputs, path, opset=opset, overwrite=overwrite)
    times = compare_latency(packed, path, original, example) if latency and is_onnx else ()
    quantised = None
    if config is not None:
        quantised = export_int8(
            *(QUANTISERS[file_format], packed, path, config, output.run_context()),
            original=original,
            kept=origin.kept_classes,
            is_timed=latency,
        )
    output.show_export(result, times, quantised, as_json=as_json)


def _untrained_original(manifest: Manifest) -> nn.Module | None:
    """Return the network before the cut, with arbitrary weights; None if it is code of the user."""
    from secateur.models import user_code, zoo

    name = manifest.architecture
    if name is None or user_code.is_user_code(name) or manifest.forward is not None:
        return None
    return zoo.load(name, num_classes=manifest.num_classes)


def _suffix(name: str, *, int8: bool, opset: int | None) -> str:
    """Return the suffix of a format's files.

    Raises `UsageError` if there is no such format, or an option is not for it.
    """
    from secateur.experiments.int8_export import QUANTISERS
    from secateur.experiments.other_formats import FORMATS

    if name == "torchscript":
        raise UsageError(
            "torch advises against TorchScript, which is not developed any more: --format "
            "aotinductor writes a compiled file for C++, onnx one for every engine"
        )
    if name != "onnx" and name not in FORMATS:
        raise UsageError(f"there is no format {name!r}: onnx, {', '.join(FORMATS)}")
    if opset is not None and name != "onnx":
        raise UsageError("--opset is for --format onnx")
    if int8 and name not in QUANTISERS:
        raise UsageError(f"--int8 is for --format {' and '.join(QUANTISERS)}")
    return FORMATS[name].suffix if name in FORMATS else ".onnx"
