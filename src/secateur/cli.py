"""The command line: the only module that prints or exits."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from secateur import (
    __version__,
    bundle,
    concepts,
    criteria,
    data,
    demo,
    distributed,
    models,
    own_code,
    pipeline,
    runs,
    sweep,
)
from secateur.base import BaseConfig, train_base
from secateur.comparison import Comparison
from secateur.config import AnyConfig, RunConfig, from_dict, read_tables
from secateur.errors import SecateurError, UnknownName, UsageError
from secateur.evaluate import Score
from secateur.evaluate import evaluate as evaluate_network
from secateur.export import ExportResult, Latency, check_free, compare_latency, export_onnx
from secateur.failures import explain
from secateur.heartbeat import lost
from secateur.inspection import NEEDED, inspect_network
from secateur.interrupts import INTERRUPTED, insisting
from secateur.manifest import CONFIG, WEIGHTS, read_manifest
from secateur.progress import Track, bars, silent
from secateur.report import count_text, score_rows
from secateur.report.comparison import CHARTS, PAGE, TextTable, tables, write_comparison
from secateur.result import RunResult
from secateur.rows import row_of
from secateur.standings import standings

BAR = 8
"""Characters of the longest bar."""

app: typer.Typer = typer.Typer(
    help="Makes a trained convolutional network smaller and faster by what its filters see.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _beginning(names: Iterable[str], start: str) -> list[str]:
    """The names that a shell may complete a word to."""
    return [name for name in names if name.startswith(start)]


def _complete_model(incomplete: str) -> list[str]:
    return _beginning(models.names(), incomplete)


def _complete_criterion(incomplete: str) -> list[str]:
    return _beginning(criteria.CRITERIA, incomplete)


def _complete_concepts(incomplete: str) -> list[str]:
    return _beginning(concepts.sources(), incomplete)


def _complete_data(incomplete: str) -> list[str]:
    return _beginning([form.partition(":")[0] for form in data.FORMS], incomplete)


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        autocompletion=_complete_model,
        help="resnet20, vgg16_bn, …, torchvision:NAME, timm:NAME or path/to/file.py:factory.",
    ),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option("--weights", "-w", help="Weights: .safetensors, .pth, .pt or .th."),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        "-d",
        autocompletion=_complete_data,
        help="cifar10:DIR, cifar100:DIR, fashion-mnist:DIR, imagenet:DIR, imagenette:DIR, cub:DIR, "
        "folder:DIR (class folders), hf:NAME_OR_PATH or digits.",
    ),
]
SkipOption = Annotated[
    bool | None,
    typer.Option(
        "--skip-unreadable/--no-skip-unreadable",
        help="Leave image files out that can't be read, and count them (default: an error).",
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="A TOML file; options given here go before it."),
]
ClassesOption = Annotated[
    int | None,
    typer.Option("--num-classes", help="Outputs of the head (default: classes of the data)."),
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude", help="Layers whose filters must stay, as layer1.*; may be given several times."
    ),
]
ImageSizeOption = Annotated[
    int | None,
    typer.Option("--image-size", help="Side of the images in pixels (default: the network's)."),
]
ProbeOption = Annotated[
    int | None,
    typer.Option("--probe-images", help="Images to score and refit with (default: 2000)."),
]
ConceptsOption = Annotated[
    str | None,
    typer.Option(
        "--concepts",
        autocompletion=_complete_concepts,
        help="Where concepts are, several after commas: evidence, saliency, factors:K, colours; or "
        "with images of their own masks:DIR, broden:DIR, parts:DIR, boxes:DIR (default: evidence).",
    ),
]
SeedOption = Annotated[
    int | None, typer.Option("--seed", help="What every random choice depends on (default: 0).")
]
EpochsOption = Annotated[
    int | None, typer.Option("--epochs", help="Epochs of fine-tuning (default: 5).")
]
LearningRateOption = Annotated[
    float | None,
    typer.Option("--learning-rate", help="Largest learning rate (default: 0.02)."),
]
LabelWeightOption = Annotated[
    float | None,
    typer.Option(
        "--label-weight",
        help="Share of the labels in the loss, the rest is the original network's; 0 trains "
        "without labels (default: 0.3).",
    ),
]
KeepOption = Annotated[
    str | None,
    typer.Option(
        "--keep",
        help="Weights that stay: of the last epoch, or best on validation (default: last).",
    ),
]
MaxMinutesOption = Annotated[
    float | None, typer.Option("--max-minutes", help="End the training after so many minutes.")
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on from what an interrupted run has left.")
]
BoardOption = Annotated[
    Path | None,
    typer.Option("--tensorboard", help="Folder for TensorBoard's curves (extra: tensorboard)."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Any key of the configuration, as --set finetune.mixup=0.2; may be given again.",
    ),
]
UntrainedOption = Annotated[
    bool,
    typer.Option("--allow-untrained", help="Go on without weights, with random ones."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def main() -> None:
    """Runs the command line; errors of ours become one line and exit code 1 or 2.

    An interrupt and a request to terminate both clean up and exit with 130. Of several processes,
    as torchrun starts them, only the first one prints results and progress.
    """
    try:
        with insisting(), distributed.process_group(), contextlib.ExitStack() as stack:
            if not distributed.is_first():
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            app()
    except SecateurError as error:
        if "--debug" in sys.argv:
            raise
        _print_error(str(error))
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except (KeyboardInterrupt, SystemExit) as error:  # typer makes the latter of the former
        code = error.code if isinstance(error, SystemExit) else INTERRUPTED
        if code != INTERRUPTED or (reason := lost()) is None:
            sys.exit(code)
        _print_error(reason)
        sys.exit(1)
    except BrokenPipeError:  # whoever read what was printed has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        reason = lost() or explain(error)
        if reason is None or "--debug" in sys.argv:
            raise
        _print_error(reason)
        sys.exit(1)


def _print_error(text: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_escaped(text)}")


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
            autocompletion=_complete_criterion,
            help="How filters are ranked: vote, l1, …, or path/to/file.py:factory (default: vote).",
        ),
    ] = None,
    concept_source: ConceptsOption = None,
    probe_images: ProbeOption = None,
    stratify: Annotated[
        bool | None,
        typer.Option(
            "--stratify/--no-stratify",
            help="Draw probe images equally from each class, or without a look at labels "
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
    cut_stream: Annotated[
        bool | None,
        typer.Option(
            "--cut-stream/--no-cut-stream",
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
            "--polish",
            help="Epochs of training on the probe images by the original's answers, without labels "
            "(default: 0).",
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
    resolved = _config(
        config,
        {
            "model": {
                "name": model,
                "weights": _text(weights),
                "num_classes": num_classes,
            },
            "data": {
                "source": data_source,
                "probe_images": probe_images,
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
                "cut_stream": cut_stream,
                "exclude": exclude,
                "round_to": round_to,
                "min_filters": min_filters,
            },
            "refit": {"form": refit_form, "layers": refit, "norms": norms},
            "polish": {"epochs": polish},
            "finetune": {
                "epochs": 0 if finetune is False else epochs,
                **_training(learning_rate, label_weight, keep, max_minutes),
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
            track=_track(),
            board=board,
            command=_command(),
        )
    _show_run(result, out, as_json=as_json)


@app.command("finetune")
def finetune_run(
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
    settings: SetOption = None,
    resume: ResumeOption = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an older run in the folder.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train the pruned network of a run folder by labels and by the network before the cut.

    Example: secateur finetune runs/a --epochs 40 --learning-rate 0.05
    """
    changes = _training(learning_rate, label_weight, keep, max_minutes)
    changes["epochs"] = epochs
    given = {key: value for key, value in changes.items() if value is not None}
    for key, value in _assignments(settings):
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
            track=_track(),
            board=board,
            command=_command(),
        )
    _show_run(result, out or run, as_json=as_json)


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
    resolved = _config(
        config,
        {
            "model": {"name": model, "weights": _text(weights), "num_classes": num_classes},
            "data": {
                "source": data_source,
                "image_size": image_size,
                "skip_unreadable": skip_unreadable,
            },
            "train": {"epochs": epochs, **_training(learning_rate, None, keep, max_minutes)},
            "new_head": new_head,
            "seed": seed,
        },
        BaseConfig,
        settings,
    )
    with _resumable(out):
        result = train_base(
            resolved, out, resume=resume, track=_track(), board=board, command=_command()
        )
    if as_json:
        print(result.model_dump_json(indent=1))
        return
    _show_score(result.score, result.unreadable, as_json=False)
    _out().print(f"weights: {out / WEIGHTS}", soft_wrap=True, highlight=False)


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
        "model": {"name": model, "weights": _text(weights), "num_classes": num_classes},
        "data": {
            "source": data_source,
            "image_size": image_size,
            "skip_unreadable": skip_unreadable,
        },
    }
    settings = _config(run / CONFIG if run else config, given, RunConfig)
    if run is not None:
        network = _pruned_network(run)
        dataset = data.load(settings.data.source)
    else:
        pipeline.check_weights(settings, allow_untrained=allow_untrained)
        dataset, network = pipeline.load_inputs(settings)
    unreadable = pipeline.make_unreadable(settings)
    images = pipeline.stream(dataset.test, settings, _track(), "scoring", unreadable)
    score = evaluate_network(network, images)
    names = None if unreadable is None else pipeline.names_of(unreadable)
    _show_score(score, names, as_json=as_json)


