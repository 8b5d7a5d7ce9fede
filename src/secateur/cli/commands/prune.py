"""`secateur prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli import options
from secateur.cli.options import BUDGET, METHOD, TRAINING, ConfigOptions, Key
from secateur.config import RunConfig, read_tables
from secateur.runtime.errors import UsageError

KEYS = (
    *(options.MODEL, options.WEIGHTS, options.WEIGHTS_KEY, options.ALLOW_UNTRAINED),
    *(options.TASK, options.FORWARD, options.METRIC, options.DECODER, options.DEVICE),
    options.REPARAMETERIZE,
    options.SOURCE,
    *(options.NUM_CLASSES, options.IMAGE_SIZE, options.CALIBRATION_IMAGES),
    Key("data.keep_classes", options.DATA),
    Key("data.stratified", options.DATA),
    options.SKIP_UNREADABLE,
    Key("plan.target", BUDGET, ("--target", "-t")),
    *(Key(f"plan.{name}", BUDGET) for name in ("engine", "max_drop", "actions", "allocation")),
    options.PRUNE_RESIDUAL,
    options.EXCLUDE,
    *(Key(f"plan.{name}", BUDGET) for name in ("round_to", "min_filters", "rounds", "trials")),
    Key("score.fast", METHOD),
    options.CRITERION,
    options.CONCEPTS,
    Key("score.use_labels", METHOD),
    Key("refit.layers", METHOD, ("--refit",)),
    Key("refit.form", METHOD, ("--refit-form",)),
    Key("refit.recalibrate_batchnorm", METHOD),
    Key("distill.epochs", METHOD, ("--distill",)),
    *(
        Key(f"finetune.{name}", TRAINING)
        for name in ("epochs", "learning_rate", "label_weight", "keep", "max_minutes")
    ),
    options.SEED,
)


def prune(
    config_options: ConfigOptions,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="New run folder.", rich_help_panel=options.OUTPUT),
    ] = Path("secateur-run"),
    shares: Annotated[
        Path | None,
        typer.Option(
            "--shares",
            help='TOML file with the fraction of filters to keep per layer: "layer1.*" = 0.8. The '
            "target's fraction is then ignored.",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    finetune: Annotated[
        bool | None,
        typer.Option(
            "--finetune/--no-finetune",
            help="Fine-tune after pruning.",
            show_default="yes",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    *,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print how long each stage would take here, and how much memory, and stop.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    tracker: options.Tracker = None,
    tracker_dir: options.TrackerDir = None,
    as_json: options.Json = False,
) -> None:
    """Prune a network: score, cut, refit, distill, fine-tune. Writes a run folder with a report.

    Networks for classification, segmentation, detection and regression (pictures, key points,
    numbers) are pruned, with labels or without: see --task and --metric.

    Example: secateur prune -m resnet20 -w resnet20.safetensors -d cifar10:data -t macs=0.7
    --no-finetune -o runs/a
    """
    changes: dict[str, Any] = {}
    if finetune is False:
        config_options.refuse("and --no-finetune exclude each other", "finetune")
        changes["finetune.epochs"] = 0
    if shares is not None:
        if "plan.allocation" in config_options.changes():
            raise UsageError("--shares and --allocation exclude each other")
        changes |= {"plan.allocation": "shares", "plan.shares": read_tables(shares, "shares")}
    config = config_options.make(RunConfig, changes=changes)

    from secateur.cli import output
    from secateur.experiments import run as runs
    from secateur.runtime.trackers import make_tracker

    if dry_run:
        output.show_estimate(runs.dry_run(config), as_json=as_json)
        return
    run_context = output.run_context(make_tracker(tracker, tracker_dir))
    with output.resumable(out):
        result = runs.run(
            config,
            out,
            run_context,
            overwrite=overwrite,
            resume=resume,
        )
    output.show_run(result, out, run_context.lines.seconds, as_json=as_json)
