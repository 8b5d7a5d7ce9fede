"""The command line: its commands, and what becomes of an error."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from secateur import data
from secateur.cli import output as display
from secateur.cli.options import (
    BoardOption,
    ClassesOption,
    ConceptsOption,
    ConfigOption,
    DataOption,
    EpochsOption,
    ExcludeOption,
    ImageSizeOption,
    JsonOption,
    KeepOption,
    LabelWeightOption,
    LearningRateOption,
    MaxMinutesOption,
    ModelOption,
    ProbeOption,
    ResumeOption,
    SeedOption,
    SetOption,
    SkipOption,
    TuningSetOption,
    UntrainedOption,
    WeightsOption,
    assigned,
    complete_criterion,
    config_of,
    put_over,
    text_of,
    training_keys,
)
from secateur.config import RunConfig, from_dict, read_tables
from secateur.errors import SecateurError, UsageError
from secateur.evaluation.evaluate import evaluate as evaluate_network
from secateur.experiments import run as runs
from secateur.experiments import run_folder
from secateur.experiments.compare.results import row_of
from secateur.experiments.compare.runner import run_benchmark
from secateur.experiments.compare.spec import BenchmarkSpec
from secateur.experiments.compare.statistics import compute_statistics
from secateur.experiments.demo import MODEL, digits_config, train_digits
from secateur.experiments.inspect import group_of, inspect_network
from secateur.experiments.manifest import CONFIG, WEIGHTS, read_manifest
from secateur.experiments.report.benchmark import CHARTS, PAGE, tables, write_benchmark
from secateur.experiments.train_base import BaseConfig, train_base
from secateur.integrations.onnx import Latency, check_free, compare_latency, export_onnx
from secateur.models import user_code, zoo
from secateur.pipeline.prune import check_weights, load_inputs, make_unreadable, names_of, stream
from secateur.runtime import distributed
from secateur.runtime.error_messages import explain
from secateur.runtime.signals import INTERRUPTED, repeat_signals
from secateur.runtime.watchdog import lost_process
from secateur.scoring import concepts, criteria
from secateur.version import __version__

app: typer.Typer = typer.Typer(
    help="Makes a trained convolutional network smaller and faster by what its filters see.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Runs the command line; errors of ours become one line and exit code 1 or 2.

    An interrupt and a request to terminate both clean up and exit with 130. Of several processes,
    as torchrun starts them, only the first one prints results and progress.
    """
    try:
        with repeat_signals(), distributed.process_group(), contextlib.ExitStack() as stack:
            if not distributed.is_main_process():
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            app()
    except SecateurError as error:
        if "--debug" in sys.argv:
            raise
        display.show_error(str(error))
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except (KeyboardInterrupt, SystemExit) as error:  # typer makes the latter of the former
        code = error.code if isinstance(error, SystemExit) else INTERRUPTED
        if code != INTERRUPTED or (reason := lost_process()) is None:
            sys.exit(code)
        display.show_error(reason)
        sys.exit(1)
    except BrokenPipeError:  # whoever read what was printed has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        reason = lost_process() or explain(error)
        if reason is None or "--debug" in sys.argv:
            raise
        display.show_error(reason)
        sys.exit(1)


def _print_version(asked: bool | None) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool | None,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    del version  # its callback has printed it
    del debug  # read by main(), which sees errors wherever they arise


