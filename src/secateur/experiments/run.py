"""Runs in folders: written when the network is cut, fine-tuned further there, and resumed.

A run folder is complete at any moment: see `run_folder` for its files. While its network is
fine-tuned it also holds the checkpoints of the training.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from secateur.config import USER_CODE_KEYS, RunConfig, from_dict, to_toml
from secateur.data import DataSet
from secateur.data.same_classes import compare_classes
from secateur.experiments import run_folder
from secateur.experiments.compare.results import read_rows
from secateur.experiments.compare.statistics import BenchmarkStatistics, compute_statistics
from secateur.experiments.engine_times import read_engine_times
from secateur.experiments.manifest import CONFIG, check_no_address, check_run_folder
from secateur.experiments.report.benchmark import ROWS
from secateur.experiments.report.gallery import Gallery, make_gallery
from secateur.experiments.report.page import write_report
from secateur.experiments.run_folder import Origin
from secateur.experiments.user_code_keys import check_loss_named, check_named
from secateur.graph.forward import inputs_of
from secateur.graph.module_state import tensors_of
from secateur.models.evaluate import evaluate_and_predict
from secateur.pipeline import prune as pipeline
from secateur.pipeline.estimate import REPORT_STAGE, Estimate, estimate, show_plan
from secateur.pipeline.inputs import (
    check_names,
    check_weights,
    load_inputs,
    make_reader,
    resolve_config,
)
from secateur.pipeline.pruned import Pruned
from secateur.pipeline.result import (
    FREE_KEYS,
    IDLE_KEYS,
    RESULT,
    RunResult,
    check_same,
    comparable,
    read_result,
    stage_title,
)
from secateur.pipeline.run_context import RunContext
from secateur.pruning.cost.latency_model import LatencyTable
from secateur.runtime import distributed
from secateur.runtime.atomic_io import check_replaceable, make_inner_folder, replace_file
from secateur.runtime.errors import NotFiniteLoss, RunFolderError, UsageError
from secateur.runtime.event_log import EventLog
from secateur.runtime.file_lock import lock_exclusively, lock_folder
from secateur.runtime.hashing import weights_hash
from secateur.runtime.input_limits import TEXT, read_bounded
from secateur.runtime.kept_memory import kept_memory
from secateur.training import own_loss


@kept_memory()
def run(
    config: RunConfig,
    folder: Path,
    run_context: RunContext | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> RunResult:
    """Prune the network that `config` names, and write a run folder; see `run_folder`.

    The folder is there as soon as the network is cut and refitted, and is replaced when it has been
    fine-tuned; in between it holds the checkpoints of the training. `resume` continues what an
    interrupted run with the same configuration has left there, if anything. Raises `SecateurError`,
    also if another run is writing to the folder; the folder then stays as it was.
    """
    run_context = run_context or RunContext()
    check_names(config)
    check_weights(config)
    with lock_folder(folder):
        check_replaceable(folder)
        is_resumed = resume and run_folder.is_run(folder)
        if not is_resumed:
            run_folder.check_free(folder, overwrite=overwrite)
        dataset, model = load_inputs(config, run_context=run_context)
        resolved_config = resolve_config(config, dataset, model)
        if is_resumed:
            pruned = _read_unfinished(folder, model, resolved_config)
            done = {stage_title(stage.stage, stage.round) for stage in pruned.result.stages}
            show_plan(run_context, model, dataset, resolved_config, lambda title: title not in done)
        else:
            show_plan(run_context, model, dataset, resolved_config)
            pruned = _begin(folder, model, dataset, config, run_context, overwrite=overwrite)
        run_context = run_context.logging_to(folder / run_folder.LOG)
        if not pruned.is_finished:
            pruned = _predict_test_images(pruned, model, dataset, run_context)
        while not pruned.is_finished:
            checkpoints = folder / run_folder.CHECKPOINTS
            with _saying_what_remains(folder, config):
                pruned = pipeline.take_next_step(pruned, model, dataset, run_context, checkpoints)
            _rewrite(folder, folder, pruned, overwrite=True)
        _report(folder, pruned, model, dataset, run_context)
        return pruned.result


def dry_run(config: RunConfig) -> Estimate:
    """Return how long the run that `config` asks for would take here, and how much memory.

    Nothing is written. Raises `SecateurError` where the run would before its first stage.
    """
    check_names(config)
    check_weights(config)
    dataset, model = load_inputs(config, is_estimate=True)
    return estimate(model, dataset, config)


def finetune(
    folder: Path,
    out: Path,
    changes: Mapping[str, object],
    run_context: RunContext | None = None,
    *,
    named: Mapping[str, str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> RunResult:
    """Fine-tune the network of a run folder, with the unpruned network as its teacher.

    The result is a run folder `out`, which may be `folder`. `changes` are to the `finetune` section
    of the run's configuration. `named` says what network, data and code are called now, by the keys
    of `USER_CODE_KEYS`; what is user code must be among them. `resume` continues from the
    checkpoints that an interrupted call with the same changes has left in `folder`. Raises
    `SecateurError`; the folders then stay as they were.
    """
    run_context = run_context or RunContext()
    check_no_address(folder)
    with contextlib.ExitStack() as locks:
        for path in dict.fromkeys((folder, out)):
            locks.enter_context(lock_folder(path))
        check_replaceable(out)
        if out != folder:
            run_folder.check_free(out, overwrite=overwrite)
        check_run_folder(folder)
        result = read_result(folder)
        sections = _sections(folder, result, named or {})
        sections["finetune"] = {**sections["finetune"], **changes}
        config = from_dict(sections, RunConfig)
        if "loss" not in changes:
            check_loss_named(folder, config)
        own_loss.check_name(config.finetune.loss)
        if config.finetune.epochs == 0:
            raise UsageError("there is nothing to do in 0 epochs: --epochs")
        dataset, model = _load_inputs(config, result, run_context)
        if resume and out == folder and _is_finetuned(folder, result, config):
            pruned = _load(folder, model, result)
        else:
            update = {"config": config, "finetuning": None}
            pruned = _load(folder, model, result.model_copy(update=update))
            pruned = _predict_test_images(pruned, model, dataset, run_context)
            ahead = (stage_title("finetuned", pruned.round), REPORT_STAGE)
            show_plan(run_context, model, dataset, config, lambda title: title in ahead)
            run_context = run_context.logging_to(folder / run_folder.LOG)
            run_context.log.write("finetune", command=run_context.command, changes=dict(changes))
            if not resume:
                _remove_checkpoints(folder)
            distributed.barrier()
            checkpoints = folder / run_folder.CHECKPOINTS
            with _saying_what_remains(folder, config):
                pruned = pipeline.finetune(pruned, model, dataset, run_context, checkpoints)
            _rewrite(folder, out, pruned, overwrite=overwrite or out == folder)
            if out != folder:
                _remove_checkpoints(folder)
        _report(out, pruned, model, dataset, run_context)
        return pruned.result


def report(
    folder: Path,
    run_context: RunContext | None = None,
    *,
    named: Mapping[str, str] | None = None,
    images: int | None = None,
    beside: Path | None = None,
    pictures: Path | None = None,
) -> tuple[Path, ...]:
    """Write the report of a run folder again, or its charts as PNG files; return the paths.

    `named` is as for `finetune`. `images` is how many calibration images filters
    are dissected with; 0 shows none and needs no data. `beside` is the folder of a benchmark that
    the run is drawn among. `pictures` is a folder for the charts, made if need be, and no symbolic
    link. Raises `SecateurError`.
    """
    run_context = run_context or RunContext()
    check_run_folder(folder)
    result = read_result(folder)
    count = result.config.report.images if images is None else images
    if count == 0:
        for key in named or {}:
            option = USER_CODE_KEYS.get(key, f"--{key.rpartition('.')[2].replace('_', '-')}")
            raise UsageError(f"{option} is for a report with images: add --images 512")
    sections = _sections(folder, result, named or {}, runs_code=count > 0)
    sections["report"]["images"] = count
    config = from_dict(sections, RunConfig)
    result = result.model_copy(update={"config": config})
    statistics: BenchmarkStatistics | None = None
    if beside is not None:
        if not (beside / ROWS).is_file():
            raise UsageError(f"no benchmark in {beside}: name a folder that secateur compare wrote")
        rows = read_rows(beside / ROWS)
        statistics = compute_statistics(rows, rows[0].method if rows else "")
    gallery: Gallery | None = None
    if config.report.images:
        dataset, model = _load_inputs(config, result, run_context)
        gallery = _gallery(_load(folder, model, result), model, dataset, run_context)
    if not distributed.is_main_process():
        return ()
    if pictures is None:
        times = read_engine_times(folder)
        write_report(result, folder / run_folder.REPORT, gallery, statistics, times)
        return (folder / run_folder.REPORT,)
    from secateur.experiments.report.run_charts import run_charts  # takes a second to import

    make_inner_folder(pictures)
    return tuple(chart.write_png(pictures) for chart in run_charts(result, gallery, statistics))


def save(folder: Path, pruned: Pruned, origin: Origin, *, overwrite: bool = False) -> None:
    """Write a run folder of a network that was pruned elsewhere; raise `RunFolderError`."""
    with lock_exclusively(folder), run_folder.new_run_folder(folder, overwrite=overwrite) as new:
        _write(new, pruned, EventLog(new / run_folder.LOG), origin)


def origin_of(pruned: Pruned) -> Origin:
    """Return the unpruned network as the configuration of a run names it."""
    graph = pruned.dependencies.graph
    shape = tuple(map(int, graph.image.meta["val"].shape[1:]))
    plan, model = pruned.result.config.plan, pruned.result.config.model
    return Origin(
        model.name,
        shape,
        plan.prune_residual,
        plan.exclude,
        model.num_classes,
        inputs=inputs_of(pruned.model),
        forward=model.forward,
        kept_classes=pruned.result.kept_classes,
        reparameterized=model.reparameterize,
    )


def _begin(
    folder: Path,
    model: nn.Module,
    dataset: DataSet,
    config: RunConfig,
    run_context: RunContext,
    *,
    overwrite: bool,
) -> Pruned:
    """Prune the first round and write its run folder."""
    with _new_run_folder(folder, overwrite=overwrite) as new:
        context = run_context.logging_to(new and new / run_folder.LOG)
        facts = {"command": context.command, "config": config.model_dump(mode="json")}
        context.log.write("start", **facts)
        pruned = pipeline.prune_round(model, dataset, config, context)
        if new is not None:
            _write(new, pruned, context.log, origin_of(pruned))
    return pruned


def _rewrite(folder: Path, out: Path, pruned: Pruned, *, overwrite: bool) -> None:
    """Write the run folder `out`, whose log continues that of `folder`; they may be the same.

    Times in engines are kept: training does not change them.
    """
    with _new_run_folder(out, overwrite=overwrite) as new:
        if new is None:
            return
        for name in (run_folder.LOG, run_folder.ENGINE_TIMES):
            if (folder / name).is_file() and not (folder / name).is_symlink():
                replace_file(new / name, (folder / name).read_bytes())
        origin = origin_of(pruned)
        _write(new, pruned, EventLog(new / run_folder.LOG), origin)


@contextlib.contextmanager
def _saying_what_remains(folder: Path, config: RunConfig) -> Iterator[None]:
    """If the training in the block diverges, say what the folder holds and how to continue."""
    try:
        yield
    except NotFiniteLoss as error:
        rate = config.finetune.learning_rate / 10
        raise NotFiniteLoss(
            f"{error}; {folder} holds the pruned network from before this training: secateur "
            f"finetune {folder} --learning-rate {rate:g}"
        ) from error


@contextlib.contextmanager
def _new_run_folder(folder: Path, *, overwrite: bool) -> Iterator[Path | None]:
    """Return `run_folder.new_run_folder` in the main process, which alone writes; else None.

    All processes leave the block when the folder is there.
    """
    if distributed.is_main_process():
        with run_folder.new_run_folder(folder, overwrite=overwrite) as new:
            yield new
    else:
        yield None
    distributed.barrier()


def _write(folder: Path, pruned: Pruned, log: EventLog, origin: Origin) -> None:
    """Write every file of a run except its log."""
    replace_file(folder / CONFIG, to_toml(pruned.result.config))
    manifest = run_folder.write(folder, pruned.model, pruned.plan, origin)
    if manifest.no_program is not None:
        log.write("no_program", reason=manifest.no_program)
    replace_file(folder / RESULT, pruned.result.model_dump_json(indent=1) + "\n")
    times = read_engine_times(folder)
    if pruned.latency is not None:
        replace_file(folder / run_folder.LATENCY, pruned.latency.to_json())
    write_report(pruned.result, folder / run_folder.REPORT, times=times)
    if pruned.is_finished:
        log.write("end")


def _report(
    folder: Path, pruned: Pruned, model: nn.Module, dataset: DataSet, run_context: RunContext
) -> None:
    """Write the report of a finished run, with what its filters respond to."""
    gallery = _gallery(pruned, model, dataset, run_context)
    if distributed.is_main_process():
        report, times = folder / run_folder.REPORT, read_engine_times(folder)
        write_report(pruned.result, report, gallery, times=times)
    run_context.lines.end_stage(REPORT_STAGE)


def _gallery(
    pruned: Pruned, model: nn.Module, dataset: DataSet, run_context: RunContext
) -> Gallery | None:
    return make_gallery(
        model,
        pruned.model,
        dataset,
        pruned.result,
        run_context.progress,
        dependencies=pruned.dependencies,
    )


def _remove_checkpoints(folder: Path) -> None:
    if distributed.is_main_process():
        shutil.rmtree(folder / run_folder.CHECKPOINTS, ignore_errors=True)


def _is_finetuned(folder: Path, result: RunResult, config: RunConfig) -> bool:
    """Return whether an interrupted fine-tuning was complete except for the report."""
    is_same = comparable(result.config) == comparable(config)
    has_checkpoints = (folder / run_folder.CHECKPOINTS).is_dir()
    return is_same and result.finetuning is not None and not has_checkpoints


def _sections(
    folder: Path, result: RunResult, named: Mapping[str, str], *, runs_code: bool = True
) -> dict[str, Any]:
    """Return the configuration of a run, of which network, data and code may have other names now.

    Raises `UsageError` if the folder alone says which file with code is to be run.
    """
    if runs_code:
        check_named(folder, result.config, named)
    sections = result.config.model_dump(mode="json", exclude_none=True)
    for key, name in named.items():
        section, _, last = key.partition(".")
        sections[section][last] = name
    return sections


def _load_inputs(
    config: RunConfig, result: RunResult, run_context: RunContext
) -> tuple[DataSet, nn.Module]:
    """Load what a run was made from; raises `DataError` if the data have other classes now."""
    dataset, model = load_inputs(config, run_context=run_context)
    names = result.class_names
    expected = dict(enumerate(names))
    note = compare_classes(config.data.source, dataset.class_names, expected, len(names))
    return replace(dataset, notes=(*dataset.notes, *filter(None, [note]))), model


def _read_unfinished(folder: Path, model: nn.Module, config: RunConfig) -> Pruned:
    """Load an unfinished result; raise `UsageError` if its configuration differs."""
    result = read_result(folder)
    place = f"the run in {folder}"
    check_same(place, config, result.config, FREE_KEYS)
    batch_size = min(config.data.batch_size, result.config.data.batch_size)
    data_section = config.data.model_copy(update={"batch_size": batch_size})
    config = config.model_copy(update={"data": data_section})
    pruned = _load(folder, model, result.model_copy(update={"config": config}))
    if pruned.is_finished:
        check_same(place, config, result.config, IDLE_KEYS)
    return pruned


def _predict_test_images(
    pruned: Pruned, original: nn.Module, dataset: DataSet, run_context: RunContext
) -> Pruned:
    """Return a network that may come from a folder with what its original predicts."""
    if pruned.predictions is not None:
        return pruned
    reader = make_reader(pruned.result.config, run_context)
    batches = reader.read_shard(dataset.test, "scoring (before)")
    task = pruned.result.task
    _, predictions = evaluate_and_predict(original, batches, task=task, known_ms=0.0)
    return replace(pruned, predictions=predictions)


def _load(folder: Path, model: nn.Module, result: RunResult) -> Pruned:
    """Load the network of a run folder and all that belongs to it, with the given result."""
    path = folder / run_folder.LATENCY
    latency: LatencyTable | None = None
    if path.is_file():
        text = read_bounded(path, TEXT, RunFolderError).decode("utf-8", "replace")
        latency = LatencyTable.from_json(text)
    dependencies = run_folder.read_origin(folder).build_dependency_graph(model)
    smaller = run_folder.load(folder, architecture=model, dependencies=dependencies)
    plan = run_folder.read_plan(folder)
    if plan.weights not in (None, weights_hash(tensors_of(model))):
        raise RunFolderError(
            f"the run in {folder} was made from other weights than those that "
            f"{result.config.model.weights or result.config.model.name} gives now"
        )
    return Pruned(smaller, plan, result, latency, dependencies)
