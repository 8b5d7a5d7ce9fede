"""`secateur train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import options
from secateur.cli.options import TRAINING, Key
from secateur.config import BaseConfig

KEYS = (
    *(options.MODEL, options.WEIGHTS, options.WEIGHTS_KEY, options.SOURCE),
    *(options.TASK, options.FORWARD, options.METRIC, options.DECODER, options.DEVICE),
    *(options.NUM_CLASSES, options.IMAGE_SIZE),
    options.SKIP_UNREADABLE,
    Key("new_head", TRAINING),
    *(
        Key(f"train.{name}", TRAINING)
        for name in ("epochs", "learning_rate", "keep", "max_minutes")
    ),
    options.SEED,
)


def train(
    config: BaseConfig,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="New folder for the weights.", rich_help_panel=options.OUTPUT
        ),
    ] = Path("secateur-base"),
    *,
    resume: options.Resume = False,
    tracker: options.Tracker = None,
    tracker_dir: options.TrackerDir = None,
    as_json: options.Json = False,
) -> None:
    """Train a base network, from random or given weights, and save its weights.

    Example: secateur train -m vgg16_bn -d cifar10:data --epochs 100 -o base
    """
    from secateur.cli import console, output
    from secateur.experiments.manifest import WEIGHTS
    from secateur.experiments.train_base import train_base
    from secateur.runtime.trackers import make_tracker

    run_context = output.run_context(make_tracker(tracker, tracker_dir))
    with output.resumable(out):
        result = train_base(config, out, run_context, resume=resume)
    if as_json:
        print(result.model_dump_json(indent=1))
        return
    output.show_score(result.score, result.task, "pytorch")
    output.show_unreadable(result.unreadable)
    output.show_notes(result.notes)
    console.say(f"weights: {out / WEIGHTS}")
