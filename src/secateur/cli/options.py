"""The options of the command line, and the configuration that they and a file make."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur import data
from secateur.config import AnyConfig, from_dict, read_tables
from secateur.errors import UsageError
from secateur.models import zoo
from secateur.scoring import concepts, criteria


def _beginning(names: Iterable[str], start: str) -> list[str]:
    """The names that a shell may complete a word to."""
    return [name for name in names if name.startswith(start)]


def _complete_model(incomplete: str) -> list[str]:
    return _beginning(zoo.names(), incomplete)


def complete_criterion(incomplete: str) -> list[str]:
    """The criteria that a shell may complete a word to."""
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
    typer.Option("--calibration-images", help="Images to score and refit with (default: 2000)."),
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
        help="Weights that stay: last (epoch) or best (on validation).",
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
        help="Any key of the configuration, as --set data.batch_size=50; may be given again.",
    ),
]
TuningSetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Any key of finetune, as --set finetune.mixup=0.2; may be given again."
    ),
]
UntrainedOption = Annotated[
    bool,
    typer.Option("--allow-untrained", help="Go on without weights, with random ones."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def config_of(
    path: Path | None,
    options: dict[str, Any],
    kind: type[AnyConfig],
    assignments: list[str] | None = None,
) -> AnyConfig:
    """The configuration of a file with the given options put over it, and assignments over those.

    A key of a section that a configuration of this kind has not is an error that names it.
    """
    base = put_over(read_tables(path) if path else {}, options, assignments)
    for section, key, option in (("model", "name", "--model"), ("data", "source", "--data")):
        if key not in _section(base, section):
            raise UsageError(f"{option} is missing")
    return from_dict(base, kind)


def put_over(
    base: dict[str, Any], options: dict[str, Any], assignments: list[str] | None
) -> dict[str, Any]:
    """Tables with those options put over them that are not None, and assignments over those."""
    for section, values in options.items():
        if isinstance(values, dict):
            given = {key: value for key, value in values.items() if value is not None}
            base[section] = {**_section(base, section), **given}
        elif values is not None:
            base[section] = values
    for key, value in assigned(assignments):
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


def assigned(texts: list[str] | None) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of texts such as `finetune.mixup=0.2`, with values as in TOML."""
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {text}: it must be KEY=VALUE, as finetune.mixup=0.2")
        try:
            yield key, tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            yield key, value  # a text without quotes


def training_keys(
    learning_rate: float | None,
    label_weight: float | None,
    keep: str | None,
    max_minutes: float | None,
) -> dict[str, Any]:
    """Keys of a training, of which those that are None are not given."""
    return {
        "learning_rate": learning_rate,
        "label_weight": label_weight,
        "keep": keep,
        "max_minutes": max_minutes,
    }


def text_of(path: Path | None) -> str | None:
    """A path as a configuration has it."""
    return None if path is None else str(path)
