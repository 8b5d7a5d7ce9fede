"""`secateur export`."""

from __future__ import annotations

from dataclasses import replace
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
Int8 = Annotated[
    bool,
    typer.Option(
        "--int8",
        help="Write an int8 file, too, such as model.int8.onnx, quantised on the run's images.",
    ),
]
Latency = Annotated[
    bool | None,
    typer.Option(
        "--latency/--no-latency",
        help="Time the original and the pruned network: with --format onnx in PyTorch and in "
        "onnxruntime, with --int8 in the format's engine (default: yes, with these two).",
    ),
]


def export(
    config_options: ConfigOptions,
    run: Annotated[Path, typer.Argument(help=options.RUN_OR_ADDRESS)],
    *,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file (default: model.onnx, .pte, … in the run)."),
    ] = None,
    int8: Int8 = False,
    file_format: Annotated[
        str,
        typer.Option("--format", help=f"onnx, {', '.join(FORMAT_NAMES)}."),
    ] = "onnx",
    opset: Annotated[
        int | None, typer.Option(help="The ONNX opset (default: the exporter's).", min=1)
    ] = None,
    latency: Latency = None,
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
    from secateur.experiments.evaluate import load_data_for
    from secateur.experiments.exported_file import check_free, check_suffix, written_whole
    from secateur.experiments.int8_export import QUANTISERS, export_int8, exported_times, int8_files
    from secateur.experiments.onnx_export import compare_latency, export_onnx
    from secateur.experiments.original import untrained_original
    from secateur.experiments.other_formats import FORMATS, export_as
    from secateur.experiments.run_folder import fetched, load_pruned, read_origin
    from secateur.graph.forward import with_inputs
    from secateur.integrations.hub import address_in
    from secateur.pipeline.verdict import slower_notices

    is_onnx, suffix = file_format == "onnx", _suffix(file_format, int8=int8, opset=opset)
    is_timed = latency is not False and (is_onnx or int8)
    _check_used(config_options, int8=int8, latency=latency, is_timed=is_timed)
    if out is not None:
        check_suffix(out, suffix, file_format)
    if out is None and address_in(run) is not None:
        raise UsageError("name the file with --out: a repository on the Hub is not written to")
    folder, run = run, fetched(run)
    path = out or run / f"model{suffix}"
    for file in (path, *(int8_files(file_format, path) if int8 else ())):
        check_free(file, overwrite=overwrite)
    config = _int8_config(config_options, run) if int8 else None
    network, origin = load_pruned(run), read_origin(run)
    packed = with_inputs(network, origin.inputs)
    dataset = None if config is None else load_data_for(run, config, packed)
    named = config_options.changes()
    code = named.get(options.MODEL.path), named.get(options.FORWARD.path)
    original, reason = untrained_original(run, *code) if is_timed else (None, "")
    example = torch.zeros(2, *origin.image_shape)
    inputs = origin.unpacked(example)
    result: ExportResult | FormatResult
    quantised = None
    with written_whole(path, overwrite=overwrite) as draft:
        if file_format in FORMATS:
            result = export_as(file_format, packed, example, draft)
        else:
            result = export_onnx(network, inputs, draft, opset=opset)
        times = compare_latency(packed, draft, original, example) if is_timed and is_onnx else ()
        if config is not None and dataset is not None:
            arguments = QUANTISERS[file_format], packed, draft, dataset, config
            quantised = export_int8(
                *arguments, output.run_context(), original=original, is_timed=is_timed
            )
            quantised = replace(quantised, path=path.with_name(quantised.path.name))
    result = replace(result, path=path)
    measured = exported_times(times, quantised)
    notes = [f"The original network is not timed: {reason}."] if reason else []
    notes += [*slower_notices(measured), *keep_engine_times(run, folder, measured)]
    output.show_export(result, times, quantised, notes, as_json=as_json)


def _check_used(
    config_options: ConfigOptions, *, int8: bool, latency: bool | None, is_timed: bool
) -> None:
    """Raise `UsageError` if an option was used that would be ignored."""
    code = options.MODEL.path, options.FORWARD.path
    if not is_timed:
        options.refuse(
            "is for --format onnx and for --int8; `secateur evaluate RUN --engine NAME` times the "
            "network in another engine",
            latency=latency,
        )
        config_options.refuse("names code to time the original with, and nothing is timed", *code)
    if int8:
        config_options.refuse_others("has no meaning for an export", "model", "data", "seed")
    else:
        reason = "is for --int8, which measures ranges and accuracy on images"
        config_options.refuse_others(reason, *code)


def _int8_config(config_options: ConfigOptions, run: Path) -> RunConfig:
    """Return the run's configuration with the data where they are now.

    Raises `UsageError` if they are code that the user has not named.
    """
    from secateur.experiments.manifest import CONFIG
    from secateur.experiments.user_code_keys import check_named

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
        raise UsageError(f"--int8 is for --format {', '.join(QUANTISERS)}")
    return FORMATS[name].suffix if name in FORMATS else ".onnx"
