"""Trains a base network, to be pruned later, and keeps its weights with their recipe."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import tomli_w
from torch import nn

from secateur.config import (
    BaseConfig,
    from_dict,
    read_tables,
)
from secateur.errors import RunFolderError
from secateur.evaluation.evaluate import Score, evaluate
from secateur.experiments.manifest import CONFIG, WEIGHTS
from secateur.experiments.run_folder import CHECKPOINTS, LOG, is_run
from secateur.integrations.tensorboard import open_log
from secateur.pipeline.prune import (
    check_names,
    load_inputs,
    make_unreadable,
    names_of,
    preprocessing,
    resolved,
    stream,
)
from secateur.pipeline.result import check_same
from secateur.runtime import distributed, safetensors_io
from secateur.runtime.atomic_io import make_folder, replace_file
from secateur.runtime.environment import Environment, environment
from secateur.runtime.event_log import EventLog
from secateur.runtime.file_lock import lock_folder
from secateur.runtime.input_limits import TEXT, read_bounded
from secateur.runtime.progress import ProgressCallback, no_progress
from secateur.runtime.schema import Record, parse_record
from secateur.training.checkpoint import Checkpoints
from secateur.training.trainer import KEYS_FREE_ON_RESUME, KEYS_WITHOUT_EFFECT, Epoch, train

RECIPE = "training.json"
SCHEMA_VERSION = 2
IDLE_KEYS = frozenset(f"train.{name}" for name in KEYS_WITHOUT_EFFECT)
"""Keys of a configuration that change no result."""
FREE_KEYS = IDLE_KEYS | {"data.batch_size", *(f"train.{name}" for name in KEYS_FREE_ON_RESUME)}
"""Those that may differ where a training is resumed that has not come to its end."""


class BaseResult(Record):
    """What the weights of a base network come from, and what they are worth."""

    schema_version: int = SCHEMA_VERSION
    command: str | None
    config: BaseConfig
    environment: Environment
    class_names: tuple[str, ...]
    epochs: tuple[Epoch, ...]
    """With the top-1 fraction on the validation images."""
    best_epoch: int
    """The first of the epochs that were best on the validation images."""
    ended: Literal["whole", "patience", "time"]
    seconds: float
    score: Score
    """On the test images, of the weights that were kept."""
    unreadable: tuple[str, ...] = ()
    """Image files that were left out because they can't be read."""


def train_base(
    config: BaseConfig,
    folder: Path,
    *,
    resume: bool = False,
    progress: ProgressCallback = no_progress,
    board: Path | None = None,
    command: str | None = None,
) -> BaseResult:
    """Trains the network that `config` names and leaves its weights in a folder, with their recipe.

    It starts from the weights that `config` names, or from random ones. While it trains the folder
    holds the configuration, the log and the checkpoints that `resume` goes on from; where it has
    come to its end `resume` gives what it came to. `board` is a folder for TensorBoard. Raises
    `RunFolderError` where the folder is not empty and is not to be resumed, or holds a run, or
    another training is at work there, and `UsageError` where another configuration was begun there.
    """
    check_names(config.as_run())
    with lock_folder(folder):
        return _trained(config, folder, resume, progress, board, command)


def _trained(
    config: BaseConfig,
    folder: Path,
    resume: bool,
    progress: ProgressCallback,
    board: Path | None,
    command: str | None,
) -> BaseResult:
    """See `train_base`; the folder is held."""
    run = config.as_run()
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file, not a folder for weights")
    if not resume and folder.is_dir() and any(folder.iterdir()):
        raise RunFolderError(f"{folder} is not empty: choose another folder or add --resume")
    if is_run(folder):
        raise RunFolderError(f"{folder} holds a run, not a base network: choose another folder")
    dataset, model = load_inputs(run, new_head=config.new_head)
    run = resolved(run, dataset)
    config = config.model_copy(update={"model": run.model, "data": run.data})
    if resume and (folder / RECIPE).is_file():
        return _finished(folder, config)
    if (folder / CONFIG).is_file():
        begun = from_dict(read_tables(folder / CONFIG), BaseConfig)
        check_same(f"the training in {folder}", config, begun, FREE_KEYS)
    distributed.barrier()  # until all have looked at the folder
    make_folder(folder)
    is_first = distributed.is_main_process()
    log = open_log(folder / LOG, board) if is_first else EventLog(None)
    log.write("start", command=command, config=config.model_dump(mode="json"))
    if is_first:
        text = tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
        replace_file(folder / CONFIG, text)

    unreadable = make_unreadable(run)

    def validate(network: nn.Module) -> float:
        images = stream(dataset.validation, run, progress, "validating", unreadable)
        return evaluate(network, images).top1_fraction

    training = train(
        model,
        None,
        dataset.train,
        preprocessing(run),
        config.train,
        seed=config.seed,
        progress=progress,
        validate=validate,
        after_epoch=lambda epoch: log.write("epoch", **asdict(epoch)),
        checkpoints=Checkpoints(folder / CHECKPOINTS),
        unreadable=unreadable,
    )
    test = stream(dataset.test, run, progress, "scoring", unreadable)
    score = evaluate(model, test)
    result = BaseResult(
        command=command,
        config=config,
        environment=environment(),
        class_names=dataset.class_names,
        epochs=training.epochs,
        best_epoch=training.best_epoch,
        ended=training.ended,
        seconds=training.seconds,
        score=score,
        unreadable=names_of(unreadable),
    )
    if is_first:
        replace_file(folder / WEIGHTS, safetensors_io.to_bytes(model.state_dict()))
        replace_file(folder / RECIPE, result.model_dump_json(indent=1) + "\n")
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    log.write("end")
    distributed.barrier()
    return result


def _finished(folder: Path, config: BaseConfig) -> BaseResult:
    """What the training in a folder came to; the recipe is the last file that it writes."""
    text = read_bounded(folder / RECIPE, TEXT, RunFolderError)
    found = parse_record(BaseResult, text, SCHEMA_VERSION, RECIPE)
    check_same(f"the training in {folder}", config, found.config, IDLE_KEYS)
    if distributed.is_main_process():
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return found
