"""Train a base network, to be pruned later, and keep its weights with their recipe."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import tomli_w
from torch import nn

from secateur.config import BaseConfig, from_dict, read_tables
from secateur.data import DataSet
from secateur.experiments.manifest import CONFIG, WEIGHTS
from secateur.experiments.run_folder import CHECKPOINTS, LOG, is_run
from secateur.graph.module_state import device_of
from secateur.models.evaluate import evaluate
from secateur.models.score import Score
from secateur.models.task import Task
from secateur.pipeline.inputs import (
    check_names,
    describe_inputs,
    load_inputs,
    make_reader,
    resolve_config,
)
from secateur.pipeline.result import check_same
from secateur.pipeline.run_context import RunContext
from secateur.pipeline.task import EXAMPLE_IMAGES, metric_of, output_parts, task_of, with_metric
from secateur.runtime import distributed, safetensors_io
from secateur.runtime.atomic_io import make_folder, replace_file
from secateur.runtime.environment import Environment, environment
from secateur.runtime.errors import NotFiniteLoss, RunFolderError, UsageError
from secateur.runtime.file_lock import lock_folder
from secateur.runtime.input_limits import TEXT, read_bounded
from secateur.runtime.schema import Record, parse_record
from secateur.training.checkpoint import Checkpoints
from secateur.training.outcome import KEYS_FREE_ON_RESUME, KEYS_WITHOUT_EFFECT, Epoch
from secateur.training.own_loss import check_name as check_loss
from secateur.training.own_loss import find_loss
from secateur.training.trainer import TrainingCallbacks, train
from secateur.training.training_data import TrainingData

RECIPE = "training.json"
SCHEMA_VERSION = 4
IDLE_KEYS = frozenset({"model.device", *(f"train.{name}" for name in KEYS_WITHOUT_EFFECT)})
"""Keys of a configuration that change no result."""
FREE_KEYS = IDLE_KEYS | {"data.batch_size", *(f"train.{name}" for name in KEYS_FREE_ON_RESUME)}
"""Keys that may differ when an unfinished training is resumed."""


class BaseResult(Record):
    """The content of `training.json`: how the weights were trained, and their score."""

    schema_version: int = SCHEMA_VERSION
    command: str | None
    config: BaseConfig
    environment: Environment
    class_names: tuple[str, ...]
    epochs: tuple[Epoch, ...]
    """With the metric on the validation images."""
    best_epoch: int
    """The first of the epochs that were best on the validation images."""
    ended: Literal["whole", "patience", "time"]
    seconds: float
    task: Task
    """How the network's outputs are read."""
    score: Score
    """On the test images, with the weights that were kept."""
    unreadable: tuple[str, ...] = ()
    """Image files that were left out because they can't be read."""
    notes: tuple[str, ...] = ()
    """What to know of the images and of how they were read."""


