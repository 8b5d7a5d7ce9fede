"""`engine_times.json` of a run folder: what `export` and `evaluate` have measured in engines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from secateur.config import EngineName
from secateur.experiments.manifest import read_manifest
from secateur.experiments.report.times import write_times
from secateur.experiments.run_folder import ENGINE_TIMES, REPORT
from secateur.pipeline.verdict import EngineTime
from secateur.runtime import distributed
from secateur.runtime.atomic_io import replace_file
from secateur.runtime.environment import environment
from secateur.runtime.errors import RunFolderError, SecateurError
from secateur.runtime.input_limits import SMALL_TEXT, read_bounded
from secateur.runtime.schema import VersionedRecord, parse_record

if TYPE_CHECKING:  # it imports this module, by way of `evaluate`
    pass

SCHEMA_VERSION = 1


class EngineTimes(VersionedRecord):
    """The content of `engine_times.json`."""

    schema_version: int = SCHEMA_VERSION
    plan_hash: str
    """Of the plan whose network was timed."""
    times: tuple[EngineTime, ...]


def engine_time(
    engine: EngineName,
    batch: int,
    pruned_ms: float,
    original_ms: float | None,
    *,
    form: Literal["float32", "int8"] = "float32",
) -> EngineTime:
    """Return the times of both networks with the engine's version and this machine."""
    from secateur.engines.registry import find_engine

    machine = environment()
    return EngineTime(
        engine=engine,
        version=find_engine(engine).version,
        form=form,
        batch=batch,
        pruned_ms=pruned_ms,
        original_ms=original_ms,
        threads=torch.get_num_threads(),
        processor=machine.accelerator or machine.processor,
    )


def read_engine_times(folder: Path) -> tuple[EngineTime, ...]:
    """Return the times in a run folder that are of its network; empty if none were measured.

    Raises `RunFolderError` if the file is damaged.
    """
    path = folder / ENGINE_TIMES
    if not path.is_file():
        return ()
    text = read_bounded(path, SMALL_TEXT, RunFolderError)
    recorded = parse_record(EngineTimes, text, SCHEMA_VERSION, str(path))
    is_of_plan = recorded.plan_hash == read_manifest(folder).plan_hash
    return recorded.times if is_of_plan else ()


def record_engine_times(folder: Path, times: Iterable[EngineTime]) -> None:
    """Add times to those of a run folder, in place of older ones of the same kind.

    The run's report shows them from then on. Raises `WriteError` if that can't be written.
    """
    recorded = {time.kind: time for time in (*read_engine_times(folder), *times)}
    merged = tuple(recorded[kind] for kind in sorted(recorded))
    content = EngineTimes(plan_hash=read_manifest(folder).plan_hash, times=merged)
    replace_file(folder / ENGINE_TIMES, content.model_dump_json(indent=1) + "\n")
    write_times(folder / REPORT, merged)


def keep_engine_times(
    folder: Path, place: Path | None, times: Sequence[EngineTime]
) -> tuple[str, ...]:
    """Record times where the run lies, and return a note if that can't be done.

    `place` is what the user named: a folder that was fetched from the Hub has another path, and
    nothing is recorded there.
    """
    if not times or folder != place or not distributed.is_main_process():
        return ()
    try:
        record_engine_times(folder, times)
    except SecateurError as error:
        return (f"The times are not kept in the run folder: {error}.",)
    return ()
