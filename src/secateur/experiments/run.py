"""Runs in folders: written when the network is cut, trained further there, gone on with.

A run folder is whole at any moment: see `bundle` for its files. While its network is fine-tuned it
also holds the checkpoints of the training.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from secateur.config import RunConfig, from_dict, to_toml
from secateur.data import DataSet
from secateur.errors import RunFolderError, UsageError
from secateur.experiments import run_folder
from secateur.experiments.compare.results import read_rows
from secateur.experiments.compare.statistics import compute_statistics
from secateur.experiments.manifest import CONFIG
from secateur.experiments.report.benchmark import ROWS
from secateur.experiments.report.gallery import make_gallery
from secateur.experiments.report.page import write_report
from secateur.integrations.tensorboard import open_log
from secateur.models import user_code
from secateur.pipeline import prune as pipeline
from secateur.pipeline.prune import Pruned
from secateur.pipeline.result import (
    FREE_KEYS,
    IDLE_KEYS,
    RESULT,
    Origin,
    RunResult,
    check_same,
    comparable,
    read_result,
)
from secateur.pruning.cost.latency_model import LatencyTable
from secateur.runtime import distributed
from secateur.runtime.atomic_io import check_replaceable, make_inner_folder, replace_file
from secateur.runtime.event_log import EventLog
from secateur.runtime.file_lock import lock_exclusively, lock_folder
from secateur.runtime.hashing import weights_hash
from secateur.runtime.input_limits import TEXT, read_bounded
from secateur.runtime.module_state import tensors_of
from secateur.runtime.progress import ProgressCallback, no_progress
from secateur.training.checkpoint import Checkpoints


def run(
    config: RunConfig,
    folder: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    allow_untrained: bool = False,
    progress: ProgressCallback = no_progress,
    board: Path | None = None,
    command: str | None = None,
) -> RunResult:
    """Prunes the network that `config` names and leaves a run folder; see `bundle` for its files.

    The folder is there as soon as the network is cut and repaired, and again when it has been
    fine-tuned; in between it holds the checkpoints of the training. `resume` goes on from what an
    interrupted run with the same configuration has left there, which may be nothing. `board` is a
    folder for TensorBoard. Raises `SecateurError`, and then leaves what the folder held last; where
    another run is at work there, too.
    """
    pipeline.check_names(config)
    pipeline.check_weights(config, allow_untrained=allow_untrained)
    with lock_folder(folder):
        check_replaceable(folder)
        if not (resume and run_folder.is_run(folder)):
            run_folder.check_free(folder, overwrite=overwrite)
            dataset, model = pipeline.load_inputs(config)
            with _new_run_folder(folder, overwrite=overwrite) as new:
                log = _log(new, board)
                log.write("start", command=command, config=config.model_dump(mode="json"))
                pruned = pipeline.cut(
                    model, dataset, config, progress=progress, log=log, command=command
                )
                _write(new, pruned, log)
        else:
            dataset, model = pipeline.load_inputs(config)
            pruned = _read(folder, model, pipeline.resolved(config, dataset))
        while not pruned.is_finished:
            if not pruned.is_finetuned:
                pruned = _finetune_folder(folder, folder, pruned, model, dataset, progress, board)
                continue
            log = _log(folder)
            pruned = pipeline.cut(
                model,
                dataset,
                pruned.result.config,
                earlier=pruned,
                progress=progress,
                log=log,
                command=command,
            )
            _renew(folder, folder, pruned, overwrite=True)
        _report(folder, pruned, model, dataset, progress)
        return pruned.result


def finetune(
    folder: Path,
    out: Path,
    changes: Mapping[str, object],
    *,
    model_name: str | None = None,
    source: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: ProgressCallback = no_progress,
    board: Path | None = None,
    command: str | None = None,
) -> RunResult:
    """Fine-tunes the network of a run folder, with the network before the cut as its teacher.

    The result is a run folder `out`, which may be `folder`; `changes` are to the `finetune` section
    of the run's configuration, `source` is where its data is now, and `model_name` what its network
    is called now: needed where that is code of your own. With `resume` it goes on from
    the checkpoints that an interrupted call with the same changes has left in `folder`. `board` is
    a folder for TensorBoard. Raises `SecateurError`, and then leaves what was there.
    """
    with contextlib.ExitStack() as held:
        for each in dict.fromkeys((folder, out)):
            held.enter_context(lock_folder(each))
        check_replaceable(out)
        if out != folder:
            run_folder.check_free(out, overwrite=overwrite)
        result = read_result(folder)
        sections = _sections(folder, result, model_name, source)
        sections["finetune"] = {**sections["finetune"], **changes}
        config = from_dict(sections, RunConfig)
        if config.finetune.epochs == 0:
            raise UsageError("there is nothing to do in 0 epochs: --epochs")
        dataset, model = pipeline.load_inputs(config)
        if resume and out == folder and _is_finetuned(folder, result, config):
            tuned = _load(folder, model, result)
            _report(folder, tuned, model, dataset, progress)
            return tuned.result
        pruned = _load(folder, model, result.model_copy(update={"config": config, "tuning": None}))
        _log(folder, board).write("finetune", command=command, changes=dict(changes))
        if not resume and distributed.is_main_process():
            shutil.rmtree(folder / run_folder.CHECKPOINTS, ignore_errors=True)
        distributed.barrier()
        tuned = _finetune_folder(
            folder, out, pruned, model, dataset, progress, board, overwrite=overwrite
        )
        _report(out, tuned, model, dataset, progress)
        return tuned.result


def report(
    folder: Path,
    *,
    model_name: str | None = None,
    source: str | None = None,
    images: int | None = None,
    beside: Path | None = None,
    pictures: Path | None = None,
    progress: ProgressCallback = no_progress,
) -> tuple[Path, ...]:
    """Writes the report of a run folder anew, or its charts as PNG files; returns what it wrote.

    `model_name` and `source` are as for `finetune`; `images` how many calibration images its
    filters are looked at with (0: none, and no data is needed); `beside` the folder of a comparison
    to draw beside the run; `pictures` a folder for the charts, made new if need be, and no symbolic
    link. Raises `SecateurError`.
    """
    result = read_result(folder)
    looks = result.config.report.images if images is None else images
    sections = _sections(folder, result, model_name, source, runs_code=looks > 0)
    sections["report"]["images"] = looks
    config = from_dict(sections, RunConfig)
    result = result.model_copy(update={"config": config})
    standing = None
    if beside is not None:
        rows = read_rows(beside / ROWS)
        standing = compute_statistics(rows, rows[0].method if rows else "")
    gallery = None
    if config.report.images:
        dataset, model = pipeline.load_inputs(config)
        pruned = _load(folder, model, result)
        gallery = make_gallery(
            model, pruned.model, dataset, result, progress, dependencies=pruned.dependencies
        )
    if not distributed.is_main_process():
        return ()
    if pictures is None:
        write_report(result, folder / run_folder.REPORT, gallery, standing)
        return (folder / run_folder.REPORT,)
    from secateur.experiments.report.run_charts import run_charts  # takes a second to import

    make_inner_folder(pictures)
    return tuple(chart.write_png(pictures) for chart in run_charts(result, gallery, standing))


def _is_finetuned(folder: Path, result: RunResult, config: RunConfig) -> bool:
    """Whether an interrupted fine-tuning had come to its end, but for the report."""
    is_same = comparable(result.config) == comparable(config)
    return (
        is_same and result.finetuning is not None and not (folder / run_folder.CHECKPOINTS).is_dir()
    )


def _sections(
    folder: Path,
    result: RunResult,
    model_name: str | None,
    source: str | None,
    *,
    runs_code: bool = True,
) -> dict[str, Any]:
    """The configuration of a run, whose network and data may have other names now.

    Raises `UsageError` where the folder alone says which file with code is to be run.
    """
    sections = result.config.model_dump(mode="json", exclude_none=True)
    name = result.config.model.name
    if runs_code and model_name is None and user_code.is_user_code(name):
        raise UsageError(
            f"the run in {folder} is of a network from a file of code, {name}: if that is yours, "
            f"name it with --model {name}"
        )
    sections["model"]["name"] = model_name or name
    sections["data"]["source"] = source or sections["data"]["source"]
    return sections


def _report(
    folder: Path, pruned: Pruned, model: nn.Module, dataset: DataSet, progress: ProgressCallback
) -> None:
    """Writes the report of a run that has ended, with what its filters see."""
    dependencies = pruned.dependencies
    gallery = make_gallery(
        model, pruned.model, dataset, pruned.result, progress, dependencies=dependencies
    )
    if distributed.is_main_process():
        write_report(pruned.result, folder / run_folder.REPORT, gallery)


def _finetune_folder(
    folder: Path,
    out: Path,
    pruned: Pruned,
    model: nn.Module,
    dataset: DataSet,
    progress: ProgressCallback,
    board: Path | None,
    *,
    overwrite: bool = False,
) -> Pruned:
    """Fine-tunes the network of one run folder into another, which may be the same."""
    checkpoints = Checkpoints(folder / run_folder.CHECKPOINTS)
    log = _log(folder, board)
    tuned = pipeline.finetune(
        pruned, model, dataset, progress=progress, log=log, checkpoints=checkpoints
    )
    _renew(folder, out, tuned, overwrite=overwrite or out == folder)
    if out != folder and distributed.is_main_process():
        shutil.rmtree(folder / run_folder.CHECKPOINTS, ignore_errors=True)
    return tuned


def _renew(folder: Path, out: Path, pruned: Pruned, *, overwrite: bool) -> None:
    """Writes a run folder that goes on from another one, which it may replace."""
    with _new_run_folder(out, overwrite=overwrite) as new:
        log = folder / run_folder.LOG
        if new is not None and log.is_file() and not log.is_symlink():
            replace_file(new / run_folder.LOG, log.read_bytes())
        _write(new, pruned, _log(new))


@contextlib.contextmanager
def _new_run_folder(folder: Path, *, overwrite: bool) -> Iterator[Path | None]:
    """See `bundle.new_run_folder`; None but in the first process, which alone writes.

    All processes leave the block when the folder is there.
    """
    if distributed.is_main_process():
        with run_folder.new_run_folder(folder, overwrite=overwrite) as new:
            yield new
    else:
        yield None
    distributed.barrier()


def _log(folder: Path | None, board: Path | None = None) -> EventLog:
    """The log in a folder, written to by the first process alone."""
    if folder is None or not distributed.is_main_process():
        return EventLog(None)
    return open_log(folder / run_folder.LOG, board)


def save(folder: Path, pruned: Pruned, origin: Origin, *, overwrite: bool = False) -> None:
    """Leaves a run folder of what was pruned elsewhere; raises `RunFolderError`."""
    with lock_exclusively(folder), run_folder.new_run_folder(folder, overwrite=overwrite) as new:
        _write(new, pruned, _log(new), origin)


def _write(
    folder: Path | None, pruned: Pruned, log: EventLog, origin: Origin | None = None
) -> None:
    """Every file of a run but its log; `origin` is by default what the configuration names."""
    if folder is None:
        return
    config = pruned.result.config
    replace_file(folder / CONFIG, to_toml(config))
    manifest = run_folder.write(
        folder, pruned.model, pruned.plan, origin or pipeline.origin(config)
    )
    if manifest.no_program is not None:
        log.write("no_program", reason=manifest.no_program)
    text = pruned.result.model_dump_json(indent=1)
    replace_file(folder / RESULT, text + "\n")
    if pruned.latency is not None:
        replace_file(folder / run_folder.LATENCY, pruned.latency.to_json())
    write_report(pruned.result, folder / run_folder.REPORT)
    if pruned.is_finished:
        log.write("end")


def _read(folder: Path, model: nn.Module, config: RunConfig) -> Pruned:
    """What a run of the same configuration has left; raises `UsageError` where it was another."""
    result = read_result(folder)
    check_same(f"the run in {folder}", config, result.config, FREE_KEYS)
    config = pipeline.with_batches(config, result.config.data.batch_size)
    pruned = _load(folder, model, result.model_copy(update={"config": config}))
    if pruned.is_finished:
        check_same(f"the run in {folder}", config, result.config, IDLE_KEYS)
    return pruned


def _load(folder: Path, model: nn.Module, result: RunResult) -> Pruned:
    """The network of a run folder and all that belongs to it, with a result put in its place."""
    path = folder / run_folder.LATENCY
    latency: LatencyTable | None = None
    if path.is_file():
        latency = LatencyTable.from_json(
            read_bounded(path, TEXT, RunFolderError).decode("utf-8", "replace")
        )
    dependencies = run_folder.read_origin(folder).build_dependency_graph(model)
    smaller = run_folder.load(folder, architecture=model, dependencies=dependencies)
    plan = run_folder.read_plan(folder)
    if plan.weights not in (None, weights_hash(tensors_of(model))):
        raise RunFolderError(
            f"the run in {folder} was made from other weights than those that "
            f"{result.config.model.weights or result.config.model.name} gives now"
        )
    return Pruned(smaller, plan, result, latency, dependencies)