def train_base(
    config: BaseConfig,
    folder: Path,
    run_context: RunContext | None = None,
    *,
    resume: bool = False,
) -> BaseResult:
    """Train the network that `config` names, and leave its weights in a folder with their recipe.

    Training starts from the weights that `config` names, or from random ones. During training the
    folder holds the configuration, the log and the checkpoints that `resume` continues from; if
    training is complete `resume` returns its result. Raises `RunFolderError` if the folder is
    not empty and is not to be resumed, or holds a run, or another training writes there, and
    `UsageError` if the folder holds a training with another configuration.
    """
    run_context = run_context or RunContext()
    run_config = config.as_run()
    if run_config.data.keep_classes:
        raise UsageError(
            "data.keep_classes is for pruning: train on all classes, or on a folder with fewer"
        )
    check_names(run_config)
    check_loss(config.train.loss)
    with lock_folder(folder):
        _check_folder(folder, resume=resume)
        dataset, model = load_inputs(run_config, new_head=config.new_head)
        asked, run_config = run_config, resolve_config(run_config, dataset, model)
        notes = (*dataset.notes, *describe_inputs(asked, run_config, dataset))
        config = config.model_copy(update={"model": run_config.model, "data": run_config.data})
        if resume and (folder / RECIPE).is_file():
            return _read_finished(folder, config)
        if (folder / CONFIG).is_file():
            earlier = from_dict(read_tables(folder / CONFIG), BaseConfig)
            check_same(f"the training in {folder}", config, earlier, FREE_KEYS)
        run_context = run_context.collecting_unreadable(run_config)
        reader = make_reader(run_config, run_context)
        example = reader.read_first(dataset.train, EXAMPLE_IMAGES)
        parts = output_parts(run_config, run_context)
        task = task_of(model, dataset, run_config, reader, example, parts)
        distributed.barrier()  # until all have looked at the folder
        make_folder(folder)
        run_context = run_context.logging_to(folder / LOG)
        run_context.log.write(
            "start", command=run_context.command, config=config.model_dump(mode="json")
        )
        if distributed.is_main_process():
            text = tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
            replace_file(folder / CONFIG, text)
        result = _train(config, model, dataset, folder, run_context, task)
        result = result.model_copy(update={"notes": notes})
        if distributed.is_main_process():
            replace_file(folder / WEIGHTS, safetensors_io.to_bytes(model.state_dict()))
            replace_file(folder / RECIPE, result.model_dump_json(indent=1) + "\n")
            _remove_checkpoints(folder)
        run_context.log.write("end")
        distributed.barrier()
        return result


def _check_folder(folder: Path, *, resume: bool) -> None:
    """Raise `RunFolderError` if a training can't be in the folder."""
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file, not a folder for weights")
    if not resume and folder.is_dir() and any(folder.iterdir()):
        raise RunFolderError(f"{folder} is not empty: choose another folder or add --resume")
    if is_run(folder):
        raise RunFolderError(f"{folder} holds a run, not a base network: choose another folder")


def _train(
    config: BaseConfig,
    model: nn.Module,
    dataset: DataSet,
    folder: Path,
    run_context: RunContext,
    task: Task,
) -> BaseResult:
    """Train the network in place and score it on the test images."""
    reader = make_reader(config.as_run(), run_context)
    metric = metric_of(task, dataset, config.as_run(), model, run_context)
    task = with_metric(task, metric)

    def validate(network: nn.Module) -> float:
        batches = reader.read_shard(dataset.validation, "validating")
        return evaluate(network, batches, task=task, metric=metric, known_ms=0.0).metric

    try:
        training = train(
            model,
            None,
            TrainingData(
                dataset.train,
                reader.preprocessing,
                reader.unreadable,
                task,
                find_loss(config.train.loss),
            ),
            config.train,
            seed=config.seed,
            callbacks=TrainingCallbacks(
                run_context.progress,
                validate,
                lambda epoch: run_context.log.write("epoch", **asdict(epoch)),
                run_context.lines,
                task.describe,
            ),
            checkpoints=Checkpoints(folder / CHECKPOINTS),
        )
    except NotFiniteLoss as error:
        raise NotFiniteLoss(
            f"{error}; {folder} holds no weights: train in another folder with --learning-rate "
            f"{config.train.learning_rate / 10:g}"
        ) from error
    batches = reader.read_shard(dataset.test, "scoring")
    score = evaluate(model, batches, task=task, metric=metric)
    return BaseResult(
        command=run_context.command,
        config=config,
        environment=environment(device_of(model)),
        class_names=dataset.class_names,
        epochs=training.epochs,
        best_epoch=training.best_epoch,
        ended=training.ended,
        seconds=training.seconds,
        task=task,
        score=score,
        unreadable=run_context.unreadable_files,
    )


def _read_finished(folder: Path, config: BaseConfig) -> BaseResult:
    """Read the result of the training in a folder; its recipe is the last file written."""
    text = read_bounded(folder / RECIPE, TEXT, RunFolderError)
    result = parse_record(BaseResult, text, SCHEMA_VERSION, RECIPE)
    check_same(f"the training in {folder}", config, result.config, IDLE_KEYS)
    if distributed.is_main_process():
        _remove_checkpoints(folder)
    return result


def _remove_checkpoints(folder: Path) -> None:
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
