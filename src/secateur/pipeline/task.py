"""What a network is for, and how good it is at that, as the configuration and the data say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from secateur.config import RunConfig
from secateur.data import DataSet
from secateur.data.batch_reader import BatchReader
from secateur.data.detections import Decoder
from secateur.data.images_with_objects import ImagesWithObjects
from secateur.graph.output_values import OutputPart
from secateur.models import libraries
from secateur.models.examine import find_task
from secateur.models.metrics import MetricFactory
from secateur.models.metrics.by_name import MetricInputs, find_metric
from secateur.models.metrics.decoders import user_decoder
from secateur.models.metrics.user_function import UserMetric
from secateur.models.task import Task
from secateur.pipeline.run_context import RunContext
from secateur.runtime.errors import DataError

EXAMPLE_IMAGES = 8
"""Images that a network is tried on."""


def task_of(
    model: nn.Module,
    dataset: DataSet,
    config: RunConfig,
    reader: BatchReader,
    example: Tensor,
    parts: Sequence[OutputPart] = (),
) -> Task:
    """Return what the network's outputs for a few images and the labels mean.

    Raises `UsageError`, `DataError` or `NotFiniteError` where they don't go together.
    """
    kind = config.model.task
    if kind == "auto" and dataset.kind == "objects":
        kind = "detection"
    labels: tuple[Tensor, ...] = dataset.all_labels
    if dataset.kind in ("masks", "values"):
        labels = (_first_labels(dataset, reader),)
    return find_task(
        model,
        example,
        labels,
        kind,
        parts=parts,
        has_labels=dataset.kind != "none",
    )


def output_parts(
    config: RunConfig, run_context: RunContext | None = None
) -> tuple[OutputPart, ...]:
    """Return what is compared of the outputs, as the user or the network's library says."""
    if run_context is not None and run_context.outputs:
        return run_context.outputs
    name = config.model.name
    return libraries.output_parts(name) if libraries.is_library(name) else ()


def metric_of(
    task: Task,
    dataset: DataSet,
    config: RunConfig,
    original: nn.Module,
    run_context: RunContext | None = None,
) -> MetricFactory | None:
    """Return what makes the metric that networks are scored by; None: accuracy, or R² of values.

    Without labels outputs are compared with those of the `original` network. Raises `UsageError`,
    or `UnknownName` if there is no such metric.
    """
    passed = None if run_context is None else run_context.metric
    if passed is not None:
        return partial(UserMetric, passed)
    return find_metric(
        config.model.metric,
        MetricInputs(
            task,
            dataset.class_names,
            _decoder(config, original),
            None if task.has_labels else original,
        ),
    )


def validation_metric_of(
    task: Task,
    dataset: DataSet,
    config: RunConfig,
    original: nn.Module,
    run_context: RunContext | None = None,
) -> MetricFactory | None:
    """Return `metric_of` for the validation images, which come from those to train on.

    Where these have no annotated objects, as a detector's need not, those that the `original`
    network finds take their place.
    """
    if dataset.kind == "objects" and not isinstance(dataset.validation, ImagesWithObjects):
        task = replace(task, has_labels=False)
    return metric_of(task, dataset, config, original, run_context)


def with_metric(task: Task, metric: MetricFactory | None) -> Task:
    """Return the task with the name and unit of the metric that it is scored by."""
    if metric is None:
        return task
    made = metric()
    return replace(task, metric_name=made.name, metric_unit=made.unit)


def _decoder(config: RunConfig, original: nn.Module) -> Decoder | None:
    """Return what makes boxes of the network's outputs, if anything does."""
    if config.model.decoder is not None:
        return user_decoder(config.model.decoder)
    name = config.model.name
    return libraries.decoder(name, original) if libraries.is_library(name) else None


def _first_labels(dataset: DataSet, reader: BatchReader) -> Tensor:
    """Return the labels of a few test images, as they are read for this network."""
    few = dataset.test.take(torch.arange(min(EXAMPLE_IMAGES, len(dataset.test.labels))))
    batch = next(iter(reader.read(few)), None)
    if batch is None:
        raise DataError(f"none of the first {EXAMPLE_IMAGES} test images can be read")
    return batch.labels
