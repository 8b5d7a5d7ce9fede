"""`secateur finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli import options
from secateur.cli.options import TRAINING, ConfigOptions, Key
from secateur.config import USER_CODE_KEYS
from secateur.runtime.errors import UsageError

KEYS = (
    options.MODEL,
    *(options.TASK, options.FORWARD, options.METRIC, options.DECODER, options.DEVICE),
    options.SOURCE,
    *(
        Key(f"finetune.{name}", TRAINING)
        for name in ("epochs", "learning_rate", "label_weight", "keep", "max_minutes")
    ),
)


def finetune(
    config_options: ConfigOptions,
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder for the result (default: the run folder).",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    *,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    tracker: options.Tracker = None,
    tracker_dir: options.TrackerDir = None,
    as_json: options.Json = False,
) -> None:
    """Fine-tune the pruned network of a run folder, with labels and the original as its teacher.

    Example: secateur finetune runs/a --epochs 40 --learning-rate 0.05
    """
    keys = config_options.changes()
    named = {key: keys.pop(key) for key in (*USER_CODE_KEYS, "model.device") if key in keys}
    changes: dict[str, Any] = {}
    for key, value in keys.items():
        section, _, name = key.partition(".")
        if section != "finetune":
            raise UsageError(f"--set {key}: only keys of finetune can be set here")
        changes[name] = value

    from secateur.cli import output
    from secateur.experiments import run as runs
    from secateur.runtime.trackers import make_tracker

    run_context = output.run_context(make_tracker(tracker, tracker_dir))
    with output.resumable(run):
        result = runs.finetune(
            run,
            out or run,
            changes,
            run_context,
            named=named,
            resume=resume,
            overwrite=overwrite,
        )
    output.show_run(result, out or run, run_context.lines.seconds, as_json=as_json)
