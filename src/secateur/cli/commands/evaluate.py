"""`secateur evaluate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import options
from secateur.cli.options import ConfigOptions, Key
from secateur.config import RunConfig
from secateur.runtime.errors import UsageError

KEYS = (
    *(options.MODEL, options.WEIGHTS, options.WEIGHTS_KEY, options.ALLOW_UNTRAINED),
    *(options.TASK, options.FORWARD, options.METRIC, options.DECODER, options.DEVICE),
    options.SOURCE,
    *(options.NUM_CLASSES, options.IMAGE_SIZE),
    options.SKIP_UNREADABLE,
    Key("plan.engine", options.DATA),
)


def evaluate(
    config_options: ConfigOptions,
    run: Annotated[
        Path | None,
        typer.Argument(help=f"{options.RUN_OR_ADDRESS} Or name a network with --model."),
    ] = None,
    *,
    as_json: options.Json = False,
) -> None:
    """Evaluate a network, or the pruned network of a run folder, on the test images.

    With a run folder, --model and --weights name the original, if it lies elsewhere now.
    """
    network = {"model.name", "model.weights"} & config_options.changes().keys()
    if run is None and not (network or config_options.file):
        raise UsageError("name a run folder, or a network with --model")
    if run is not None and config_options.file:
        raise UsageError("a run folder has its own configuration: leave --config out")
    reason = "has no meaning for an evaluation"
    config_options.refuse_others(reason, "model", "data", "plan.engine", "seed")

    from secateur.cli import output
    from secateur.experiments.engine_times import keep_engine_times
    from secateur.experiments.evaluate import evaluate_network, evaluate_run
    from secateur.experiments.manifest import CONFIG, check_run_folder
    from secateur.experiments.run_folder import fetched
    from secateur.pipeline.verdict import slower_notices

    folder = run
    if run is not None:
        run = fetched(run)
        check_run_folder(run)
    config = config_options.make(RunConfig, base=None if run is None else run / CONFIG)
    if run is None:
        evaluation = evaluate_network(config, output.run_context())
    else:
        named = config_options.changes().keys()
        evaluation = evaluate_run(run, config, output.run_context(), named)
        times = [evaluation.time]
        notes = (*evaluation.notes, *slower_notices(times))
        if "plan.engine" in named:
            notes += keep_engine_times(run, folder, times)
        evaluation = replace(evaluation, notes=notes)
    output.show_evaluation(evaluation, as_json=as_json)
