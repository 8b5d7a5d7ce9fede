"""`secateur demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import completion, options
from secateur.config import RunConfig, from_dict
from secateur.runtime.errors import UsageError


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder.")] = Path("runs/demo"),
    data_source: Annotated[
        str | None,
        typer.Option("--data", "-d", autocompletion=completion.data_sets, help="Data set."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", "-w", help="Weight file of the network.")
    ] = None,
    weights_key: Annotated[
        str | None, typer.Option("--weights-key", help="Which network in the file to load.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", autocompletion=completion.networks, help="Network."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Train a small network on handwritten digits and prune half of it; takes about a minute.

    With --data and --weights it prunes that network (resnet20, or --model) with that data.
    """
    if (data_source is None) != (weights is None):
        raise UsageError("--data and --weights go together")
    if weights is None:
        reason = "goes with --data and --weights: the small network is trained here"
        options.refuse(reason, model=model, weights_key=weights_key)

    from secateur.cli import output
    from secateur.experiments import run as runs
    from secateur.experiments import run_folder
    from secateur.experiments.demo import MODEL, digits_config, train_digits

    run_folder.check_free(out, overwrite=True)
    run_context = output.run_context()
    if weights is None:
        weights = out.parent / f"{out.name}-base.safetensors"
        train_digits(weights, run_context)
        config = digits_config(weights)
    else:
        model_table = {"name": model or MODEL, "weights": str(weights), "weights_key": weights_key}
        config = from_dict({"model": model_table, "data": {"source": data_source}}, RunConfig)
    result = runs.run(config, out, run_context, overwrite=True)
    output.show_run(result, out, run_context.lines.seconds, as_json=as_json)