@app.command()
def prune(
    model: ModelOption = None,
    weights: WeightsOption = None,
    data_source: DataOption = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            help="What may stay: macs=F, params=F, filters=F, memory=F (peak of activations) or "
            "latency=F (on this machine), 0 < F <= 1 (default: macs=0.5).",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the results; made new.")
    ] = Path("secateur-run"),
    criterion: Annotated[
        str | None,
        typer.Option(
            "--criterion",
            autocompletion=complete_criterion,
            help="How filters are ranked: vote, l1, …, or path/to/file.py:factory (default: vote).",
        ),
    ] = None,
    concept_source: ConceptsOption = None,
    calibration_images: ProbeOption = None,
    stratify: Annotated[
        bool | None,
        typer.Option(
            "--stratify/--no-stratify",
            help="Draw calibration images equally from each class, or without a look at labels "
            "(default: stratify).",
        ),
    ] = None,
    use_labels: Annotated[
        bool | None,
        typer.Option(
            "--use-labels/--no-use-labels",
            help="Score filters by true classes, or by predicted ones (default: predicted).",
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            "--allocation",
            help="How the cut is spread: curves (little is lost at the output), uniform (equal "
            "shares) or global (lowest scores anywhere) (default: curves).",
        ),
    ] = None,
    shares: Annotated[
        Path | None,
        typer.Option(
            "--shares",
            help='TOML file with the share of filters that stays by layer: "layer1.*" = 0.8. The '
            "fraction of the target is not looked at then.",
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop",
            help="Find the smallest network that loses at most so many points of top-1 on the "
            "validation images before any training; the target names the quantity.",
        ),
    ] = None,
    prune_residual: Annotated[
        bool | None,
        typer.Option(
            "--prune-residual/--no-cut-stream",
            help="Cut channels that residual sums tie over a stage (default: no).",
        ),
    ] = None,
    exclude: ExcludeOption = None,
    round_to: Annotated[
        int | None,
        typer.Option("--round-to", help="Keep a multiple of so many filters (default: 1)."),
    ] = None,
    min_filters: Annotated[
        int | None,
        typer.Option("--min-filters", help="Filters that every layer keeps (default: 1)."),
    ] = None,
    refit: Annotated[
        str | None,
        typer.Option(
            "--refit",
            help="Kernels to re-estimate: downstream (all from the first cut on), readers (those "
            "that lost inputs) or none (default: downstream).",
        ),
    ] = None,
    norms: Annotated[
        bool | None,
        typer.Option(
            "--norms/--no-norms",
            help="After the kernels, re-estimate batch-norm statistics where held-out images say "
            "that it helps, also with --refit none (default: norms).",
        ),
    ] = None,
    polish: Annotated[
        int | None,
        typer.Option(
            "--distill",
            help="Epochs of distillation from the original network on the calibration images, "
            "without labels (default: 0).",
        ),
    ] = None,
    refit_form: Annotated[
        str | None,
        typer.Option(
            "--refit-form",
            help="Re-estimate from patches, or from channels, which is coarser and takes less "
            "memory: patch or channel (default: patch where memory allows).",
        ),
    ] = None,
    finetune: Annotated[
        bool | None,
        typer.Option("--finetune/--no-finetune", help="Train after the cut (default: finetune)."),
    ] = None,
    epochs: EpochsOption = None,
    learning_rate: LearningRateOption = None,
    label_weight: LabelWeightOption = None,
    keep: KeepOption = None,
    max_minutes: MaxMinutesOption = None,
    board: BoardOption = None,
    settings: SetOption = None,
    num_classes: ClassesOption = None,
    image_size: ImageSizeOption = None,
    skip_unreadable: SkipOption = None,
    seed: SeedOption = None,
    config: ConfigOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an older run in the folder.")
    ] = False,
    resume: ResumeOption = False,
    allow_untrained: UntrainedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Prune a network: score, cut, refit, polish, fine-tune; leaves a run folder with a report.

    Example: secateur prune -m resnet20 -w resnet20.safetensors -d cifar10:data -t macs=0.7
    --no-finetune -o runs/a
    """
    if finetune is False and epochs:
        raise UsageError("--no-finetune and --epochs exclude each other")
    if shares is not None and allocation is not None:
        raise UsageError("--shares and --allocation exclude each other")
    resolved = config_of(
        config,
        {
            "model": {
                "name": model,
                "weights": text_of(weights),
                "num_classes": num_classes,
            },
            "data": {
                "source": data_source,
                "calibration_images": calibration_images,
                "stratified": stratify,
                "image_size": image_size,
                "skip_unreadable": skip_unreadable,
            },
            "score": {
                "criterion": criterion,
                "concepts": concept_source,
                "use_labels": use_labels,
            },
            "plan": {
                "target": target,
                "allocation": allocation if shares is None else "shares",
                "shares": None if shares is None else read_tables(shares, "shares"),
                "max_drop": max_drop,
                "prune_residual": prune_residual,
                "exclude": exclude,
                "round_to": round_to,
                "min_filters": min_filters,
            },
            "refit": {"form": refit_form, "layers": refit, "norms": norms},
            "distill": {"epochs": polish},
            "finetune": {
                "epochs": 0 if finetune is False else epochs,
                **training_keys(learning_rate, label_weight, keep, max_minutes),
            },
            "seed": seed,
        },
        RunConfig,
        settings,
    )
    with _resumable(out):
        result = runs.run(
            resolved,
            out,
            overwrite=overwrite,
            resume=resume,
            allow_untrained=allow_untrained,
            progress=display.progress(),
            board=board,
            command=_command(),
        )
    display.show_run(result, out, as_json=as_json)


@app.command("finetune")
def finetune(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the result (default: the run folder)."),
    ] = None,
    model: ModelOption = None,
    data_source: DataOption = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", help="Epochs of training (default: the run's).")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="The largest (default: the run's).")
    ] = None,
    label_weight: Annotated[
        float | None,
        typer.Option("--label-weight", help="Share of the labels (default: the run's)."),
    ] = None,
    keep: KeepOption = None,
    max_minutes: MaxMinutesOption = None,
    board: BoardOption = None,
    settings: TuningSetOption = None,
    resume: ResumeOption = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an older run in the folder.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train the pruned network of a run folder by labels and by the network before the cut.

    Example: secateur finetune runs/a --epochs 40 --learning-rate 0.05
    """
    changes = training_keys(learning_rate, label_weight, keep, max_minutes)
    changes["epochs"] = epochs
    given = {key: value for key, value in changes.items() if value is not None}
    for key, value in assigned(settings):
        section, _, name = key.partition(".")
        if section != "finetune":
            raise UsageError(f"--set {key}: only keys of finetune can be set here")
        given[name] = value
    with _resumable(run):
        result = runs.finetune(
            run,
            out or run,
            given,
            model_name=model,
            source=data_source,
            resume=resume,
            overwrite=overwrite,
            progress=display.progress(),
            board=board,
            command=_command(),
        )
    display.show_run(result, out or run, as_json=as_json)


