"""Evaluate a network, or a run's pruned network beside its original, on the test images."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from secateur.config import EngineName, RunConfig
from secateur.data import DataSet
from secateur.engines.latency import latency_in
from secateur.engines.registry import find_engine
from secateur.experiments.run_folder import load_pruned, read_origin, read_plan
from secateur.experiments.user_code_keys import check_named
from secateur.graph.module_state import tensors_of
from secateur.models import user_code
from secateur.models.evaluate import Predictions, evaluate, evaluate_and_predict
from secateur.models.metrics import MetricFactory
from secateur.models.plausibility import find_doubt_about
from secateur.models.score import Score
from secateur.models.task import Task
from secateur.pipeline.inputs import (
    check_weights,
    describe_inputs,
    load_data,
    load_inputs,
    make_reader,
    resolve_config,
)
from secateur.pipeline.run_context import RunContext
from secateur.pipeline.task import EXAMPLE_IMAGES, metric_of, output_parts, task_of, with_metric
from secateur.runtime import distributed
from secateur.runtime.device import find_device
from secateur.runtime.errors import SecateurError, UsageError
from secateur.runtime.hashing import weights_hash


@dataclass(frozen=True)
class Evaluation:
    """What `secateur evaluate` shows."""

    score: Score
    task: Task
    engine: EngineName
    """What the latency was measured in."""
    notes: tuple[str, ...]
    unreadable: tuple[str, ...] | None
    """Image files that were left out; None if none may be."""


def evaluate_network(config: RunConfig, run_context: RunContext) -> Evaluation:
    """Score the network that `config` names; raises `SecateurError`."""
    check_weights(config)
    dataset, network = load_inputs(config)
    asked, config = config, resolve_config(config, dataset, network)
    run_context = run_context.collecting_unreadable(config)
    task, metric = task_and_metric(network, network, dataset, config, run_context)
    batches = make_reader(config, run_context).read_shard(dataset.test, "scoring")
    score, predictions = evaluate_and_predict(network, batches, task=task, metric=metric)
    score = _timed(score, network, dataset, config, run_context)
    doubt = find_doubt_about(predictions, task, has_labels=dataset.has_labels)
    notes = (*describe_inputs(asked, config, dataset), *dataset.notes, *task.notes)
    if doubt is not None:
        notes = (*notes, doubt.note())
    return Evaluation(score, task, config.plan.engine, notes, _unreadable(run_context))


def evaluate_run(
    run: Path, config: RunConfig, run_context: RunContext, named: Collection[str] = ()
) -> Evaluation:
    """Score the pruned network of a run folder, and its agreement with the original.

    `config` is the run's configuration, with the data where they are now, and `named` are the keys
    in it that the user has set: what is user code is not run otherwise. Agreement is not known if
    the original can't be loaded; a note says why. Raises `SecateurError`.
    """
    if "data.keep_classes" in named:
        raise UsageError(
            "a run's classes are those that it was pruned for: leave data.keep_classes out, or "
            "name the unpruned network with --model"
        )
    check_named(run, config, {*named, "model.name", "model.forward"})
    network = load_pruned(run).to(find_device(config.model.device))
    kept = read_origin(run).kept_classes
    before, notes = _load_original(run, config, named)
    dataset = load_data(config, network, kept)
    original = None
    if before is not None:
        its_data, original = before
        if kept is not None and not dataset.has_labels:
            dataset = its_data  # the images that the original network takes for kept classes
    config = resolve_config(config, dataset, network)
    run_context = run_context.collecting_unreadable(config)
    reader = make_reader(config, run_context)
    task, metric = task_and_metric(network, original or network, dataset, config, run_context)
    predictions: Predictions | None = None
    if original is not None:
        batches = reader.read_shard(dataset.test, "scoring the original")
        _, predictions = evaluate_and_predict(original, batches, task=task, known_ms=0.0)
    batches = reader.read_shard(dataset.test, "scoring")
    score = evaluate(network, batches, task=task, metric=metric, original=predictions)
    score = _timed(score, network, dataset, config, run_context)
    return Evaluation(
        score,
        task,
        config.plan.engine,
        (*dataset.notes, *task.notes, *notes),
        _unreadable(run_context),
    )


def _load_original(
    run: Path, config: RunConfig, named: Collection[str]
) -> tuple[tuple[DataSet, nn.Module] | None, tuple[str, ...]]:
    """Return the data and the network before a run, or None and a note that says why not."""
    unknown = "Agreement with the original network is not known:"
    if user_code.is_user_code(config.model.name):
        return None, (f"{unknown} its code, {config.model.name}, is not run here.",)
    forward = config.model.forward
    if forward is not None and "model.forward" not in named:
        return None, (f"{unknown} its function is not run unless named, --forward {forward}.",)
    try:
        dataset, original = load_inputs(config)
    except SecateurError as error:
        return None, (f"{unknown} {error}.",)
    if read_plan(run).weights not in (None, weights_hash(tensors_of(original))):
        return None, (f"{unknown} {config.model.weights} holds other weights now.",)
    return (dataset, original), ()


def task_and_metric(
    network: nn.Module,
    original: nn.Module,
    dataset: DataSet,
    config: RunConfig,
    run_context: RunContext,
) -> tuple[Task, MetricFactory | None]:
    """Return the task of a network on a data set, and how its metric is computed."""
    reader = make_reader(config, run_context)
    example = reader.read_first(dataset.test, EXAMPLE_IMAGES)
    parts = output_parts(config, run_context)
    task = task_of(original, dataset, config, reader, example, parts)
    metric = metric_of(task, dataset, config, original, run_context)
    return with_metric(task, metric), metric


def _timed(
    score: Score,
    network: nn.Module,
    dataset: DataSet,
    config: RunConfig,
    run_context: RunContext,
) -> Score:
    """Return a score with the latency in the engine that the configuration names."""
    if config.plan.engine == "pytorch":
        return score
    example = make_reader(config, run_context).read_first(dataset.test, EXAMPLE_IMAGES)
    engine = find_engine(config.plan.engine)
    milliseconds, batch = distributed.on_main_process(lambda: latency_in(engine, network, example))
    return replace(score, latency_ms=milliseconds, latency_batch=batch)


def _unreadable(run_context: RunContext) -> tuple[str, ...] | None:
    return None if run_context.unreadable is None else run_context.unreadable_files
