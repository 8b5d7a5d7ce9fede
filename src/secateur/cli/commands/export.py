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
    from secateur.experiments.onnx_export import ExportResult
    from secateur.experiments.other_formats import FormatResult

KEYS = (options.MODEL, options.FORWARD, options.SOURCE, options.SKIP_UNREADABLE)
FORMAT_NAMES = get_args(FormatName)


def export(
    config_options: ConfigOptions,
    run: Annotated[Path, typer.Argument(help=options.RUN_OR_ADDRESS)],
    *,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file (default: model.onnx, .pte, … in the run)."),
    ] = None,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="Write an int8 file, too, such as model.int8.onnx, quantised on the run's images.",
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
    """Export the pruned network of a run folder, and compare the outputs with PyTorch's.

    Both networks are timed with --format onnx and with --int8; the original with untrained
    weights. Code of your own is run only if you name it with --model or --forward. Needs the
    extra: pip install 'secateur\\[export]'; other formats say what they need.
    """
    import torch

    from secateur.cli import output
    from secateur.experiments.engine_times import keep_engine_times
    from secateur.experiments.int8_export import QUANTISERS, export_int8, exported_times, int8_files
    from secateur.experiments.onnx_export import check_free, compare_latency, export_onnx
    from secateur.experiments.original import untrained_original
    from secateur.experiments.other_formats import FORMATS, export_as
    from secateur.experiments.run_folder import fetched, load_pruned, read_origin
    from secateur.graph.forward import with_inputs
    from secateur.pipeline.verdict import slower_notices

    is_onnx, suffix = file_format == "onnx", _suffix(file_format, int8=int8, opset=opset)
    folder, run = run, fetched(run)
    if run != folder and out is None:
        raise UsageError("name the file with --out: a repository on the Hub is not written to")
    path = out or run / f"model{suffix}"
    config = _int8_config(config_options, run, int8=int8)
    for file in (*[path] * is_onnx, *(int8_files(file_format, path) if int8 else ())):
        check_free(file, overwrite=overwrite)
    network, origin = load_pruned(run), read_origin(run)
    named, is_timed = config_options.changes(), latency and (is_onnx or int8)
    code = named.get(options.MODEL.path), named.get(options.FORWARD.path)
    original, reason = untrained_original(run, *code) if is_timed else (None, "")
    example = torch.zeros(2, *origin.image_shape)
    packed = with_inputs(network, origin.inputs)
    inputs = origin.unpacked(example)
    result: ExportResult | FormatResult
    if file_format in FORMATS:
        result = export_as(file_format, packed, example, path, overwrite=overwrite)
    else:
        result = export_onnx(network, inputs, path, opset=opset, overwrite=overwrite)
    times = compare_latency(packed, path, original, example) if latency and is_onnx else ()
    quantised = None
    if config is not None:
        arguments = run, QUANTISERS[file_format], packed, path, config, output.run_context()
        quantised = export_int8(*arguments, original=original, is_timed=latency)
    measured = exported_times(times, quantised)
    notes = [f"The original network is not timed: {reason}."] if reason else []
    notes += [*slower_notices(measured), *keep_engine_times(run, folder, measured)]
    output.show_export(result, times, quantised, notes, as_json=as_json)


def _int8_config(config_options: ConfigOptions, run: Path, *, int8: bool) -> RunConfig | None:
    """Return the run's configuration with the data where they are now; None without `int8`.

    Raises `UsageError` if they are code that the user has not named, or without use.
    """
    from secateur.experiments.manifest import CONFIG
    from secateur.experiments.user_code_keys import check_named

    if not int8:
        unused = sorted({*config_options.changes()} - {options.MODEL.path, options.FORWARD.path})
        if unused:
            name = "--data" if "data.source" in unused else unused[0]
            raise UsageError(f"{name} is for --int8, which measures ranges and accuracy on images")
        return None
    config = config_options.make(RunConfig, base=run / CONFIG)
    check_named(run, config, {*config_options.changes(), "model.name", "model.forward"})
    return config


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
