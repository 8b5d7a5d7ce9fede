"""Compare secateur with Torch-Pruning at equal MACs, without training and without labels.

    python bench/training_free.py cifar10 --data DIR --weights DIR --workers 2
    python bench/training_free.py imagenet --data DIR --weights DIR
    python bench/training_free.py cost --data DIR --weights DIR

This prunes each network to each target by secateur and by every criterion of Torch-Pruning, from
the same unlabelled calibration images, and scores the test images, which choose nothing. After
Torch-Pruning, the batch-norm statistics are recalibrated on the calibration images. `cost` measures
time and memory of secateur, each network in its own process; its `--data` is the folder of
`cifar10`, `imagenet_sample` and `imagenette_subset`. Each measurement adds a line to
`results/training_free.jsonl`; rows that it holds are not measured again, so the bench can be
interrupted. `--only PATTERN` picks methods, such as `secateur`, `secateur, distilled` or
`torch-pruning*`, `--targets` and `--networks` the same; `--tables` only writes the tables in
docs/explanation/training_free.md, docs/reference/estimates.md and the README.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import itertools
import re
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import peer
import studies
from measurements import Measurement, append_measurement, key_of, read_measurements, run_all
from peer_search import BY_GRADIENT, Gradients, NearestCut, cut_to, gradients
from rows import ROOT, reason_of, revision, surroundings
from secateur.config import RefitSection, RunConfig, from_dict, parse_budget
from secateur.data import SYNTHETIC, Batch, DataSet
from secateur.graph.build import build_dependency_graph
from secateur.graph.dependency import RESIDUAL, DependencyGraph
from secateur.models import zoo
from secateur.pipeline import inputs
from secateur.pipeline.inputs import make_reader, resolve_config
from secateur.pipeline.scoring_context import ScoringContext, make_scoring_context
from secateur.pruning.apply import apply_plan
from secateur.pruning.plan_inputs import make_plan_inputs
from secateur.pruning.refit.layerwise import RefitInputs
from secateur.pruning.refit.refit_and_check import refit_and_check
from secateur.training.distill import distill
from secateur.training.feature_distillation import residual_sums
from secateur.training.training_data import TrainingData
from studies import (
    channels_last,
    fraction_equal,
    labels,
    load_inputs,
    networks_of,
    predictions,
)
from tables import with_table

RESULTS = ROOT / "results" / "training_free.jsonl"
PAGE = ROOT / "docs" / "explanation" / "training_free.md"
README = ROOT / "README.md"
FAST_PAGE = ROOT / "docs" / "reference" / "estimates.md"
KEY = ("study", "network", "seed", "target", "method", "options")
SEEDS = 3
OURS = "secateur"
PEER = "torch-pruning "
"""Prefix of Torch-Pruning's methods."""
ALL_IMAGES = "all images"
"""secateur's option to use every unlabelled image."""
FAST = "fast"
"""secateur's setting `score.fast`."""
DISTILLED = "distilled"
"""secateur with distillation on the calibration images behind the refit."""
DISTILL_EPOCHS = 30
NO_IMAGES = "no images"
"""secateur with images that are synthesised from the network."""
FEW = {"128 images": 128, "32 images": 32}
"""secateur's options with so few unlabelled images."""
FEW_STUDIED = ("resnet20",)
"""Networks that are pruned with few images and with none."""
RANK = "channels and rank"
"""secateur with both actions."""
RANK_DISTILLED = "channels and rank, distilled"
CRITERIA = ("reconstruction", "l1", "random")
"""Other criteria, with secateur's allocation and refit."""
OPTIONS = {
    "cifar10": (FAST, RANK, DISTILLED, RANK_DISTILLED, *FEW, NO_IMAGES, *CRITERIA),
    "imagenet": (ALL_IMAGES,),
}
"""secateur's options by study."""
TARGETS = {**studies.TARGETS, "cifar10": (*studies.TARGETS["cifar10"], "macs=0.35")}
STAGES = ("cut", "recalibrated", "refit", "distilled")
CUT_IMAGES = 1000
"""Number of images that a plain cut is scored on, which only shows how far off it is."""
EQUAL = 0.01
"""Largest distance of a cut's MACs from the target."""
COST = {"resnet20": 2000, "torchvision:resnet50": 256}
"""Networks whose cost is measured, and their number of calibration images."""
COST_TARGET = "macs=0.5"
COST_THREADS = 2


