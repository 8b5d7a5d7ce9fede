"""`secateur report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from secateur.cli import completion, options
from secateur.runtime.errors import UsageError


def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            autocompletion=completion.networks,
            help="Network of your own code that the run pruned: path/to/file.py:factory.",
        ),
    ] = None,
    forward: Annotated[
        str | None,
        typer.Option(
            "--forward",
            help="Function of your own that the run's network runs through: path/to/file.py:name.",
        ),
    ] = None,
    data_source: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            autocompletion=completion.data_sets,
            help="Data set (default: the run's).",
        ),
    ] = None,
    device: options.Device = None,
    images: Annotated[
        int | None,
        typer.Option(
            "--images",
            min=0,
            help="Calibration images to show what the filters see; 0 reads no data (default: the "
            "run's, 512).",
        ),
    ] = None,
    naming_model: options.NamingModel = None,
    vocabulary: options.Vocabulary = None,
    beside: Annotated[
        Path | None,
        typer.Option("--beside", help="Benchmark folder to draw the run's trade-off among."),
    ] = None,
    form: Annotated[
        Literal["html", "png"],
        typer.Option("--format", help="html: report.html; png: each chart as a picture."),
    ] = "html",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for pictures (default: charts in the run's)."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write the report of a run folder again, or its charts as pictures for papers and slides.

    Example: secateur report runs/a --beside benchmark
    """
    if out is not None and form == "html":
        raise UsageError("--out is for --format png; the report lies in its run folder")
    if form == "png":
        reason = "is for --format html: the charts show no names of filters"
        options.refuse(reason, naming_model=naming_model, vocabulary=vocabulary)

    from secateur.cli import console, output
    from secateur.experiments import run as runs
    from secateur.experiments.report.benchmark import CHARTS

    pictures = None
    if form == "png":
        pictures = run / CHARTS if out is None else out.resolve()
    names = {"model.name": model, "model.forward": forward, "data.source": data_source}
    names["model.device"] = device
    names |= {"report.naming_model": naming_model, "report.vocabulary": vocabulary}
    written = runs.report(
        run,
        output.run_context(),
        named={key: name for key, name in names.items() if name is not None},
        images=images,
        beside=beside,
        pictures=pictures,
    )
    if as_json:
        print(json.dumps([str(path) for path in written], indent=1))
        return
    for path in written:
        console.say(f"written: {path}")
