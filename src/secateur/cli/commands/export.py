"""`secateur export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import options
from secateur.cli.options import ConfigOptions
from secateur.config import RunConfig

KEYS = (options.SOURCE, options.SKIP_UNREADABLE)


def export(
    config_options: ConfigOptions,
    run: Annotated[Path, typer.Argument(help="A run folder.")],
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
    from secateur.experiments.int8_export import check_data_is_named, export_int8
    from secateur.experiments.manifest import CONFIG, read_manifest
    from secateur.experiments.onnx_export import check_free, compare_latency, export_onnx
    from secateur.experiments.run_folder import load_pruned, read_origin
    from secateur.graph.forward import with_inputs
    from secateur.models import user_code, zoo

    path = out or run / "model.onnx"
    int8_path = path.with_suffix(".int8.onnx")
    check_free(path, overwrite=overwrite)
    if int8:
        check_free(int8_path, overwrite=overwrite)
    network = load_pruned(run)
    manifest, origin = read_manifest(run), read_origin(run)
    config = None
    if int8:
        config = config_options.make(RunConfig, base=run / CONFIG)
        check_data_is_named(run, config, config_options.changes().keys())
    example = torch.zeros(2, *origin.image_shape)
    result = export_onnx(network, origin.unpacked(example), path, overwrite=overwrite)
    name, classes = manifest.architecture, manifest.num_classes
    original = None
    if name is not None and not user_code.is_user_code(name) and manifest.forward is None:
        original = with_inputs(zoo.load(name, num_classes=classes), origin.inputs)
    network = with_inputs(network, origin.inputs)
    times = compare_latency(network, path, original, example) if latency else ()
    quantised = None
    if config is not None:
        context = output.run_context()
        quantised = export_int8(network, path, int8_path, config, context, original=original)
    output.show_export(result, times, quantised, as_json=as_json)