@app.command("train")
def train_network(
    model: ModelOption = None,
    weights: WeightsOption = None,
    data_source: DataOption = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the weights; made new.")
    ] = Path("secateur-base"),
    epochs: Annotated[
        int | None, typer.Option("--epochs", help="Passes over the images (default: 100).")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Largest learning rate (default: 0.1).")
    ] = None,
    keep: KeepOption = None,
    max_minutes: MaxMinutesOption = None,
    board: BoardOption = None,
    settings: SetOption = None,
    num_classes: ClassesOption = None,
    new_head: Annotated[
        bool | None,
        typer.Option(
            "--new-head/--no-new-head",
            help="Take weights for other classes; the head starts at random (default: no).",
        ),
    ] = None,
    image_size: ImageSizeOption = None,
    skip_unreadable: SkipOption = None,
    seed: SeedOption = None,
    config: ConfigOption = None,
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a base network, from random weights or from given ones, and keep its weights.

    Example: secateur train -m vgg16_bn -d cifar10:data --epochs 100 -o base
    """
    resolved = config_of(
        config,
        {
            "model": {"name": model, "weights": text_of(weights), "num_classes": num_classes},
            "data": {
                "source": data_source,
                "image_size": image_size,
                "skip_unreadable": skip_unreadable,
            },
            "train": {"epochs": epochs, **training_keys(learning_rate, None, keep, max_minutes)},
            "new_head": new_head,
            "seed": seed,
        },
        BaseConfig,
        settings,
    )
    with _resumable(out):
        result = train_base(
            resolved,
            out,
            resume=resume,
            progress=display.progress(),
            board=board,
            command=_command(),
        )
    if as_json:
        print(result.model_dump_json(indent=1))
        return
    display.show_score(result.score, result.unreadable, as_json=False)
    display.out().print(f"weights: {out / WEIGHTS}", soft_wrap=True, highlight=False)


@app.command()
def evaluate(
    run: Annotated[
        Path | None, typer.Argument(help="A run folder; or name a network with --model.")
    ] = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    data_source: DataOption = None,
    num_classes: ClassesOption = None,
    image_size: ImageSizeOption = None,
    skip_unreadable: SkipOption = None,
    config: ConfigOption = None,
    allow_untrained: UntrainedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score a network, or the pruned network of a run folder, on the test images."""
    if (run is None) == (model is None and config is None):
        raise UsageError("name either a run folder or a network with --model")
    given = {
        "model": {"name": model, "weights": text_of(weights), "num_classes": num_classes},
        "data": {
            "source": data_source,
            "image_size": image_size,
            "skip_unreadable": skip_unreadable,
        },
    }
    settings = config_of(run / CONFIG if run else config, given, RunConfig)
    if run is not None:
        network = _pruned_network(run)
        dataset = data.load(settings.data.source)
    else:
        check_weights(settings, allow_untrained=allow_untrained)
        dataset, network = load_inputs(settings)
    unreadable = make_unreadable(settings)
    images = stream(dataset.test, settings, display.progress(), "scoring", unreadable)
    score = evaluate_network(network, images)
    names = None if unreadable is None else names_of(unreadable)
    display.show_score(score, names, as_json=as_json)


