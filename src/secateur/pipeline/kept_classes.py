"""Runs that keep some classes: the head is cut, and the images that show other classes go."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from secateur.config import RunConfig
from secateur.data import DataSet, Images, draw_calibration_images
from secateur.data.batch_reader import BatchReader
from secateur.data.folder_layout import brief
from secateur.data.images import IGNORED
from secateur.data.kept_classes import KeptClasses, find_classes
from secateur.graph.module_state import device_of
from secateur.models.evaluate import read_outputs
from secateur.models.examine import FIRST_IMAGES, examine_outputs, make_task
from secateur.models.task import Task
from secateur.pruning.head import keep_classes
from secateur.runtime.errors import UsageError

LOOKED_AT = 10
"""Without labels, at most so many times the calibration images are looked through for them."""
_NOT_CLASSES = ("objects", "values")
_ONE_OUTPUT = ("detection", "regression", "binary")


def cut_to_classes(
    dataset: DataSet, model: nn.Module, config: RunConfig, reader: BatchReader
) -> tuple[DataSet, nn.Module]:
    """Return the images and the network with only the classes that `config` keeps.

    Both stay as they are if it names none. Images are chosen by their labels; without labels by
    the network's predictions. Raises `UnknownName`, `UsageError` or `DataError` where that can't be
    done, and `CutError` if the cut head computes something else.
    """
    if not config.data.keep_classes:
        return dataset, model
    if dataset.kind in _NOT_CLASSES or config.model.task in _ONE_OUTPUT:
        what = dataset.kind if dataset.kind in _NOT_CLASSES else config.model.task
        raise UsageError(
            f"--keep-classes cuts the head of a classifier or a segmentation network, not of one "
            f"for {what}: leave it out"
        )
    example = reader.read_first(dataset.train, FIRST_IMAGES)
    outputs = examine_outputs(model, example)
    if outputs.form == "values" or outputs.columns < 2:
        raise UsageError(
            "--keep-classes found no classifier: the network returns no scores [image, class] or "
            "[image, class, height, width] of two or more classes"
        )
    kept = find_classes(config.data.keep_classes, dataset.class_names, outputs.columns)
    is_several = dataset.train.labels.ndim == 2 or outputs.scale == "sigmoid"
    least = 1 if is_several or config.model.task == "multi-label" else 2
    if len(kept.numbers) < least:
        raise UsageError(
            f"--keep-classes names one class only, {(*kept.names, *kept.numbers)[0]}: a classifier "
            f"needs {least} or more different ones to choose from"
        )
    smaller = keep_classes(model, example, kept.numbers)
    before, after = (sum(p.numel() for p in net.parameters()) for net in (model, smaller))
    names = brief(list(kept.names or map(str, kept.numbers)))
    note = (
        f"Of {kept.of} classes {len(kept.numbers)} are kept: {names}. The head was cut to them "
        f"first ({before:,} parameters before, {after:,} after), and scores, budgets and fractions "
        "count from there."
    )
    if dataset.kind == "none":
        task = make_task(outputs, (), config.model.task, has_labels=False)
        if task.kind == "single-label":
            dataset = _seen_as(kept, dataset, model, task, config, reader)
            note += " Without labels, images were chosen by what the network predicts for them."
    return replace(dataset.of_classes(kept), notes=(*dataset.notes, note)), smaller


def _seen_as(
    kept: KeptClasses,
    dataset: DataSet,
    model: nn.Module,
    task: Task,
    config: RunConfig,
    reader: BatchReader,
) -> DataSet:
    """Return the images that the network takes for one of the kept classes.

    Without fine-tuning a random sample of the training images is looked through; see `LOOKED_AT`.
    """
    reader = replace(reader, device=device_of(model))

    def chosen(images: Images, title: str) -> Images:
        places: list[Tensor] = []
        with torch.inference_mode():
            for batch in reader.read(images, title):
                classes = task.predict(read_outputs(model, batch.images, task)).cpu()
                places.append(batch.indices[kept.renumber(classes) != IGNORED])
        return images.take(torch.cat(places)) if places else images

    train = dataset.train
    if not config.finetune.epochs:
        count = LOOKED_AT * config.data.calibration_images
        train = draw_calibration_images(train, count, stratified=False, seed=config.seed)
    return replace(
        dataset,
        train=chosen(train, "choosing images"),
        validation=chosen(dataset.validation, ""),
        test=chosen(dataset.test, ""),
    )
