"""`secateur export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from secateur.cli import options
from secateur.cli.options import ConfigOptions
from secateur.config import FormatName, RunConfig
from secateur.runtime.errors import UsageError

KEYS = (options.MODEL, options.FORWARD, options.SOURCE, options.SKIP_UNREADABLE)
FORMAT_NAMES = get_args(FormatName)


def export(
    config_options: ConfigOptions,
    run: Annotated[Path, typer.Argument(help=options.RUN_OR_ADDRESS)],
    *,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The ONNX file (default: model.onnx in the run folder)."),
    ] = None,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="Write an int8 file, too (model.int8.onnx), quantised on the run's images.",
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

    The original is timed with untrained weights, which take as long. Code of your own is run only
    if you name it with --model or --forward: without it a network of yours is timed as pruned
    alone. Needs the extra: pip install 'secateur\\[export]'
    """
    import torch

    from secateur.cli import output
    from secateur.experiments.engine_times import exported_times, keep_engine_times
    from secateur.experiments.int8_export import export_int8
    from secateur.experiments.onnx_export import check_free, compare_latency, export_onnx
    from secateur.experiments.original import untrained_original
    from secateur.experiments.run_folder import fetched, load_pruned, read_origin
    from secateur.graph.forward import with_inputs
    from secateur.pipeline.verdict import slower_notices

    folder, run = run, fetched(run)
    if run != folder and out is None:
        raise UsageError("name the file with --out: a repository on the Hub is not written to")
    if file_format != "onnx":
        asks_onnx = int8 or opset is not None
        _export_as(file_format, run, out, asks_onnx, overwrite=overwrite, as_json=as_json)
        return
    path = out or run / "model.onnx"
    int8_path = path.with_suffix(".int8.onnx")
    for file in (path, int8_path) if int8 else (path,):
        check_free(file, overwrite=overwrite)
    network, origin, named = load_pruned(run), read_origin(run), config_options.changes()
    config = _int8_config(config_options, run) if int8 else None
    if config is None and "data.source" in named:
        raise UsageError("--data is for --int8, which measures ranges and accuracy on images")
    code = named.get("model.name"), named.get("model.forward")
    original, reason = untrained_original(run, *code) if latency else (None, "")
    example = torch.zeros(2, *origin.image_shape)
    result = export_onnx(network, origin.unpacked(example), path, opset=opset, overwrite=overwrite)
    network = with_inputs(network, origin.inputs)
    times = compare_latency(network, path, original, example) if latency else ()
    quantised = None
    if config is not None:
        arguments = run, network, path, int8_path, config, output.run_context()
        quantised = export_int8(*arguments, original=original, is_timed=latency)
    measured = exported_times(times, quantised)
    notes = (*slower_notices(measured), *keep_engine_times(run, folder, measured))
    if reason:
        notes = (f"The original network is not timed: {reason}.", *notes)
    output.show_export(result, times, quantised, notes, as_json=as_json)


def _int8_config(config_options: ConfigOptions, run: Path) -> RunConfig:
    """Return the run's configuration with the data where they are now.

    Raises `UsageError` if they are code that the user has not named.
    """
    from secateur.experiments.manifest import CONFIG
    from secateur.experiments.user_code_keys import check_named

    config = config_options.make(RunConfig, base=run / CONFIG)
    check_named(run, config, {*config_options.changes(), "model.name", "model.forward"})
    return config


def _export_as(
    name: str, run: Path, out: Path | None, asks_onnx: bool, *, overwrite: bool, as_json: bool
) -> None:
    """Export the pruned network of a run folder to another format than ONNX.

    `asks_onnx` says whether an option is set that only ONNX has.
    """
    import torch

    from secateur.cli import output
    from secateur.experiments.other_formats import FORMATS, export_as
    from secateur.experiments.run_folder import load_pruned, read_origin
    from secateur.graph.forward import with_inputs

    if asks_onnx:
        raise UsageError("--int8 and --opset are for --format onnx")
    if name == "torchscript":
        raise UsageError(
            "torch advises against TorchScript, which is not developed any more: --format "
            "aotinductor writes a compiled file for C++, onnx one for every engine"
        )
    if name not in FORMATS:
        raise UsageError(f"there is no format {name!r}: onnx, {', '.join(FORMATS)}")
    network, origin = load_pruned(run), read_origin(run)
    path = out or run / f"model{FORMATS[name].suffix}"
    example = torch.zeros(2, *origin.image_shape)
    network = with_inputs(network, origin.inputs)
    result = export_as(name, network, example, path, overwrite=overwrite)
    output.show_format(result, as_json=as_json)
