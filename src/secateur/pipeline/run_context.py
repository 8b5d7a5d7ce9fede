"""What accompanies a run through every step: progress, log, images left out, command line."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from secateur.config import RunConfig
from secateur.data import Unreadable
from secateur.graph.output_values import OutputPart
from secateur.models.metrics.user_function import NetworkFunction
from secateur.models.task import Task
from secateur.pipeline.result import StageResult, stage_title
from secateur.runtime import distributed
from secateur.runtime.event_log import EventLog
from secateur.runtime.progress import ProgressCallback, StageLines, no_progress
from secateur.runtime.trackers import Tracker, open_log
from secateur.scoring.criteria import Criterion
from secateur.training.own_loss import LossFunction


@dataclass(frozen=True, eq=False)
class RunContext:
    """What accompanies a run: progress, log, tracker, skipped images, a criterion of the user's."""

    progress: ProgressCallback = no_progress
    lines: StageLines = field(default_factory=StageLines)
    """Gets a line for every stage and epoch that has ended."""
    command: str | None = None
    """The command line, for the record."""
    tracker: Tracker | None = None
    """Gets the curves of training."""
    log: EventLog = field(default_factory=lambda: EventLog(None))
    criterion: Criterion | None = None
    """Scores the filters, if it was passed from Python and has no name."""
    metric: NetworkFunction | None = None
    """Scores networks, if it was passed from Python and has no name."""
    loss: LossFunction | None = None
    """The loss with the labels, if it was passed from Python and has no name."""
    outputs: tuple[OutputPart, ...] = ()
    """What is compared of a network's outputs; by default what they look like tells."""
    unreadable: Unreadable | None = None
    """Collects the images that can't be read; None makes them an error."""

    def collecting_unreadable(self, config: RunConfig) -> RunContext:
        """Return a copy with an empty collector, or none, as the configuration says."""
        unreadable = Unreadable() if config.data.skip_unreadable else None
        return replace(self, unreadable=unreadable)

    def logging_to(self, path: Path | None) -> RunContext:
        """Return a copy that logs to a file, and to the tracker; only the main process writes."""
        if path is None or not distributed.is_main_process():
            return replace(self, log=EventLog(None))
        return replace(self, log=open_log(path, self.tracker))

    def end_stage(self, result: StageResult, task: Task) -> None:
        """Log a stage that has ended, and print its line."""
        title = stage_title(result.stage, result.round)
        accuracy = task.describe(result.score.metric)
        self.log.write("stage", **result.model_dump())
        self.lines.end_stage(title, accuracy)

    @property
    def unreadable_files(self) -> tuple[str, ...]:
        """The files that any process has left out, sorted; every process must ask."""
        names = () if self.unreadable is None else self.unreadable.names
        return tuple(sorted({name for names in distributed.all_gather(names) for name in names}))