@dataclass(frozen=True)
class Method:
    """A method with its options."""

    method: str
    options: str = ""


def methods(study: str) -> list[Method]:
    """Return all methods of a study, first secateur with its options."""
    options = itertools.product(("uniform", "global"), ("inner", "all"))
    peers = itertools.product(peer.CRITERIA, options)
    return [
        Method(OURS),
        *(Method(OURS, option) for option in OPTIONS[study]),
        *(Method(PEER + name, f"{ranking}, {channels}") for name, (ranking, channels) in peers),
    ]


@dataclass(frozen=True, eq=False)
class Check:
    """The scored images, and the classes that the original network predicts for them."""

    batches: list[Batch]
    before: Tensor

    def score(self, stage: str, network: nn.Module) -> Measurement:
        """Return the fractions of correct predictions and of those equal to the original's."""
        batches = self.batches
        if stage == "cut":
            batches = batches[: -(-CUT_IMAGES // len(batches[0].labels))]
        predicted = predictions(network, batches)
        return {
            f"{stage}_fraction": fraction_equal(predicted, labels(batches)),
            f"{stage}_same_class_fraction": fraction_equal(
                predicted, self.before[: len(predicted)]
            ),
        }


# --- secateur ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pruned:
    """A network pruned by secateur."""

    stages: dict[str, nn.Module]
    macs_left: float
    seconds: dict[str, float]


def ours(
    model: nn.Module,
    context: ScoringContext,
    config: RunConfig,
    target: str,
) -> Pruned:
    """Return the network after every step, and the seconds of each step."""
    seconds: dict[str, float] = {}
    section = config.plan.model_copy(update={"target": target})
    config = config.model_copy(update={"plan": section})
    with _timed(seconds, "score"):
        plan_inputs = make_plan_inputs(
            model,
            context.dependencies,
            context.plan_images,
            context.criteria,
            context.source,
            config.score,
            config.plan,
        )[config.score.criterion]
    with _timed(seconds, "plan"):
        plan = plan_inputs.plan(parse_budget(target))
    with _timed(seconds, "cut"):
        smaller = apply_plan(model, context.dependencies, plan)
    stages = {"cut": copy.deepcopy(smaller), "refit": smaller}
    with _timed(seconds, "refit"):
        refit_and_check(
            RefitInputs(model, smaller, context.dependencies, plan.removed, plan.ranks),
            context.refit_images,
            config.refit,
            seed=config.seed,
        )
    if config.distill.epochs:
        fit, held_out = context.parts
        reader = context.reader
        stages["distilled"] = copy.deepcopy(smaller)
        with _timed(seconds, "distill"):
            distill(
                model,
                stages["distilled"],
                TrainingData(fit, reader.preprocessing, reader.unreadable, context.task),
                partial(reader.read_shard, held_out),
                config.distill,
                seed=config.seed,
                sums=residual_sums(context.dependencies, plan.removed),
            )
    left = build_dependency_graph(smaller, context.example).macs() / context.dependencies.macs()
    return Pruned(stages, left, seconds)


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[step] = round(time.perf_counter() - start, 2)


# --- Torch-Pruning -----------------------------------------------------------------------------


class Peers:
    """Torch-Pruning's cuts of one network; those by weights alone are made once."""

    def __init__(
        self, model: nn.Module, dependencies: DependencyGraph, image: Tensor, check: Check
    ) -> None:
        self._model, self._image, self._check = model, image, check
        self._whole = {"inner": all_but_inner(model, dependencies)}
        if any(group.reason == RESIDUAL for group in dependencies.frozen):
            classes = class_count(model, image)
            self._whole["all"] = frozenset(peer.heads(model, classes))
        self._made: dict[tuple[Method, str], tuple[NearestCut, Measurement]] = {}

    def measure(
        self,
        method: Method,
        target: str,
        batches: Sequence[Batch],
        gradients_of: Callable[[], Gradients],
    ) -> Measurement:
        """Return the results of a measurement; `gradients_of` computes the gradients."""
        criterion = method.method.removeprefix(PEER)
        ranking, channels = method.options.split(", ")
        if channels not in self._whole:
            return _none("no channels are tied by residual sums: the same as inner")
        settings = peer.Settings(criterion, ranking == "global", self._whole[channels])
        fraction = parse_budget(target).fraction_left
        seconds: dict[str, float] = {}
        with _timed(seconds, "gradients"):
            gradients_by_name = gradients_of().of(criterion) if criterion in BY_GRADIENT else None
        with _timed(seconds, "search"):
            try:
                if gradients_by_name is not None or (method, target) not in self._made:
                    cut = cut_to(self._model, self._image, settings, fraction, gradients_by_name)
                    if abs(cut.macs_left - fraction) > EQUAL:
                        return _none(f"the nearest cut leaves {cut.macs_left:.3f} of the MACs")
                    self._made[method, target] = cut, self._check.score("cut", cut.model)
            except Exception as error:  # whatever the peer raises is a result
                return _none(reason_of(error))
        cut, scores = self._made[method, target]
        smaller = copy.deepcopy(cut.model)
        with _timed(seconds, "recalibrate"):
            update_bn((batch.images for batch in batches), smaller)
        return {
            **scores,
            **self._check.score("recalibrated", smaller),
            "macs_left": cut.macs_left,
            "ratio": cut.ratio,
            "raised_layers": cut.raised,
            "seconds": seconds,
        }


def all_but_inner(model: nn.Module, dependencies: DependencyGraph) -> frozenset[str]:
    """Return the names of the layers that secateur does not prune without `prune_residual`."""
    inner = {layer.name for group in dependencies.groups.values() for layer in group.layers}
    return frozenset(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and name not in inner
    )


def class_count(model: nn.Module, image: Tensor) -> int:
    """Return the number of classes that the network distinguishes."""
    with torch.inference_mode():
        return int(model(image).shape[1])


def _none(reason: str) -> Measurement:
    return {"outcome": "not applicable", "reason": reason}


# --- measuring ---------------------------------------------------------------------------------


def measured() -> list[Measurement]:
    """Return the rows measured so far."""
    return read_measurements(RESULTS, KEY)


def measure(study: str, network: str, arguments: argparse.Namespace) -> None:
    """Append the missing measurements of a network, seed by seed."""
    known = {key_of(measurement, KEY) for measurement in measured()}
    wanted = [
        (seed, target, method)
        for seed in range(arguments.seeds)
        for target in TARGETS[study]
        for method in methods(study)
        if fnmatch.fnmatch(_name(method), arguments.only)
        and fnmatch.fnmatch(target, arguments.targets)
        and (network in FEW_STUDIED or method.options not in (*FEW, NO_IMAGES))
        and (study, network, seed, target, method.method, method.options) not in known
    ]
    if not wanted:
        return
    config, dataset, model = load_inputs(study, network, arguments)
    config = config.model_copy(update={"refit": RefitSection()})
    batches = channels_last(make_reader(config).read_shard(dataset.test))
    check = Check(batches, predictions(model, batches))
    base = {
        "base_fraction": fraction_equal(check.before, labels(batches)),
        "images": len(dataset.test.labels),
    }
    origin = _origin(study)
    peers: Peers | None = None
    for seed, group in itertools.groupby(wanted, key=lambda item: item[0]):
        # The held-out images are the same for every seed; the calibration set is what differs.
        config = config.model_copy(update={"seed": seed})
        context = make_scoring_context(
            model, dataset, config, criterion_names=(config.score.criterion,)
        )
        calibration = channels_last(context.reader.read_shard(context.calibration))
        peers = peers or Peers(model, context.dependencies, context.example[:1], check)
        gradients_of = cache(partial(gradients, model, [batch.images for batch in calibration]))
        for _, target, method in group:
            method_context, method_config = context, _configured(config, method, dataset)
            if method_config != config:
                has_images = method.options != NO_IMAGES
                method_context = make_scoring_context(
                    model,
                    dataset if has_images else inputs.load_inputs(method_config)[0],
                    method_config,
                    criterion_names=(method_config.score.criterion,),
                    is_extended=True,
                )
            if method.method == OURS:
                pruned = ours(model, method_context, method_config, target)
                measurement = _our_measurement(pruned, check)
            else:
                measurement = peers.measure(method, target, calibration, gradients_of)
            head = {"study": study, "network": network, "seed": seed, "target": target}
            identity = {"method": method.method, "options": method.options}
            count = {"calibration_images": len(method_context.calibration.labels)}
            append_measurement(RESULTS, head | identity | base | count | measurement | origin)


def _configured(config: RunConfig, method: Method, dataset: DataSet) -> RunConfig:
    """Return the configuration with a method's option."""
    if method.options == ALL_IMAGES:
        all_images = {"calibration_images": len(dataset.train.labels)}
        return config.model_copy(update={"data": config.data.model_copy(update=all_images)})
    if method.options in FEW:
        few = {"calibration_images": FEW[method.options]}
        return config.model_copy(update={"data": config.data.model_copy(update=few)})
    if method.options == NO_IMAGES:
        none = {"source": SYNTHETIC}
        return config.model_copy(update={"data": config.data.model_copy(update=none)})
    if method.options in CRITERIA:
        criterion = {"criterion": method.options}
        return config.model_copy(update={"score": config.score.model_copy(update=criterion)})
    if method.options in (RANK, RANK_DISTILLED):
        section = config.plan.model_copy(update={"actions": ("channels", "rank")})
        config = config.model_copy(update={"plan": section})
    if method.options in (DISTILLED, RANK_DISTILLED):
        distilling = config.distill.model_copy(update={"epochs": DISTILL_EPOCHS})
        return config.model_copy(update={"distill": distilling})
    if method.options == FAST:
        tables = config.model_dump(mode="json", exclude_none=True)
        tables["score"]["fast"] = True
        return from_dict(tables, RunConfig)
    return config


def _name(method: Method) -> str:
    return ", ".join(filter(None, (method.method, method.options)))


def _our_measurement(pruned: Pruned, check: Check) -> Measurement:
    measurement: Measurement = {"macs_left": pruned.macs_left, "seconds": pruned.seconds}
    for stage, network in pruned.stages.items():
        measurement |= check.score(stage, network)
    return measurement


def _origin(study: str) -> Measurement:
    return {
        "command": f"python bench/training_free.py {study} --data DIR --weights DIR",
        "revision": revision(),
        "environment": surroundings("torch-pruning"),
    }


def measure_cost(network: str, arguments: argparse.Namespace) -> None:
    """Append the cost of secateur on one network, in this process, which does nothing else.

    The weights of ResNet-50 are random: its cost does not depend on them.
    """
    head: Measurement = {"study": "cost", "network": network, "seed": 0, "target": COST_TARGET}
    head |= {"method": OURS, "options": ""}
    if key_of(head, KEY) in {key_of(measurement, KEY) for measurement in measured()}:
        return
    config, dataset, model = _cost_inputs(network, Path(arguments.data), arguments.weights)
    seconds: dict[str, float] = {}
    with _timed(seconds, "prepare"):
        context = make_scoring_context(
            model, dataset, config, criterion_names=(config.score.criterion,)
        )
    with _timed(seconds, "forward"), torch.inference_mode():
        for batch in context.reader.read_shard(context.calibration):
            model(batch.images)
    pruned = ours(model, context, config, COST_TARGET)
    seconds |= pruned.seconds
    total = sum(seconds.values()) - seconds["forward"]
    results = {
        "macs_left": pruned.macs_left,
        "seconds": seconds,
        "total_seconds": round(total, 1),
        "forward_passes": round(total / seconds["forward"], 1),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "calibration_images": len(context.calibration.labels),
    }
    append_measurement(RESULTS, head | results | _origin("cost"))


def _cost_inputs(network: str, data: Path, weights: str) -> tuple[RunConfig, DataSet, nn.Module]:
    if network == "resnet20":
        folders = argparse.Namespace(data=data / "cifar10", weights=weights)
        config, dataset, model = load_inputs("cifar10", network, folders)
        return config.model_copy(update={"refit": RefitSection()}), dataset, model
    from imagenet import BATCH_SIZE, read_images

    config = RunConfig.model_validate(
        {
            "model": {"name": network},
            "data": {
                "source": "imagenet samples",
                "calibration_images": COST[network],
                "stratified": False,
                "batch_size": BATCH_SIZE,
            },
        }
    )
    dataset = read_images(data)
    model = zoo.load(network, None, num_classes=len(dataset.class_names), seed=config.seed)
    return resolve_config(config, dataset, model), dataset, model


# --- tables ------------------------------------------------------------------------------------


def table(study: str, measurements: list[Measurement]) -> str:
    """Return accuracies by method and setting, and the losses compared with each other."""
    mine = [
        measurement
        for measurement in measurements
        if measurement["study"] == study and "cut_fraction" in measurement
    ]
    settings = [
        (network, target)
        for network, target in itertools.product(networks_of(study), TARGETS[study])
        if any(
            (measurement["network"], measurement["target"]) == (network, target)
            for measurement in mine
        )
    ]
    heads = [f"{network} {target.removeprefix('macs=')}" for network, target in settings]
    lines = [f"| method | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    columns = [[c for c in mine if (c["network"], c["target"]) == setting] for setting in settings]
    ranked = []
    for method in methods(study):
        method_columns = [[c for c in column if _method(c) == method] for column in columns]
        if any(method_columns):
            texts = [_text(column, study) for column in method_columns]
            mean = statistics.mean(_mean(column) if column else 0.0 for column in method_columns)
            ranked.append(
                (method.method != OURS, -mean, f"| {_name(method)} | {' | '.join(texts)} |")
            )
    lines += [line for *_, line in sorted(ranked)]
    lines += ["", *_losses(columns, heads, study), ""]
    images, count = (
        mine[0]["images"],
        min(m["calibration_images"] for m in mine if m["options"] not in OPTIONS[study]),
    )
    seeds = sorted({len({measurement["seed"] for measurement in column}) for column in columns})
    off = max(abs(measurement["macs_left"] - _fraction(measurement)) for measurement in mine)
    lines.append(
        f"Top-1 in % of {images} images; {' to '.join(map(str, seeds))} calibration sets of "
        f"{count} images; MACs left differ from the target by {off:.4f} at most."
    )
    left_out = [
        measurement
        for measurement in measurements
        if measurement["study"] == study and "reason" in measurement
    ]
    lines += ["", *_left_out(left_out)] if left_out else []
    return "\n".join(lines)


def _method(measurement: Measurement) -> Method:
    return Method(measurement["method"], measurement["options"])


def _fraction(measurement: Measurement) -> float:
    return parse_budget(str(measurement["target"])).fraction_left


def _stage(measurement: Measurement) -> str:
    """Return the last stage that was measured."""
    return [stage for stage in STAGES if f"{stage}_fraction" in measurement][-1]


def _mean(column: list[Measurement]) -> float:
    """Return the mean top-1 in % after the last stage."""
    values: list[float] = [
        100 * measurement[f"{_stage(measurement)}_fraction"] for measurement in column
    ]
    return statistics.mean(values)


def _text(column: list[Measurement], study: str) -> str:
    if not column:
        return "–"
    last = _stage(column[0])
    values = [100 * measurement[f"{last}_fraction"] for measurement in column]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    cut = statistics.mean(100 * measurement["cut_fraction"] for measurement in column)
    same_class = statistics.mean(
        100 * measurement[f"{last}_same_class_fraction"] for measurement in column
    )
    suffix = f" ({same_class:.1f})" if study == "imagenet" else ""
    return f"{cut:.1f} → {statistics.mean(values):.2f}{spread}{suffix}"


def _losses(columns: list[list[Measurement]], heads: list[str], study: str) -> Iterator[str]:
    """Yield the points lost by secateur and by the best peer of each setting, and their ratio."""
    yield "| setting | before | lost by secateur | lost by the best of Torch-Pruning | ratio |"
    yield "|---|---|---|---|---|"
    for column, head in zip(columns, heads, strict=True):
        before = 100 * column[0]["base_fraction"]
        ours_here = [measurement for measurement in column if _method(measurement) == Method(OURS)]
        best = _best_peer(column, study)
        lost = before - _mean(ours_here) if ours_here else None
        theirs = before - _mean(best) if best else None
        name = f" ({best[0]['method'].removeprefix(PEER)}, {best[0]['options']})" if best else ""
        ratio = "–" if lost is None or theirs is None else f"{lost / theirs:.2f}"
        texts = ["–" if points is None else f"{points:.2f}" for points in (lost, theirs)]
        yield f"| {head} | {before:.2f} | {texts[0]} | {texts[1]}{name} | {ratio} |"


def _left_out(measurements: list[Measurement]) -> Iterator[str]:
    """Yield the methods that could not be used, by network and reason."""
    yield "Not in the table, because they could not be used:"
    yield ""
    names: dict[tuple[str, str], dict[str, None]] = {}
    for measurement in measurements:
        # Sizes in a message differ from one cut to the next.
        reason = re.sub(r" \(\d+x\d+ and \d+x\d+\)", "", measurement["reason"])
        name = f"{measurement['method'].removeprefix(PEER)} ({measurement['options']})"
        names.setdefault((measurement["network"], reason), {})[name] = None
    for (network, reason), mine in sorted(names.items()):
        yield f"- {network}, {reason}: {', '.join(mine)}"


def cost_table(measurements: list[Measurement]) -> str:
    """Return the seconds of each step, the total in forward passes, and memory."""
    steps = ("forward", "prepare", "score", "plan", "cut", "refit")
    names = (
        "network, images",
        *steps,
        "all but forward",
        "in forward passes",
        "peak memory, GiB",
    )
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for measurement in measurements:
        if measurement["study"] == "cost":
            texts = [f"{measurement['seconds'][step]:.1f}" for step in steps]
            texts += [f"{measurement['total_seconds']:.1f}", f"{measurement['forward_passes']:.1f}"]
            texts.append(f"{measurement['peak_memory_mib'] / 1024:.1f}")
            images = f"{measurement['network']}, {measurement['calibration_images']}"
            lines.append(f"| {images} | {' | '.join(texts)} |")
    return "\n".join(lines)


def fast_table(measurements: list[Measurement]) -> str:
    """Return the accuracy and the time of `fast` beside the default, where both were measured."""
    names = [f"{name}, {unit}" for unit in ("top-1 %", "s") for name in ("default", "fast")]
    heads = ("network", "MACs left", "before", *names, "fast over default")
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for network, target in itertools.product(networks_of("cifar10"), TARGETS["cifar10"]):
        pair = [
            [
                c
                for c in measurements
                if (c["study"], c["network"], c["target"]) == ("cifar10", network, target)
                and _method(c) == Method(OURS, options)
            ]
            for options in ("", FAST)
        ]
        if not all(pair):
            continue
        top1 = [_text(column, "cifar10").partition(" → ")[2] for column in pair]
        seconds = [statistics.mean(sum(c["seconds"].values()) for c in column) for column in pair]
        times = [f"{mean:.1f}" for mean in seconds] + [f"{seconds[1] / seconds[0]:.2f}"]
        before = f"{100 * pair[0][0]['base_fraction']:.2f}"
        cells = (network, target.removeprefix("macs="), before, *top1, *times)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(measurements: list[Measurement]) -> str:
    """Return the mean top-1 in % on CIFAR-10, of secateur and of the best peer."""
    names = [target.removeprefix("macs=") for target in TARGETS["cifar10"]]
    heads = [f"{tool} {name}" for tool in ("secateur", "best of Torch-Pruning") for name in names]
    lines = [f"| MACs left | before | {' | '.join(heads)} |", f"|---|---|{'---|' * len(heads)}"]
    for network in networks_of("cifar10"):
        mine = [c for c in measurements if c["network"] == network and "cut_fraction" in c]
        columns = [[c for c in mine if c["target"] == target] for target in TARGETS["cifar10"]]
        ours_by_target = [[c for c in column if _method(c) == Method(OURS)] for column in columns]
        best = [_best_peer(column, "cifar10") for column in columns]
        texts = [f"{_mean(column):.2f}" if column else "–" for column in [*ours_by_target, *best]]
        lines.append(f"| {network} | {100 * mine[0]['base_fraction']:.2f} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _best_peer(column: list[Measurement], study: str) -> list[Measurement]:
    """Return the measurements of the peer with the highest mean; empty without peers."""
    peers = [
        [c for c in column if _method(c) == method]
        for method in methods(study)
        if method.method != OURS
    ]
    return max(filter(None, peers), key=_mean, default=[])


def page(text: str, measurements: list[Measurement]) -> str:
    """Return the page with current tables."""
    for study in TARGETS:
        if any(measurement["study"] == study for measurement in measurements):
            text = with_table(
                text, f"results/training_free.jsonl {study}", table(study, measurements)
            )
    return with_table(text, "results/training_free.jsonl cost", cost_table(measurements))


def readme(text: str, measurements: list[Measurement]) -> str:
    """Return README with a current table."""
    return with_table(text, "results/training_free.jsonl summary", summary(measurements))


def main() -> None:
    """Measure the missing rows and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=[*TARGETS, "cost"])
    parser.add_argument("--data", help="the folder of CIFAR-10, or of the ImageNet samples")
    parser.add_argument("--weights", help="folder of the weights")
    parser.add_argument("--only", default="*", help="pattern of methods")
    parser.add_argument("--targets", default="*", help="pattern of targets")
    parser.add_argument("--networks", default="*", help="pattern of networks")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--workers", type=int, default=1, help="number of processes")
    parser.add_argument("--tables", action="store_true", help="only write the tables")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child and arguments.study == "cost":
        torch.set_num_threads(COST_THREADS)
        measure_cost(arguments.child, arguments)
        return
    if arguments.child:
        torch.set_num_threads(1)
        measure(arguments.study, arguments.child, arguments)
        return
    if not arguments.tables:
        if arguments.data is None or arguments.weights is None:
            parser.error("--data and --weights are needed")
        options = ["--data", arguments.data, "--weights", arguments.weights]
        options += ["--only", arguments.only, "--seeds", str(arguments.seeds)]
        options += ["--targets", arguments.targets]
        is_cost = arguments.study == "cost"
        # The largest network first: it takes longest.
        names = COST if is_cost else reversed(networks_of(arguments.study))
        networks = [name for name in names if fnmatch.fnmatch(name, arguments.networks)]
        calls = [[arguments.study, *options, "--child", network] for network in networks]
        run_all("training_free.py", calls, 1 if is_cost else arguments.workers)
    measurements = measured()
    PAGE.write_text(page(PAGE.read_text(), measurements))
    README.write_text(readme(README.read_text(), measurements))
    FAST_PAGE.write_text(with_table(FAST_PAGE.read_text(), "fast", fast_table(measurements)))


if __name__ == "__main__":
    main()
