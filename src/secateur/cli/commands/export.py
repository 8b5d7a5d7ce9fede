"""`secateur export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import options


def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The ONNX file (default: model.onnx in the run folder)."),
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
    from secateur.experiments.manifest import read_manifest
    from secateur.experiments.onnx_export import check_free, compare_latency, export_onnx
    from secateur.experiments.run_folder import load_pruned, read_origin
    from secateur.graph.forward import with_inputs
    from secateur.models import user_code, zoo

    path = out or run / "model.onnx"
    check_free(path, overwrite=overwrite)
    network = load_pruned(run)
    manifest, origin = read_manifest(run), read_origin(run)
    example = torch.zeros(2, *origin.image_shape)
    result = export_onnx(network, origin.unpacked(example), path, overwrite=overwrite)
    if not latency:
        output.show_export(result, (), as_json=as_json)
        return
    name, classes = manifest.architecture, manifest.num_classes
    original = None
    if name is not None and not user_code.is_user_code(name) and manifest.forward is None:
        original = with_inputs(zoo.load(name, num_classes=classes), origin.inputs)
    network = with_inputs(network, origin.inputs)
    times = compare_latency(network, path, original, example)
    output.show_export(result, times, as_json=as_json)
