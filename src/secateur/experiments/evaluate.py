"""Evaluate a network, or a run's pruned network beside its original, on the test images."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from secateur.config import EngineName, RunConfig
from secateur.data import DataSet
from secateur.engines.registry import find_engine
from secateur.experiments.engine_times import engine_time
from secateur.experiments.original import load_original
from secateur.experiments.run_folder import load_pruned, read_origin
from secateur.experiments.user_code_keys import check_named
from secateur.graph.module_state import as_input, evaluating
from secateur.models.evaluate import LATENCY_ROUNDS, Predictions, evaluate, evaluate_and_predict
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
from secateur.pipeline.result import RESULT, read_result
from secateur.pipeline.run_context import RunContext
from secateur.pipeline.task import EXAMPLE_IMAGES, metric_of, output_parts, task_of, with_metric
from secateur.pipeline.verdict import EngineTime
from secateur.runtime import distributed
from secateur.runtime.device import find_device
from secateur.runtime.errors import UsageError
from secateur.runtime.timing import batch_in_time, interleaved_medians


@dataclass(frozen=True)
class Evaluation:
    """What `secateur evaluate` shows."""

    score: Score
    task: Task
    engine: EngineName
    """What the latency was measured in."""
    original_ms: float | None
    """Latency of the original beside it, measured interleaved; None if it is not at hand."""
    notes: tuple[str, ...]
    unreadable: tuple[str, ...] | None
    """Image files that were left out; None if none may be."""

    @property
    def time(self) -> EngineTime:
        """The latency of the network, and of the original if it is at hand."""
        score = self.score
        return engine_time(self.engine, score.latency_batch, score.latency_ms, self.original_ms)


def evaluate_network(config: RunConfig, run_context: RunContext) -> Evaluation:
    """Score the network that `config` names; raises `SecateurError`."""
    check_weights(config)
    dataset, network = load_inputs(config)
    asked, config = config, resolve_config(config, dataset, network)
    run_context = run_context.collecting_unreadable(config)
    task, metric = task_and_metric(network, network, dataset, config, run_context)
    batches = make_reader(config, run_context).read_shard(dataset.test, "scoring")
    score, predictions = evaluate_and_predict(network, batches, task=task, metric=metric)
    if config.plan.engine != "pytorch":
        score, _ = _timed(score, {"network": network}, dataset, config, run_context)
    doubt = find_doubt_about(predictions, task, has_labels=dataset.has_labels)
    notes = (*describe_inputs(asked, config, dataset), *dataset.notes, *task.notes)
    if doubt is not None:
        notes = (*notes, doubt.note())
    return Evaluation(score, task, config.plan.engine, None, notes, _unreadable(run_context))


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
    before, unknown = load_original(run, config, named)
    network = load_pruned(run).to(find_device(config.model.device))
    kept = read_origin(run).kept_classes
    notes = (f"Agreement with the original network is not known: {unknown}.",) if unknown else ()
    dataset = load_data_for(run, config, network)
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
    score = evaluate(network, batches, task=task, metric=metric, original=predictions, known_ms=0.0)
    networks = {"network": network} | ({} if original is None else {"original": original})
    score, original_ms = _timed(score, networks, dataset, config, run_context)
    return Evaluation(
        score,
        task,
        config.plan.engine,
        original_ms,
        (*dataset.notes, *task.notes, *notes),
        _unreadable(run_context),
    )


def load_data_for(run: Path, config: RunConfig, network: nn.Module) -> DataSet:
    """Load the data that `config` names, as the pruned network of a run takes them.

    Raises `DataError` if they have other classes than the run's; see `compare_classes`.
    """
    names = read_result(run).class_names if (run / RESULT).is_file() else ()
    return load_data(config, network, names, read_origin(run).kept_classes)


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
    networks: Mapping[str, nn.Module],
    dataset: DataSet,
    config: RunConfig,
    run_context: RunContext,
) -> tuple[Score, float | None]:
    """Return a score with the latency of `network`, and that of `original` if it is there.

    Both are measured interleaved, in the engine that the configuration names.
    """
    example = make_reader(config, run_context).read_first(dataset.test, EXAMPLE_IMAGES)
    example = as_input(networks["network"], example)
    engine = find_engine(config.plan.engine)

    def measure() -> tuple[dict[str, float], int]:
        with contextlib.ExitStack() as stack:
            for network in networks.values():
                stack.enter_context(evaluating(network))
            stack.enter_context(torch.inference_mode())
            batch = batch_in_time(networks["network"], example)
            actions = {name: engine.prepare(network, batch) for name, network in networks.items()}
            return interleaved_medians(actions, LATENCY_ROUNDS), len(batch)

    medians, batch = distributed.on_main_process(measure)
    score = replace(score, latency_ms=medians["network"], latency_batch=batch)
    return score, medians.get("original")


def _unreadable(run_context: RunContext) -> tuple[str, ...] | None:
    return None if run_context.unreadable is None else run_context.unreadable_files
