"""`secateur evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import options
from secateur.cli.options import ConfigOptions
from secateur.config import RunConfig
from secateur.runtime.errors import UsageError

KEYS = (
    *(options.MODEL, options.WEIGHTS, options.WEIGHTS_KEY, options.SOURCE),
    *(options.NUM_CLASSES, options.IMAGE_SIZE),
    options.SKIP_UNREADABLE,
)


def evaluate(
    config_options: ConfigOptions,
    run: Annotated[
        Path | None, typer.Argument(help="A run folder; or name a network with --model.")
    ] = None,
    *,
    allow_untrained: options.AllowUntrained = False,
    as_json: options.Json = False,
) -> None:
    """Evaluate a network, or the pruned network of a run folder, on the test images."""
    if (run is None) == (
        "model.name" not in config_options.changes() and config_options.file is None
    ):
        raise UsageError("name either a run folder or a network with --model")

    from secateur import data
    from secateur.cli import output
    from secateur.experiments.manifest import CONFIG
    from secateur.experiments.run_folder import load_pruned
    from secateur.models.evaluate import evaluate as evaluate_network
    from secateur.pipeline.inputs import check_weights, load_inputs, make_reader

    config = config_options.make(RunConfig, base=None if run is None else run / CONFIG)
    run_context = output.run_context().collecting_unreadable(config)
    if run is not None:
        network = load_pruned(run)
        dataset = data.load(config.data.source)
    else:
        check_weights(config, allow_untrained=allow_untrained)
        dataset, network = load_inputs(config, run_context)
    batches = make_reader(config, run_context).read_shard(dataset.test, "scoring")
    score = evaluate_network(network, batches)
    names = None if run_context.unreadable is None else run_context.unreadable_files
    output.show_score(score, names, run_context.notices, as_json=as_json)
