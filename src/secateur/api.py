"""Prune from Python: a network and images in, a smaller network and its scores out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from markupsafe import Markup
from torch import Tensor, nn
from torch.utils.data import Dataset

from secateur.config import RunConfig, from_dict
from secateur.data import DataSet, NormalisedImages
from secateur.experiments import run as runs
from secateur.experiments.report.gallery import make_gallery
from secateur.experiments.report.page import score_rows, write_report
from secateur.experiments.run_folder import Origin
from secateur.graph.working_copy import like_original, working_copy
from secateur.graph.wrappers import unwrapped
from secateur.models import zoo
from secateur.models.evaluate import predict_classes
from secateur.models.score import Score
from secateur.pipeline import prune as pipeline
from secateur.pipeline.pruned import Pruned
from secateur.pipeline.result import RunResult
from secateur.pipeline.run_context import RunContext
from secateur.pruning.plan import PruningPlan
from secateur.runtime.errors import DataError, UsageError
from secateur.runtime.progress import no_progress, progress_bars
from secateur.scoring import criteria

ImageBatches = Iterable[Any] | Dataset[Any]
"""Images as a `DataLoader`, a `Dataset` or a list yields them: tensors `[image, channel, height,
width]` or `[channel, height, width]`, or pairs `(images, labels)` of such a tensor and class
numbers."""
TEST_EVERY, VALIDATION_EVERY = 5, 10
"""Without `test` every n-th image is held out for the scores, and every n-th of the others for
choices on validation images."""
SOURCE = "images in memory"


@dataclass(frozen=True, eq=False, repr=False)
class PruneResult:
    """A smaller network, what was removed, and the scores of every stage.

    Printing it shows the table of scores; a notebook shows it as HTML.
    """

    model: nn.Module
    """The pruned network, in evaluation mode, on the device of the original."""
    plan: PruningPlan
    """Which filters were removed."""
    scores: Mapping[str, Score]
    """By stage, as far as the run had it: `before`, `cut`, `refit`, `distilled`, `finetuned`.
    Without labels top-1 is the fraction of images that get the original network's class."""
    result: RunResult
    """Everything else: settings, filter scores, frozen groups, environment."""
    has_labels: bool
    """Whether accuracies are measured on labels, not on the original network's classes."""
    _original: nn.Module
    _dataset: DataSet
    _pruned: Pruned
    _shape: tuple[int, int, int]

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write a run folder, whose report has no gallery, and return its path.

        `secateur.load(folder, architecture=model)` loads the network again, where `model` is the
        original with any weights; `secateur.load_program(folder)` needs no code. Raises
        `RunFolderError` if the folder is not empty (see `overwrite`), and `WriteError`.
        """
        config = self.result.config
        origin = Origin(None, self._shape, config.plan.prune_residual, config.plan.exclude)
        runs.save(Path(folder), self._pruned, origin, overwrite=overwrite)
        return Path(folder)

    def report(self, path: str | Path = "report.html", *, images: int = 512) -> Path:
        """Write one HTML file: what was removed, and what filters respond to; return its path.

        `images` is how many calibration images the filters are dissected with; 0 shows no images.
        Raises `WriteError`.
        """
        config = self.result.config
        report_section = config.report.model_copy(update={"images": images})
        config = config.model_copy(update={"report": report_section})
        result = self.result.model_copy(update={"config": config})
        gallery = make_gallery(
            self._original,
            self._pruned.model,
            self._dataset,
            result,
            dependencies=self._pruned.dependencies,
        )
        write_report(result, Path(path), gallery)
        return Path(path)

    def __repr__(self) -> str:
        head, *rows = _table(self)
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(
                text.ljust(width) if column == 0 else text.rjust(width)
                for column, (text, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in (head, *rows)
        ]
        return "\n".join([_summary(self), *lines, *self.result.notices])

    def _repr_html_(self) -> str:
        head, *rows = _table(self)
        heads = Markup("").join(Markup("<th>{}</th>").format(text) for text in head)
        body = Markup("").join(
            Markup("<tr>{}</tr>").format(
                Markup("").join(Markup("<td>{}</td>").format(text) for text in row)
            )
            for row in rows
        )
        table = Markup(
            "<p>{}</p><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>"
        ).format(_summary(self), heads, body)
        return Markup("").join([table, *map(Markup("<p>{}</p>").format, self.result.notices)])


def prune(
    model: nn.Module,
    images: ImageBatches,
    *,
    target: str = "macs=0.5",
    criterion: str = "vote",
    concepts: str = "evidence",
    test: ImageBatches | None = None,
    class_names: Sequence[str] = (),
    epochs: int = 0,
    max_images: int = 2500,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> PruneResult:
    """Return a smaller copy of an image classifier; `model` itself is not changed.

    Arguments:
        model: any network that takes images and returns logits `[image, class]`.
        images: what the network takes, float `[image, channel, height, width]` of one size, in
            batches or one by one, with class numbers or without; see `ImageBatches`. They score the
            filters and refit the remaining kernels.
        target: the budget, the fraction that may stay: `macs=F`, `params=F`, `filters=F`,
            `memory=F` or `latency=F`.
        criterion, concepts: how filters are ranked, as `secateur models` lists them.
        test: images for the scores. By default every fifth of `images` is held out. Without labels
            the scores say how often the two networks agree.
        class_names: for the report.
        epochs: fine-tuning on `images`, from the original's outputs and the labels, if any.
        max_images: the most images to read; they are kept in memory.
        settings: any keys of a configuration: `{"plan.round_to": 8, "refit.layers": "consumers"}`.
        progress: whether to show progress bars on stderr.

    Raises `DataError` if the images are not such tensors, `UsageError` or `UnknownName` for
    settings that don't exist, and `SecateurError` if the network can't be traced or pruned.

    >>> import secateur, torch
    >>> model = secateur.load_model("resnet20", num_classes=10)
    >>> images = torch.rand(100, 3, 32, 32)
    >>> pruned = secateur.prune(model, [images], target="macs=0.5")
    >>> pruned.scores["refit"].macs / pruned.scores["before"].macs <= 0.5
    True
    >>> pruned.model(images[:1]).shape
    torch.Size([1, 10])
    """
    model = unwrapped(model)
    calibration = _collect(images, max_images, "images")
    test_images = None if test is None else _collect(test, None, "test")
    config = _make_config(
        model, calibration, target, criterion, concepts, epochs, seed, settings or {}
    )
    original = working_copy(model, calibration.pixels[:2])
    dataset, has_labels = _make_dataset(
        original, calibration, test_images, class_names, config.data.batch_size
    )
    run_context = RunContext(progress_bars if progress else no_progress)
    pruned = pipeline.prune(original, dataset, config, run_context=run_context)
    channels, height, width = calibration.pixels.shape[1:]
    return PruneResult(
        model=like_original(pruned.model, model).eval(),
        plan=pruned.plan,
        scores={stage.stage: stage.score for stage in pruned.result.stages},
        result=pruned.result,
        has_labels=has_labels,
        _original=original,
        _dataset=dataset,
        _pruned=pruned,
        _shape=(channels, height, width),
    )


@dataclass(frozen=True, eq=False)
class _Images:
    """Images in memory, as the network takes them."""

    pixels: Float[Tensor, "image channel height width"]
    labels: Int[Tensor, "image"] | None

    def take(self, chosen: Tensor) -> _Images:
        """Return the images where `chosen` is true."""
        labels = None if self.labels is None else self.labels[chosen]
        return _Images(self.pixels[chosen], labels)


def _every(step: int, count: int) -> Tensor:
    """Return for each of `count` images whether it is the last of `step` in a row."""
    return torch.arange(count) % step == step - 1


def _make_dataset(
    original: nn.Module,
    calibration: _Images,
    test: _Images | None,
    class_names: Sequence[str],
    batch_size: int,
) -> tuple[DataSet, bool]:
    """Return the images in three parts, and whether their labels were given."""
    count = len(calibration.pixels)
    test_every = TEST_EVERY if test is None else count + 1
    if test is None:
        is_test = _every(TEST_EVERY, count)
        calibration, test = calibration.take(~is_test), calibration.take(is_test)
    is_validation = _every(VALIDATION_EVERY, len(calibration.pixels))
    labels, test_labels = calibration.labels, test.labels
    has_labels = labels is not None and test_labels is not None
    if labels is None or test_labels is None:
        labels, test_labels = (
            predict_classes(original, images.pixels, batch_size) for images in (calibration, test)
        )
    if not len(test.pixels) or not is_validation.any():
        least = next(
            n for n in itertools.count(VALIDATION_EVERY) if n - n // test_every >= VALIDATION_EVERY
        )
        raise DataError(f"{count} images are too few: give at least {least}")
    pixels = calibration.pixels
    dataset = DataSet(
        name=SOURCE,
        class_names=tuple(class_names),
        train=NormalisedImages(pixels[~is_validation], labels[~is_validation]),
        validation=NormalisedImages(pixels[is_validation], labels[is_validation]),
        test=NormalisedImages(test.pixels, test_labels),
    )
    return dataset, has_labels


def _make_config(
    model: nn.Module,
    calibration: _Images,
    target: str,
    criterion: str,
    concepts: str,
    epochs: int,
    seed: int,
    settings: Mapping[str, Any],
) -> RunConfig:
    """Return the configuration of a run on a network and images that have no name."""
    criteria.check_name(criterion)
    tables: dict[str, Any] = {
        "model": {"name": f"{zoo.IN_MEMORY}:{type(model).__name__}"},
        "data": {
            "source": SOURCE,
            "stratified": False,
            "image_size": min(calibration.pixels.shape[2:]),
            "calibration_images": len(calibration.pixels),
        },
        "score": {"criterion": criterion, "concepts": concepts},
        "plan": {"target": target},
        "finetune": {"epochs": epochs},
        "seed": seed,
    }
    for key, value in settings.items():
        section, dot, name = key.partition(".")
        if not dot:
            raise UsageError(f"settings: {key!r} must be SECTION.KEY, as plan.round_to")
        tables[section] = {**tables.get(section, {}), name: value}
    config = from_dict(tables, RunConfig)
    if config.finetune.randaugment or config.finetune.crop == "random_resized_crop":
        raise UsageError(
            "randaugment and crop = 'random_resized_crop' change images in files, not tensors"
        )
    return config


def _collect(batches: ImageBatches, most: int | None, name: str) -> _Images:
    """Return the first `most` images, and their labels if each batch has them."""
    pixels: list[Tensor] = []
    labels: list[Tensor] = []
    count = 0
    for batch in cast("Iterable[Any]", batches):  # a Dataset is iterated by index
        images, batch_labels = batch if _is_pair(batch) else (_only(batch), None)
        images = _checked(images, name)
        if pixels and images.shape[1:] != pixels[0].shape[1:]:
            raise DataError(
                f"{name}: tensors {list(pixels[0].shape[1:])} and {list(images.shape[1:])} of one "
                "image each: all must have one size"
            )
        pixels.append(images.detach().cpu().float())
        if batch_labels is not None:
            labels.append(torch.as_tensor(batch_labels).detach().cpu().reshape(-1).long())
            if len(labels[-1]) != len(images):
                raise DataError(f"{name}: {len(images)} images with {len(labels[-1])} labels")
        count += len(images)
        if most is not None and count >= most:
            break
    if not pixels:
        raise DataError(f"{name}: there are none")
    if labels and len(labels) < len(pixels):
        raise DataError(f"{name}: some come with labels and some without")
    return _Images(torch.cat(pixels)[:most], torch.cat(labels)[:most] if labels else None)


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, tuple | list) and len(batch) == 2


def _only(batch: Any) -> Any:
    return batch[0] if isinstance(batch, tuple | list) and len(batch) == 1 else batch


def _checked(pixels: Any, name: str) -> Tensor:
    if not isinstance(pixels, Tensor):
        raise DataError(
            f"{name} must be tensors [image, channel, height, width]; got {type(pixels).__name__}: "
            "the transform of a Dataset must end in a tensor"
        )
    batch: Tensor = pixels[None] if pixels.ndim == 3 else pixels
    if batch.ndim != 4 or not batch.is_floating_point():
        raise DataError(
            f"{name} must be floating-point tensors [image, channel, height, width], as the "
            f"network takes them; got {list(batch.shape)} of {batch.dtype}"
        )
    if not bool(batch.isfinite().all()):
        raise DataError(f"{name}: an image holds a number that is not finite")
    return batch


def _summary(result: PruneResult) -> str:
    groups = result.result.groups
    removed, filters = sum(len(g.removed) for g in groups), sum(g.filters for g in groups)
    config = result.result.config
    name = config.model.name.partition(":")[2]
    unit = "" if result.has_labels else "; top-1 is agreement with the original network"
    return (
        f"{name} pruned to {config.plan.target} by {config.score.criterion}: {removed} of "
        f"{filters} prunable filters removed{unit}"
    )


def _table(result: PruneResult) -> list[list[str]]:
    rows = score_rows(result.result)
    shown = [key for key in rows[0] if key not in ("seconds", "loss", "top-5 %")]
    return [shown, *([row[key] for key in shown] for row in rows)]


__all__ = ["ImageBatches", "PruneResult", "prune"]