@app.command()
def inspect(
    model: ModelOption = None,
    weights: WeightsOption = None,
    data_source: DataOption = None,
    criterion: Annotated[
        list[str] | None,
        typer.Option(
            "--criterion",
            autocompletion=complete_criterion,
            help="May be given several times (default: vote).",
        ),
    ] = None,
    concept_source: ConceptsOption = None,
    calibration_images: ProbeOption = None,
    layer: Annotated[
        str | None, typer.Option("--layer", help="List every filter of this layer.")
    ] = None,
    filter_number: Annotated[
        int | None,
        typer.Option("--filter", min=0, help="Of the layer, show this filter alone."),
    ] = None,
    prune_residual: Annotated[
        bool, typer.Option("--prune-residual", help="Show residual streams as prunable, too.")
    ] = False,
    pictures: Annotated[
        Path | None,
        typer.Option(
            "--pictures",
            help="Folder for a picture a layer: each filter's top images, with what is above its "
            "threshold.",
        ),
    ] = None,
    exclude: ExcludeOption = None,
    num_classes: ClassesOption = None,
    image_size: ImageSizeOption = None,
    skip_unreadable: SkipOption = None,
    seed: SeedOption = None,
    config: ConfigOption = None,
    allow_untrained: UntrainedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score the filters of a network, tell what they see, and change nothing."""
    if filter_number is not None and layer is None:
        raise UsageError("--filter needs the --layer that it is in")
    names = tuple(criterion or ["vote"])
    if (
        data_source is None
        and config is None
        and concept_source
        and concepts.annotated_images(concept_source)
    ):
        data_source = data.NONE
    settings = config_of(
        config,
        {
            "model": {"name": model, "weights": text_of(weights), "num_classes": num_classes},
            "data": {
                "source": data_source,
                "calibration_images": calibration_images,
                "image_size": image_size,
                "skip_unreadable": skip_unreadable,
            },
            "score": {"concepts": concept_source, "criterion": names[0]},
            "plan": {"prune_residual": prune_residual, "exclude": exclude},
            "seed": seed,
        },
        RunConfig,
    )
    check_weights(settings, allow_untrained=allow_untrained)
    if pictures is not None and not pictures.parent.is_dir():
        raise UsageError(f"no folder {pictures.parent} to make {pictures.name} in")
    found = inspect_network(settings, names, pictures=pictures, progress=display.progress())
    if as_json:
        print(json.dumps(found, indent=1))
        return
    if layer is None:
        display.show_groups(found)
    elif filter_number is None:
        display.show_filters(group_of(found, layer))
    else:
        display.show_filter(group_of(found, layer), filter_number)
    display.show_unreadable(found["unreadable"])


@app.command()
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the pruned network of a run folder as ONNX, compare the two and time them.

    The original is timed with untrained weights, which take as long; a network of your own code is
    not built, so only the pruned one is timed. Needs the extra: pip install 'secateur\\[export]'
    """
    path = out or run / "model.onnx"
    check_free(path, overwrite=overwrite)
    network = _pruned_network(run)
    manifest = read_manifest(run)
    example = torch.zeros(2, *manifest.image_shape)
    result = export_onnx(network, example, path, overwrite=overwrite)
    times: tuple[Latency, ...] = ()
    if latency:
        name, classes = manifest.architecture, manifest.num_classes
        original = None
        if name is not None and classes is not None and not user_code.is_user_code(name):
            original = zoo.load(name, num_classes=classes)
        times = compare_latency(network, path, original, example)
    display.show_export(result, times, as_json=as_json)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    model: ModelOption = None,
    data_source: DataOption = None,
    images: Annotated[
        int | None,
        typer.Option(
            "--images",
            min=0,
            help="Calibration images to look at filters with; 0: scores only, no data is read "
            "(default: the run's, 512).",
        ),
    ] = None,
    beside: Annotated[
        Path | None,
        typer.Option("--beside", help="Folder of a comparison to draw the run's trade-off among."),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="html: report.html; png: each chart as a picture.")
    ] = "html",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder for pictures (default: charts in the run folder)."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the report of a run folder anew, or its charts as pictures for papers and slides.

    Example: secateur report runs/a --beside comparison
    """
    if form not in ("html", "png"):
        raise UsageError(f"--format {form}: it must be html or png")
    if out is not None and form == "html":
        raise UsageError("--out is for --format png; the report lies in its run folder")
    pictures = None
    if form == "png":
        pictures = run / CHARTS if out is None else out.resolve()
    written = runs.report(
        run,
        model_name=model,
        source=data_source,
        images=images,
        beside=beside,
        pictures=pictures,
        progress=display.progress(),
    )
    if as_json:
        print(json.dumps([str(path) for path in written], indent=1))
        return
    for path in written:
        display.out().print(f"written: {path}", soft_wrap=True, highlight=False)


@app.command("models")
def list_models(as_json: JsonOption = False) -> None:
    """List the networks, criteria and concept sources that can be named."""
    found = {
        "networks": zoo.names(),
        "criteria": list(criteria.CRITERIA),
        "concepts": list(concepts.sources()),
        "data": list(data.FORMS),
    }
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for title, names in found.items():
        display.out().print(f"[bold]{title}[/]")
        display.out().print("  " + ", ".join(names), highlight=False)
    display.out().print("also timm:NAME (extra: timm) and path/to/file.py:factory")


@app.command("compare")
def compare(
    comparison: Annotated[
        Path, typer.Argument(help="A TOML file: docs/how_to/compare_criteria.md.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the results; an older one goes on.")
    ] = Path("secateur-comparison"),
    data_source: DataOption = None,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", "-w", help="Folder that relative paths of weights are in."),
    ] = None,
    settings: SetOption = None,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=1, help="Cells to work on at a time.")
    ] = 1,
    retry: Annotated[bool, typer.Option("--retry", help="Try failed cells again.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Prune networks by many criteria, to many targets, under one protocol, and make a table.

    What is in the folder is not done again: after an interruption the same command goes on.
    Example: secateur compare benchmark.toml -o comparison -j 2
    """
    given = put_over(read_tables(comparison), {"data": {"source": data_source}}, settings)
    content = from_dict(given, BenchmarkSpec).with_weights_in(weights)
    cells = run_benchmark(content, out, workers=jobs, retry=retry, progress=display.progress())
    write_benchmark(out, content, cells, _command())
    rows = [row_of(cell) for cell in cells]
    if as_json:
        print(json.dumps([row.model_dump() for row in rows], indent=1))
    else:
        display.show_benchmark(tables(compute_statistics(rows, content.compared_with)))
        display.out().print(f"page: {out / PAGE}", soft_wrap=True, highlight=False)
    if any(cell.outcome == "failed" for cell in cells):
        raise SecateurError("some cells failed: --retry tries them again")