@app.command()
def inspect(
    model: ModelOption = None,
    weights: WeightsOption = None,
    data_source: DataOption = None,
    criterion: Annotated[
        list[str] | None,
        typer.Option(
            "--criterion",
            autocompletion=_complete_criterion,
            help="May be given several times (default: vote).",
        ),
    ] = None,
    concept_source: ConceptsOption = None,
    probe_images: ProbeOption = None,
    layer: Annotated[
        str | None, typer.Option("--layer", help="List every filter of this layer.")
    ] = None,
    filter_number: Annotated[
        int | None,
        typer.Option("--filter", min=0, help="Of the layer, show this filter alone."),
    ] = None,
    cut_stream: Annotated[
        bool, typer.Option("--cut-stream", help="Show residual streams as prunable, too.")
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
    settings = _config(
        config,
        {
            "model": {"name": model, "weights": _text(weights), "num_classes": num_classes},
            "data": {
                "source": data_source,
                "probe_images": probe_images,
                "image_size": image_size,
                "skip_unreadable": skip_unreadable,
            },
            "score": {"concepts": concept_source, "criterion": names[0]},
            "plan": {"cut_stream": cut_stream, "exclude": exclude},
            "seed": seed,
        },
        RunConfig,
    )
    pipeline.check_weights(settings, allow_untrained=allow_untrained)
    if pictures is not None and not pictures.parent.is_dir():
        raise UsageError(f"no folder {pictures.parent} to make {pictures.name} in")
    found = inspect_network(settings, names, pictures=pictures, track=_track())
    if as_json:
        print(json.dumps(found, indent=1))
        return
    if layer is None:
        _show_groups(found)
    elif filter_number is None:
        _show_filters(_group_of(found, layer))
    else:
        _show_filter(_group_of(found, layer), filter_number)
    _show_unreadable(found["unreadable"])


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
        if name is not None and classes is not None and not own_code.is_own_code(name):
            original = models.load(name, num_classes=classes)
        times = compare_latency(network, path, original, example)
    _show_export(result, times, as_json=as_json)


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
            help="Probe images to look at filters with; 0: scores only, no data is read "
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
        track=_track(),
    )
    if as_json:
        print(json.dumps([str(path) for path in written], indent=1))
        return
    for path in written:
        _out().print(f"written: {path}", soft_wrap=True, highlight=False)


@app.command("models")
def list_models(as_json: JsonOption = False) -> None:
    """List the networks, criteria and concept sources that can be named."""
    found = {
        "networks": models.names(),
        "criteria": list(criteria.CRITERIA),
        "concepts": list(concepts.sources()),
        "data": list(data.FORMS),
    }
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for title, names in found.items():
        _out().print(f"[bold]{title}[/]")
        _out().print("  " + ", ".join(names), highlight=False)
    _out().print("also timm:NAME (extra: timm) and path/to/file.py:factory")


@app.command("compare")
def compare_ways(
    comparison: Annotated[Path, typer.Argument(help="A TOML file: docs/comparing.md.")],
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
    Example: secateur compare comparison.toml -o comparison -j 2
    """
    given = _put_over(read_tables(comparison), {"data": {"source": data_source}}, settings)
    content = from_dict(given, Comparison).with_weights_in(weights)
    cells = sweep.compare(content, out, jobs=jobs, retry=retry, track=_track())
    write_comparison(out, content, cells, _command())
    rows = [row_of(cell) for cell in cells]
    if as_json:
        print(json.dumps([row.model_dump() for row in rows], indent=1))
    else:
        _show_comparison(tables(standings(rows, content.compared_with)))
        _out().print(f"page: {out / PAGE}", soft_wrap=True, highlight=False)
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
    bundle.check_free(out, overwrite=True)
    if weights is None:
        weights = out.parent / f"{out.name}-base.safetensors"
        demo.train_digits(weights, _track())
        settings = demo.digits_config(weights)
    else:
        settings = _config(
            None,
            {
                "model": {"name": model or demo.MODEL, "weights": str(weights)},
                "data": {"source": data_source},
            },
            RunConfig,
        )
    result = runs.run(settings, out, overwrite=True, track=_track(), command=_command())
    _show_run(result, out, as_json=as_json)


# --- networks ----------------------------------------------------------------------------------


def _pruned_network(run: Path) -> nn.Module:
    """The network of a run folder; its program where the folder would have to choose code."""
    architecture = read_manifest(run).architecture
    if architecture is None or own_code.is_own_code(architecture):
        return bundle.load_program(run)
    return bundle.load(run)


# --- configuration -----------------------------------------------------------------------------


def _config(
    path: Path | None,
    options: dict[str, Any],
    kind: type[AnyConfig],
    assignments: list[str] | None = None,
) -> AnyConfig:
    """The configuration of a file with the given options put over it, and assignments over those.

    A key of a section that a configuration of this kind has not is an error that names it.
    """
    base = _put_over(read_tables(path) if path else {}, options, assignments)
    for section, key, option in (("model", "name", "--model"), ("data", "source", "--data")):
        if key not in _section(base, section):
            raise UsageError(f"{option} is missing")
    return from_dict(base, kind)


def _put_over(
    base: dict[str, Any], options: dict[str, Any], assignments: list[str] | None
) -> dict[str, Any]:
    """Tables with those options put over them that are not None, and assignments over those."""
    for section, values in options.items():
        if isinstance(values, dict):
            given = {key: value for key, value in values.items() if value is not None}
            base[section] = {**_section(base, section), **given}
        elif values is not None:
            base[section] = values
    for key, value in _assignments(assignments):
        section, dot, name = key.partition(".")
        if dot:
            base[section] = {**_section(base, section), name: value}
        else:
            base[section] = value
    return base


def _section(base: dict[str, Any], name: str) -> dict[str, Any]:
    """A table of a configuration, empty where it is not given."""
    found = base.get(name, {})
    if not isinstance(found, dict):
        raise UsageError(f"configuration, {name}: {found!r} found where a table is needed")
    return found


def _assignments(texts: list[str] | None) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of texts such as `finetune.mixup=0.2`, with values as in TOML."""
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {text}: it must be KEY=VALUE, as finetune.mixup=0.2")
        try:
            yield key, tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            yield key, value  # a text without quotes


def _training(
    learning_rate: float | None,
    label_weight: float | None,
    keep: str | None,
    max_minutes: float | None,
) -> dict[str, Any]:
    return {
        "learning_rate": learning_rate,
        "label_weight": label_weight,
        "keep": keep,
        "max_minutes": max_minutes,
    }


@contextlib.contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Says where an interrupted training has left its checkpoints."""
    try:
        yield
    except KeyboardInterrupt:
        if (folder / bundle.CHECKPOINTS).is_dir():
            console = Console(stderr=True, soft_wrap=True)
            console.print(f"interrupted; the same command with --resume goes on from {folder}")
        raise


def _command() -> str:
    return shlex.join(["secateur", *sys.argv[1:]])


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


# --- printing ----------------------------------------------------------------------------------


def _out() -> Console:
    return Console()


def _track() -> Track:
    """Progress bars on stderr where it is a terminal, else nothing."""
    return bars if sys.stderr.isatty() and distributed.is_first() else silent


def _show_run(result: RunResult, folder: Path, *, as_json: bool) -> None:
    if as_json:
        print(result.model_dump_json(indent=1))
        return
    rows = score_rows(result)
    table = Table(box=None, pad_edge=False)
    for number, key in enumerate(rows[0]):
        table.add_column(key, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    _out().print(table)
    for trial in result.trials:
        _out().print(
            f"{trial.fraction_left:7.3f} left: {100 * trial.validation_top1_fraction:.2f} % of the "
            f"validation images{'' if trial.kept else ', too little'}",
            highlight=False,
        )
    removed = sum(len(group.removed) for group in result.groups)
    filters = sum(group.filters for group in result.groups)
    _out().print(f"{removed} of {filters} prunable filters removed", highlight=False)
    _show_unreadable(result.unreadable)
    for notice in result.notices:
        _out().print(f"[yellow]note:[/] {_escaped(notice)}", soft_wrap=True, highlight=False)
    _out().print(f"report: {folder / bundle.REPORT}", soft_wrap=True, highlight=False)


def _show_comparison(found: Sequence[TextTable]) -> None:
    for table in found:
        shown = Table(title=table.title, title_justify="left", box=None, pad_edge=False)
        for number, head in enumerate(table.heads):
            shown.add_column(_escaped(head), justify="left" if number == 0 else "right")
        for line in table.rows:
            shown.add_row(*map(_escaped, line))
        _out().print(shown)
        _out().print(_escaped(table.note), highlight=False)


def _show_unreadable(names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        _out().print(
            f"{len(names)} images can't be read and were left out: "
            f"{', '.join(map(_escaped, names[:3]))}{more}",
            soft_wrap=True,
            highlight=False,
        )


def _show_score(score: Score, unreadable: Sequence[str] | None, *, as_json: bool) -> None:
    """With the images that were left out, where that was asked for."""
    if as_json:
        skipped = {} if unreadable is None else {"unreadable": unreadable}
        print(json.dumps({**asdict(score), **skipped}, indent=1))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for title, text in (
        ("images", str(score.images)),
        ("top-1", f"{100 * score.top1_fraction:.2f} %"),
        ("top-5", f"{100 * score.top5_fraction:.2f} %"),
        ("loss", f"{score.loss:.4f}"),
        ("MACs", count_text(score.macs)),
        ("parameters", count_text(score.parameters)),
        ("latency", f"{score.latency_ms:.1f} ms a batch of 16"),
    ):
        table.add_row(title, text)
    _out().print(table)
    _show_unreadable(unreadable or ())


def _show_export(result: ExportResult, times: tuple[Latency, ...], *, as_json: bool) -> None:
    if as_json:
        facts = {**asdict(result), "path": str(result.path)}
        print(json.dumps({**facts, "latency": [asdict(one) for one in times]}, indent=1))
        return
    batches = ", ".join(str(batch) for batch in result.batches)
    _out().print(f"written: {result.path}", soft_wrap=True, highlight=False)
    _out().print(
        f"{result.bytes / 1e6:.2f} MB, opset {result.opset}; relative error {result.error:.1e} in "
        f"batches of {batches}",
        highlight=False,
    )
    if not times:
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("engine")
    for title in ("batch", "original ms", "pruned ms", "ratio"):
        table.add_column(title, justify="right")
    for one in times:
        original = one.original_ms
        table.add_row(
            one.engine,
            str(one.batch),
            "" if original is None else f"{original:.2f}",
            f"{one.pruned_ms:.2f}",
            "" if original is None else f"{original / one.pruned_ms:.2f}",
        )
    _out().print(table)


def _show_groups(found: dict[str, Any]) -> None:
    """A line a layer that can be cut, then those that can't, and why."""
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for title in ("filters", "needed", "MACs %"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("detectors", justify="right", no_wrap=True)
    largest = max((group["macs_share"] for group in found["groups"]), default=1.0)
    for group in found["groups"]:
        detected = [seen["concept"] for seen in group["concepts"] if seen["is_detector"]]
        table.add_row(
            _escaped(group["layer"]),
            str(group["filters"]),
            str(group["needed"]),
            f"{100 * group['macs_share']:.1f}",
            "█" * round(BAR * group["macs_share"] / largest),
            f"{len(detected)} ({len(set(detected))})",
        )
    _out().print(table)
    _out().print(
        f"needed: filters that hold {NEEDED:.0%} of the layer's votes; detectors: filters that "
        "overlap a concept, and of how many concepts",
        highlight=False,
    )
    if not found["frozen"]:
        return
    frozen = Table(box=None, pad_edge=False)
    frozen.add_column("frozen", overflow="fold")
    frozen.add_column("filters", justify="right", no_wrap=True)
    frozen.add_column("because")
    for group in found["frozen"]:
        reason = _escaped(group["reason"])
        frozen.add_row(_escaped(group["layer"]), str(group["filters"]), reason)
    _out().print(frozen)


def _group_of(found: dict[str, Any], layer: str) -> dict[str, Any]:
    groups = {group["layer"]: group for group in found["groups"]}
    if layer not in groups:
        raise UnknownName("prunable layer", layer, groups)
    group: dict[str, Any] = groups[layer]
    return group


def _show_filters(group: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("filter", justify="right")
    for name in group["scores"]:
        table.add_column(name, justify="right")
    table.add_column("best concept")
    table.add_column("IoU", justify="right")
    for number, seen in enumerate(group["concepts"]):
        scores = [f"{values[number]:.4g}" for values in group["scores"].values()]
        table.add_row(str(number), *scores, _escaped(seen["concept"]), f"{seen['iou']:.3f}")
    _out().print(table)


def _show_filter(group: dict[str, Any], number: int) -> None:
    """What one filter sees, and where in the image that it responds to most."""
    if number >= group["filters"]:
        raise UsageError(f"{group['layer']} has filters 0 to {group['filters'] - 1}, not {number}")
    lines = [f"{group['layer']}, filter {number} of {group['filters']}"]
    for name, scores in group["scores"].items():
        rank = 1 + sum(other > scores[number] for other in scores)
        lines.append(f"{name}: {scores[number]:.4g}, rank {rank} of {group['filters']}")
    seen = group["concepts"][number]
    kind = "detector of" if seen["is_detector"] else "overlaps most"
    lines.append(f"{kind} {seen['concept']}, IoU {seen['iou']:.3f}")
    tops = group["top_images"][number]
    lines.append(f"top probe images: {', '.join(map(str, tops))}; where it is active in {tops[0]}:")
    lines += [
        "  " + row.replace("#", "██").replace(".", "··") for row in group["top_regions"][number]
    ]
    _out().print(_escaped("\n".join(lines)), highlight=False)


def _escaped(text: str) -> str:
    """Text from outside, so that rich does not read brackets in it as style."""
    return text.replace("[", r"\[")


if __name__ == "__main__":
    main()
