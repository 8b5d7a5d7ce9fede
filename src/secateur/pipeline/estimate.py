"""Estimate how long the stages of a run take on this machine, and how much memory.

What the stages compute is counted (`pipeline.work`). How fast the machine is, one trace of the
network, one forward pass and two matrix products tell.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn

from secateur.config import ENGINE_TITLES, RunConfig
from secateur.data import DataSet
from secateur.data.splits import HELD_OUT_EVERY
from secateur.graph.activation_memory import alive_bytes
from secateur.graph.dependency import Removed
from secateur.graph.interpreter import GraphInterpreter, partial_pass
from secateur.graph.module_state import tensors_of
from secateur.graph.network_graph import Tensors
from secateur.models.evaluate import LATENCY_ROUNDS
from secateur.pipeline import work
from secateur.pipeline.inputs import resolve_config
from secateur.pipeline.plan_trials import TRIAL_IMAGES
from secateur.pipeline.result import stage_title
from secateur.pipeline.run_context import RunContext
from secateur.pipeline.scoring_context import (
    STATISTICS_IMAGES,
    ScoringContext,
    make_scoring_context,
)
from secateur.pipeline.synthetic_data import STAGE as SYNTHETIC_STAGE
from secateur.pipeline.synthetic_data import extended_by, is_synthetic, steps_of_images
from secateur.pipeline.work import Regression, Work
from secateur.pruning.cost.latency_profiler import (
    INTERLEAVED_ROUNDS,
    SHOWN_ROUNDS,
    TABLE_ROUNDS,
)
from secateur.pruning.sensitivity import (
    FEWEST_IMAGES,
    SNAPSHOTS,
    image_count,
    passes_behind,
)
from secateur.pruning.size_search import LATENCY_ATTEMPTS, TRIALS
from secateur.runtime import distributed
from secateur.runtime.device import sums_device
from secateur.runtime.kept_memory import kept_memory
from secateur.runtime.progress import duration_text
from secateur.runtime.timing import (
    LATENCY_BATCH,
    LONGEST_PASS,
    Rounds,
    repeat_to_batch,
    seconds,
)
from secateur.scoring.batching import images_at_a_time
from secateur.scoring.criteria.reconstruction import (
    Reconstruction,
    elimination_bytes,
    moments_bytes,
)

REPORT_STAGE = "report"
GALLERY_PASSES = 8
"""Forward passes of each image that the report's gallery takes, before and after the cut."""
TRAINING_PASSES = 3
"""Forward passes of the smaller network that a training step takes: forward and backward."""
GRADIENT_PASSES = 3
"""Forward passes that a scoring pass with gradients takes."""
TARGET_PASSES = 0.5
"""Forward passes of each image that the refit takes to compute what layers are fitted to."""
PLAN_TRACES = 1.0
"""Time of everything that goes node by node or filter by filter, over that of a trace: the plan,
the cut, the check of the cut network, counts of MACs."""
REFIT_TRACES = 1.0
"""The same of the refit, layer by layer."""
REPORT_TRACES = 3.0
"""The same of the run folder and its report: the program of the network, charts and pictures."""
GATHERED_MACS = 250
"""Multiply-accumulates that take as long as gathering a value into a row and passing it on."""
PRODUCT_SLOWER = 2.0
"""How much slower products of many rows of few values, in float32, are than the timed one."""
FACTOR_SLOWER = 1.3
"""How much slower factors, solutions and updates in float64 are than a product of the same size."""
TIMED_PRODUCT = 640
"""Side of the matrices whose product tells how fast linear algebra is."""
MEMORY_SLACK = 1.15
"""What the allocator and the libraries hold beside the tensors that are counted."""