@app.command("demo")
def run_demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the run.")] = Path(
        "runs/demo"
    ),
    data_source: DataOption = None,
    weights: WeightsOption = None,
    model: ModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a small network on handwritten digits and prune it by half; about a minute.

    With --data and --weights the same job runs on that data and network (resnet20 unless --model
    names another).
    """
    if (data_source is None) != (weights is None):
        raise UsageError("--data and --weights go together")
    run_folder.check_free(out, overwrite=True)
    if weights is None:
        weights = out.parent / f"{out.name}-base.safetensors"
        train_digits(weights, display.progress())
        settings = digits_config(weights)
    else:
        settings = config_of(
            None,
            {
                "model": {"name": model or MODEL, "weights": str(weights)},
                "data": {"source": data_source},
            },
            RunConfig,
        )
    result = runs.run(
        settings, out, overwrite=True, progress=display.progress(), command=_command()
    )
    display.show_run(result, out, as_json=as_json)


# --- networks ----------------------------------------------------------------------------------


def _pruned_network(run: Path) -> nn.Module:
    """The network of a run folder; its program where the folder would have to choose code."""
    architecture = read_manifest(run).architecture
    if architecture is None or user_code.is_user_code(architecture):
        return run_folder.load_program(run)
    return run_folder.load(run)


@contextlib.contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Says where an interrupted training has left its checkpoints."""
    try:
        yield
    except KeyboardInterrupt:
        if (folder / run_folder.CHECKPOINTS).is_dir():
            display.err().print(
                f"interrupted; the same command with --resume goes on from {folder}"
            )
        raise


def _command() -> str:
    return shlex.join(["secateur", *sys.argv[1:]])


if __name__ == "__main__":
    main()
