"""`secateur inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli import completion, options
from secateur.cli.options import ConfigOptions
from secateur.config import RunConfig
from secateur.runtime.errors import UsageError

KEYS = (
    *(options.MODEL, options.WEIGHTS, options.WEIGHTS_KEY, options.ALLOW_UNTRAINED),
    *(options.TASK, options.FORWARD, options.METRIC, options.DECODER, options.DEVICE),
    options.SOURCE,
    *(
        options.NUM_CLASSES,
        options.IMAGE_SIZE,
        options.CALIBRATION_IMAGES,
        options.SKIP_UNREADABLE,
        options.CONCEPTS,
    ),
    *(options.PRUNE_RESIDUAL, options.EXCLUDE, options.SEED),
    *(options.NAMING_MODEL, options.VOCABULARY),
)


def inspect(
    config_options: ConfigOptions,
    criterion: Annotated[
        list[str] | None,
        typer.Option(
            "--criterion",
            autocompletion=completion.criteria,
            help="Criterion to score filters by. Repeatable.",
            show_default="vote",
            rich_help_panel=options.METHOD,
        ),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            "--layer", help="List every filter of this layer.", rich_help_panel=options.OUTPUT
        ),
    ] = None,
    filter_number: Annotated[
        int | None,
        typer.Option(
            "--filter",
            min=0,
            help="Show only this filter of the layer.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            "--pictures",
            help="Folder for index.html and one picture per layer: each filter's top images, "
            "bright where the filter is above its threshold.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    sensitivity: Annotated[
        Path | None,
        typer.Option(
            "--sensitivity",
            help="Show instead what the output loses if filters of one layer go, and write the "
            "curves to this file: .html or .csv.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    *,
    as_json: options.Json = False,
) -> None:
    """Score the filters of a network and show what they see. Changes nothing.

    Example: secateur inspect -m resnet20 -w resnet20.safetensors -d cifar10:data
    """
    if filter_number is not None and layer is None:
        raise UsageError("--filter needs the --layer that it is in")
    if pictures is not None and not pictures.parent.is_dir():
        raise UsageError(f"no folder {pictures.parent} to make {pictures.name} in")
    config_options.refuse("has no meaning for an inspection, which trains nothing", "finetune")
    if sensitivity is not None:
        _check_alone(config_options, criterion, layer, pictures)

    from secateur.cli import output
    from secateur.experiments.inspect import group_of, inspect_network

    names = tuple(criterion or ["vote"])
    config = _make_config(config_options, names[0])
    if sensitivity is not None:
        _show_sensitivity(config, sensitivity, as_json=as_json)
        return
    inspection = inspect_network(config, names, output.run_context(), pictures=pictures)
    if as_json:
        print(json.dumps(inspection, indent=1))
        return
    if layer is None:
        output.show_groups(inspection)
    elif filter_number is None:
        output.show_filters(group_of(inspection, layer))
    else:
        output.show_filter(group_of(inspection, layer), filter_number)
    output.show_unreadable(inspection["unreadable"])
    output.show_notes(inspection["notes"])


def _check_alone(
    config_options: ConfigOptions,
    criterion: list[str] | None,
    layer: str | None,
    pictures: Path | None,
) -> None:
    """Raise `UsageError` if an option was used that has no meaning beside `--sensitivity`."""
    if layer is not None or pictures is not None:
        raise UsageError("--sensitivity excludes --layer and --pictures: run inspect once for each")
    if len(criterion or ()) > 1:
        raise UsageError("--sensitivity is measured by one --criterion: leave the others out")
    reason = "has no meaning with --sensitivity, which measures layers and names no filters"
    config_options.refuse(reason, "report")


def _make_config(config_options: ConfigOptions, criterion: str) -> RunConfig:
    """Return the configuration; annotated concepts bring images, so they need no data source."""
    from secateur import data
    from secateur.pipeline.inputs import check_weights
    from secateur.scoring.concepts import annotated_images

    changes: dict[str, Any] = {"score.criterion": criterion}
    asked = config_options.changes()
    has_source = config_options.file is not None or "data.source" in asked
    if not has_source and annotated_images(asked.get("score.concepts", "auto")):
        changes["data.source"] = data.NONE
    config = config_options.make(RunConfig, changes=changes)
    check_weights(config)
    return config


def _show_sensitivity(config: RunConfig, path: Path, *, as_json: bool) -> None:
    """Measure the sensitivity of every layer, print it and write it to a file."""
    from secateur.cli import output
    from secateur.experiments.inspect import measure_network_sensitivity
    from secateur.experiments.report.sensitivity_chart import check_path, write_sensitivity

    check_path(path)
    curves = measure_network_sensitivity(config, output.run_context())
    write_sensitivity(path, config.model.name, curves)
    output.show_sensitivity(curves, path, as_json=as_json)