@dataclass(frozen=True)
class Estimate:
    """What a run will take."""

    seconds: Mapping[str, float]
    """By the title of the stage, in order."""
    memory_bytes: float
    """The most memory that the process takes, with what it has now."""
    not_counted: str = ""
    """What takes time, too, but was not estimated; empty if nothing."""

    @property
    def total_seconds(self) -> float:
        """The time of all stages."""
        return sum(self.seconds.values())

    def __str__(self) -> str:
        """Return a line for each stage, and one for all of them."""
        lines = [f"{title}: {duration_text(seconds)}" for title, seconds in self.seconds.items()]
        memory = f"{self.memory_bytes / 2**30:.1f} GiB"
        lines.append(f"all: {duration_text(self.total_seconds)}, {memory}")
        if self.not_counted:
            lines.append(f"not counted: {self.not_counted}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Speed:
    """How long this machine takes, in seconds."""

    a_pass: float
    """For one image through the original network."""
    a_read: float
    """To read an image and to prepare it."""
    a_trace: float
    """To trace the network."""
    float32: float
    """For a multiply-accumulate of a matrix product."""
    float64: float

    def seconds(self, work: Work) -> float:
        """Return what work takes; images are read beside it where a core is free."""
        computed = (
            work.passes * self.a_pass
            + (PRODUCT_SLOWER * work.float32 + GATHERED_MACS * work.copied) * self.float32
            + FACTOR_SLOWER * work.float64 * self.float64
        )
        read = work.reads * self.a_read
        has_free_core = (os.cpu_count() or 1) > torch.get_num_threads()
        return max(computed, read) if has_free_core else computed + read

    def latency(self, rounds: Rounds, networks: float) -> float:
        """Return what timing takes, where a round runs a batch through so many networks."""
        size = LATENCY_BATCH
        while size > 1 and size * self.a_pass > LONGEST_PASS:
            size //= 2
        a_round = size * self.a_pass * networks
        most = rounds.warm_up + rounds.most
        fitting = rounds.seconds / max(a_round, 1e-9)
        return a_round * min(most, max(rounds.warm_up + rounds.fewest, fitting))


@kept_memory()
def estimate(
    model: nn.Module, dataset: DataSet, config: RunConfig, run_context: RunContext | None = None
) -> Estimate:
    """Return the estimated time of each stage that `config` asks for, and the memory.

    Raises the errors of `make_scoring_context`.
    """
    run_context = (run_context or RunContext()).collecting_unreadable(config)
    config = resolve_config(config, dataset, model)
    since = time.perf_counter()
    context = make_scoring_context(
        model, dataset, config, run_context, criterion_names=(config.score.criterion,)
    )
    trace = time.perf_counter() - since
    with torch.inference_mode():
        speed = _speed(context, tensors_of(model), trace)
    run = _Run(model, context, dataset, config)
    return Estimate(
        {title: run.seconds(stage, speed) for title, stage in run.stages().items()},
        run.memory(),
        _not_counted(config),
    )


def _not_counted(config: RunConfig) -> str:
    """Return what the engine takes, which the estimate leaves out; see `Estimate.not_counted`."""
    if config.plan.engine == "pytorch":
        return ""
    engine = ENGINE_TITLES[config.plan.engine]
    return (
        f"what {engine} takes to prepare networks and to time their layers; passes that are timed "
        "in it count as PyTorch's"
    )


def show_plan(
    run_context: RunContext,
    model: nn.Module,
    dataset: DataSet,
    config: RunConfig,
    is_ahead: Callable[[str], bool] = lambda title: True,
) -> None:
    """Print the stages whose titles are ahead, with their estimate, if anybody sees it."""
    # All processes take part in an estimate, of which the main one alone prints.
    if distributed.any_process(run_context.lines.is_shown):
        expected = estimate(model, dataset, config, run_context)
        ahead = {
            title: seconds
            for title, seconds in expected.seconds.items()
            if is_ahead(title) and not (title == SYNTHETIC_STAGE and is_synthetic(config))
        }
        if run_context.lines.is_shown:
            run_context.lines.plan(ahead, expected.memory_bytes)


@dataclass(frozen=True)
class _Stage:
    """What a stage takes."""

    work: Work
    traces: float = 0.0
    timings: tuple[tuple[Rounds, float], ...] = ()
    """Rounds in which networks are timed, and how many networks."""


class _Run:
    """The counts of a run."""

    def __init__(
        self, model: nn.Module, context: ScoringContext, dataset: DataSet, config: RunConfig
    ) -> None:
        self._context, self._dataset, self._config = context, dataset, config
        self._dependencies = context.dependencies
        self._images = len(context.calibration.labels)
        added = extended_by(context.calibration, dataset.kind, model, config, context.example)
        self._synthesis = GRADIENT_PASSES * steps_of_images(config, added)
        self._images += added
        self._held_out = max(1, self._images // HELD_OUT_EVERY)
        self._test = len(dataset.test.labels)
        self._removed: Removed = work.likely_cut(self._dependencies, config.plan.budget)
        self._cut = work.cut_cost(self._dependencies, self._removed)
        self._taps = work.tap_sizes(
            self._dependencies, tensors_of(model), config.refit.memory_bytes, self._images
        )
        is_refitted = config.refit.layers != "none"
        self._regressions: list[Regression] = (
            work.regressions(self._dependencies, self._removed, config.refit, self._images)
            if is_refitted
            else []
        )
        self._limit = config.refit.memory_bytes // 2

    def seconds(self, stage: _Stage, speed: Speed) -> float:
        """Return what a stage takes."""
        timed = sum(speed.latency(rounds, networks) for rounds, networks in stage.timings)
        return speed.seconds(stage.work) + stage.traces * speed.a_trace + timed

    def stages(self) -> dict[str, _Stage]:
        """Return the stages by their titles, in order."""
        config, validation = self._config, len(self._dataset.validation.labels)
        score_cut = Work(passes=self._test * self._cut, reads=self._test)
        before = Work(passes=self._test, reads=self._test)
        stages = {stage_title("before", 1): _Stage(before, timings=((LATENCY_ROUNDS, 1.0),))}
        if self._synthesis:
            stages = {SYNTHETIC_STAGE: _Stage(Work(passes=self._synthesis)), **stages}
        for number in range(1, config.plan.rounds + 1):
            cut = self._cut_stage()
            stages[stage_title("cut", number)] = _Stage(
                cut.work + score_cut, cut.traces, cut.timings
            )
            if config.refit.is_any:
                stages[stage_title("refit", number)] = _Stage(
                    self._refit() + score_cut, REFIT_TRACES
                )
            if config.distill.epochs:
                epoch = self._training(self._images - self._held_out, self._held_out)
                stages[stage_title("distilled", number)] = _Stage(
                    epoch * config.distill.epochs + score_cut
                )
            if config.finetune.epochs:
                epoch = self._training(len(self._dataset.train.labels), validation)
                stages[stage_title("finetuned", number)] = _Stage(
                    epoch * config.finetune.epochs + score_cut * 2
                )
        if config.report.images:
            shown = min(config.report.images, self._images)
            stages[REPORT_STAGE] = _Stage(
                Work(passes=shown * GALLERY_PASSES, reads=shown * 4), REPORT_TRACES
            )
        return stages

    def _cut_stage(self) -> _Stage:
        """Return what scores, sensitivities and the plan take."""
        config, images = self._config, self._images
        criteria = self._context.criteria.values()
        needs = {need for criterion in criteria for need in criterion.needs}
        eliminates = any(isinstance(criterion, Reconstruction) for criterion in criteria)
        has_sensitivity = config.plan.allocation == "sensitivity"
        passes = 0.0
        if needs or has_sensitivity:
            passes = GRADIENT_PASSES if "gradients" in needs else 1.0
            passes += 1 / config.score.sample_every
        total = Work(passes=passes * images, reads=2 * images if passes else 0)
        if has_sensitivity or eliminates:
            total += work.moments_work(self._taps, images)
        if eliminates:
            total += work.elimination_work(self._taps)
        if has_sensitivity:
            total += self._sensitivity()
        timings: tuple[tuple[Rounds, float], ...] = ((SHOWN_ROUNDS, 1 + self._cut),)
        if config.plan.budget.quantity == "latency":
            timings += ((TABLE_ROUNDS, 6.0),) + ((INTERLEAVED_ROUNDS, 1 + self._cut),) * (
                LATENCY_ATTEMPTS // 2
            )
        if config.plan.trials > 1:
            share = min(1.0, TRIAL_IMAGES / max(1, images))
            total += self._refit() * (config.plan.trials * share)
        if config.plan.max_drop is not None:
            validation = len(self._dataset.validation.labels)
            score = Work(passes=validation * self._cut, reads=validation)
            total += (self._refit() + score) * TRIALS + Work(validation, reads=validation)
        return _Stage(total, 1 + PLAN_TRACES, timings)

    def _sensitivity(self) -> Work:
        """Return what the sensitivity of all groups takes."""
        graph = self._dependencies.graph
        parts = [
            partial_pass(graph, (consumer.node for consumer in group.consumers))
            for group in self._dependencies.groups.values()
        ]
        behind = passes_behind(self._dependencies, parts)
        shape = tuple(self._context.example.shape[1:])
        most = min(self._images, self._config.plan.sensitivity_images)
        images = image_count(shape, behind, FEWEST_IMAGES, most)
        snapshots = min(len(SNAPSHOTS), -(-FEWEST_IMAGES // max(1, images)))
        passes = 1 + work.passes_before(self._dependencies, parts) + behind
        return work.sensitivity_work(self._taps, images * snapshots, passes)

    def _refit(self) -> Work:
        """Return what the refit and the recalibration take."""
        settings, held_out = self._config.refit, self._held_out
        total = Work(passes=held_out, reads=held_out)
        if settings.layers != "none":
            walks = self._images * (1 + self._cut + TARGET_PASSES)
            compared = 2 * held_out * self._cut
            total += Work(walks + compared, reads=self._images + 2 * held_out)
            for regression in self._regressions:
                total += regression.work(self._limit)
        if settings.recalibrate_batchnorm:
            fitted = min(self._images - held_out, STATISTICS_IMAGES)
            moved = fitted + work.NORM_FRACTIONS_TRIED * held_out
            total += Work(passes=self._cut * moved, reads=moved)
        return total

    def _training(self, images: int, validation: int) -> Work:
        """Return what an epoch takes, with the original as the teacher."""
        passes = images * (1 + TRAINING_PASSES * self._cut) + validation * self._cut
        return Work(passes=passes, reads=images + validation)

    def memory(self) -> float:
        """Return the most bytes that the process takes, with what it has now."""
        dependencies, config = self._dependencies, self._config
        alive = alive_bytes(dependencies)
        whole, cut = alive({}), alive(self._removed)
        size = min(self._context.reader.batch_size, max(self._test, self._images))
        a_batch = size * float(whole.max())
        scoring = 0.0
        if config.plan.allocation == "sensitivity":
            scoring = moments_bytes([tap.values for tap in self._taps])
        eliminated = elimination_bytes([tap.values for tap in self._taps]) if scoring else 0
        refit = 0.0
        if self._regressions:
            cached = self._images * float((whole + cut).max())
            sums = max(
                regression.counts(self._limit).memory_bytes for regression in self._regressions
            )
            refit = min(self._limit, cached) + sums
        taken_now = int(psutil.Process().memory_info().rss)
        return taken_now + MEMORY_SLACK * (a_batch + scoring + max(eliminated, refit))


def _speed(context: ScoringContext, state: Tensors, trace: float) -> Speed:
    """Time reading, a forward pass and two products."""
    count, device = len(context.example), context.example.device
    a_read = seconds(lambda: context.reader.read_first(context.calibration, count)) / count
    return Speed(
        a_pass=_pass_seconds(context, state),
        a_read=a_read,
        a_trace=trace,
        float32=_product_seconds(torch.float32, device),
        float64=_product_seconds(torch.float64, sums_device(device)),
    )


def _pass_seconds(context: ScoringContext, state: Tensors) -> float:
    """Return the seconds that one image takes in a batch of the size that runs have."""
    graph, example = context.dependencies.graph, context.example

    def run(images: Tensor) -> float:
        return seconds(lambda: GraphInterpreter(graph, state, images).finish()) / len(images)

    run(example[:1])  # warms up
    a_pass = run(example[:1])
    size = images_at_a_time(*example.shape[2:])
    while size > 1 and size * a_pass > LONGEST_PASS:
        size //= 2
    batch = repeat_to_batch(example, size)
    return min(run(batch) for _ in range(2))


def _product_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Return the seconds of a multiply-accumulate in a matrix product."""
    matrix = torch.ones(TIMED_PRODUCT, TIMED_PRODUCT, dtype=dtype, device=device)
    return min(seconds(lambda: torch.mm(matrix, matrix)) for _ in range(3)) / TIMED_PRODUCT**3
