"""From Python: a network and images in, a smaller network and what is known of it out."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Int
from markupsafe import Markup
from torch import Tensor, nn
from torch.utils.data import Dataset

from secateur.config import RunConfig, from_dict
from secateur.data import DataSet, NormalisedImages
from secateur.errors import DataError, UsageError
from secateur.evaluation.evaluate import Score, compute_logits
from secateur.experiments import run as runs
from secateur.experiments.report.gallery import make_gallery
from secateur.experiments.report.page import score_rows, write_report
from secateur.models import zoo
from secateur.pipeline import prune as pipeline
from secateur.pipeline.result import Origin, RunResult
from secateur.pruning.plan import PruningPlan
from secateur.runtime.module_state import device_of, evaluating
from secateur.runtime.progress import no_progress, progress_bars
from secateur.scoring import criteria

ImageBatches = Iterable[Any] | Dataset[Any]
"""What goes through the network: tensors `[image, channel, height, width]` or
`[channel, height, width]`, or pairs `(images, labels)` of such a tensor and class numbers, as a
`DataLoader`, a `Dataset` or a list gives them."""
HELD_OUT, FOR_CHOICE = 5, 10
"""Without `test` images every n-th image is kept for the score, and every n-th of the
others for choices by validation images."""
SOURCE = "images in memory"


@dataclass(frozen=True, eq=False, repr=False)
class PruneResult:
    """A smaller network, what was cut, and what it cost."""

    model: nn.Module
    """The pruned network, in evaluation mode, on the device that the original is on."""
    plan: PruningPlan
    """Which filters went."""
    scores: Mapping[str, Score]
    """Of each step that the run came to, in their order: `before`, `cut`, `refit`, `polished`,
    `tuned`. Top-1 is agreement with the original where there were no labels."""
    result: RunResult
    """All else: settings, scores of filters, frozen groups, environment."""
    has_labels: bool
    """Whether accuracies are by labels, not by what the original network answers."""
    _original: nn.Module
    _dataset: DataSet
    _pruned: pipeline.Pruned
    _shape: tuple[int, int, int]

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Leaves a run folder, without a gallery in its report; returns the folder.

        `secateur.load(folder, architecture=model)` gives the network back, where `model` is the
        original with any weights; `secateur.load_program(folder)` needs no code. Raises
        `RunFolderError` where the folder is in the way, and `WriteError`.
        """
        config = self.result.config
        origin = Origin(None, self._shape, config.plan.prune_residual, config.plan.exclude)
        runs.save(Path(folder), self._pruned, origin, overwrite=overwrite)
        return Path(folder)

    def report(self, path: str | Path = "report.html", *, images: int = 512) -> Path:
        """Writes one HTML file with what went and what the filters see; returns its path.

        `images` is how many calibration images the filters are looked at with; 0 shows no images.
        Raises `WriteError` where it can't be written.
        """
        config = self.result.config
        config = config.model_copy(
            update={"report": config.report.model_copy(update={"images": images})}
        )
        result = self.result.model_copy(update={"config": config})
        smaller = self._pruned.model
        dependencies = self._pruned.dependencies
        gallery = make_gallery(
            self._original, smaller, self._dataset, result, dependencies=dependencies
        )
        write_report(result, Path(path), gallery)
        return Path(path)

    def __repr__(self) -> str:
        head, *rows = _table(self)
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(
                text.ljust(width) if place == 0 else text.rjust(width)
                for place, (text, width) in enumerate(zip(line, widths, strict=True))
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
    """A smaller copy of a network that tells images apart; `model` itself is not changed.

    `images` are as the network takes them, float `[image, channel, height, width]` of one size, in
    batches or one by one, with class numbers or without: see `ImageBatches`. The first `max_images`
    are read and held in memory. They score the filters and re-estimate the remaining kernels; with
    `epochs` the network is trained on them, too, by the original's answers and the labels, if any.
    Without `test` images a fifth is kept apart for the scores; without labels those say how often
    the two networks agree.

    `target` is what may stay: `macs=F`, `params=F`, `filters=F`, `memory=F` or `latency=F`;
    `criterion` and `concepts` are named as in `secateur models`. `settings` are any keys of a
    configuration: `{"plan.round_to": 8, "refit.layers": "consumers"}`.

    Raises `DataError` where the images are no such tensors, `UsageError` or `UnknownName` for
    settings that don't exist, and `SecateurError` where the network can't be followed.
    """
    probe, labels = _collected(images, max_images, "images")
    given = len(probe)
    config = _config(model, probe, target, criterion, concepts, epochs, seed, settings or {})
    original = model
    if device_of(model).type != "cpu":
        original = copy.deepcopy(model).cpu()
    scored, scored_labels = (None, None) if test is None else _collected(test, None, "test")
    if scored is None:
        is_test = torch.arange(len(probe)) % HELD_OUT == HELD_OUT - 1
        scored, probe = probe[is_test], probe[~is_test]
        if labels is not None:
            scored_labels, labels = labels[is_test], labels[~is_test]
    has_labels = labels is not None and scored_labels is not None
    if labels is None or scored_labels is None:
        size = config.data.batch_size
        labels, scored_labels = _answers(original, probe, size), _answers(original, scored, size)
    is_validation = torch.arange(len(probe)) % FOR_CHOICE == FOR_CHOICE - 1
    if not len(scored) or not is_validation.any():
        held_out = HELD_OUT if test is None else given + 1
        least = next(n for n in itertools.count(FOR_CHOICE) if n - n // held_out >= FOR_CHOICE)
        raise DataError(f"{given} images are too few: give at least {least}")
    everything = NormalisedImages(probe, labels)
    dataset = DataSet(
        name=SOURCE,
        class_names=tuple(class_names),
        train=everything.take((~is_validation).nonzero()[:, 0]),
        validation=everything.take(is_validation.nonzero()[:, 0]),
        test=NormalisedImages(scored, scored_labels),
    )
    pruned = pipeline.prune(
        original, dataset, config, progress=progress_bars if progress else no_progress
    )
    return PruneResult(
        model=copy.deepcopy(pruned.model).to(device_of(model)).eval(),
        plan=pruned.plan,
        scores={stage.stage: stage.score for stage in pruned.result.stages},
        result=pruned.result,
        has_labels=has_labels,
        _original=original,
        _dataset=dataset,
        _pruned=pruned,
        _shape=(probe.shape[1], probe.shape[2], probe.shape[3]),
    )


def _config(
    model: nn.Module,
    probe: Tensor,
    target: str,
    criterion: str,
    concepts: str,
    epochs: int,
    seed: int,
    settings: Mapping[str, Any],
) -> RunConfig:
    """The configuration of a run on a network and images that have no name."""
    criteria.check_name(criterion)
    tables: dict[str, Any] = {
        "model": {"name": f"{zoo.IN_MEMORY}:{type(model).__name__}"},
        "data": {
            "source": SOURCE,
            "stratified": False,
            "image_size": min(probe.shape[2:]),
            "calibration_images": len(probe),
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
        raise UsageError("randaugment and crop = 'resized' change images in files, not tensors")
    return config


def _collected(
    batches: ImageBatches, most: int | None, name: str
) -> tuple[Tensor, Int[Tensor, "image"] | None]:
    """The first images of an iterable in one tensor, and their labels where each batch has them."""
    found: list[Tensor] = []
    labels: list[Tensor] = []
    count = 0
    for batch in cast("Iterable[Any]", batches):  # a Dataset, by its numbers
        pixels, own = batch if _is_pair(batch) else (_only(batch), None)
        pixels = _checked(pixels, name)
        if found and pixels.shape[1:] != found[0].shape[1:]:
            raise DataError(
                f"{name}: tensors {list(found[0].shape[1:])} and {list(pixels.shape[1:])} of one "
                "image each: all must have one size"
            )
        found.append(pixels.detach().cpu().float())
        if own is not None:
            labels.append(torch.as_tensor(own).detach().cpu().reshape(-1).long())
            if len(labels[-1]) != len(pixels):
                raise DataError(f"{name}: {len(pixels)} images with {len(labels[-1])} labels")
        count += len(pixels)
        if most is not None and count >= most:
            break
    if not found:
        raise DataError(f"{name}: there are none")
    if labels and len(labels) < len(found):
        raise DataError(f"{name}: some come with labels and some without")
    together = torch.cat(found)[:most]
    return together, torch.cat(labels)[:most] if labels else None


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, tuple | list) and len(batch) == 2


def _only(batch: Any) -> Any:
    return batch[0] if isinstance(batch, tuple | list) and len(batch) == 1 else batch


def _checked(pixels: Any, name: str) -> Tensor:
    if not isinstance(pixels, Tensor):
        raise DataError(
            f"{name}: {type(pixels).__name__} found where a tensor [image, channel, height, width] "
            "is needed; with a Dataset, its transform must end in a tensor"
        )
    batch: Tensor = pixels[None] if pixels.ndim == 3 else pixels
    if batch.ndim != 4 or not batch.is_floating_point():
        raise DataError(
            f"{name}: a tensor {list(batch.shape)} of {batch.dtype} found where a floating one "
            "[image, channel, height, width] is needed, as the network takes it"
        )
    if not bool(batch.isfinite().all()):
        raise DataError(f"{name}: an image holds a number that is not finite")
    return batch


def _answers(model: nn.Module, images: Tensor, batch_size: int) -> Int[Tensor, "image"]:
    """The class that the network itself gives each image."""
    found: list[Tensor] = []
    with evaluating(model), torch.no_grad():
        for some in images.split(batch_size):
            found.append(compute_logits(model, some).argmax(1))
    return torch.cat(found)


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
