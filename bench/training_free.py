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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import peer
import studies
from imagenet import BATCH_SIZE, CALIBRATIONS, load_study, read_images, unused
from measurements import Measurement, append_measurement, key_of, read_measurements, run_all
from peer_search import BY_GRADIENT, Gradients, NearestCut, cut_to, gradients
from rows import ROOT, reason_of, revision, surroundings
from secateur.config import RefitSection, RunConfig, from_dict, parse_budget
from secateur.data import SYNTHETIC, Batch, DataSet, Images
from secateur.data.batch_reader import BatchReader
from secateur.graph.build import build_dependency_graph
from secateur.graph.dependency import RESIDUAL, DependencyGraph
from secateur.models import zoo
from secateur.pipeline import inputs
from secateur.pipeline.inputs import make_reader, resolve_config
from secateur.pipeline.plan_trials import best_plan
from secateur.pipeline.scoring_context import ScoringContext, make_scoring_context
from secateur.pruning.apply import apply_plan, dropped_branches
from secateur.pruning.plan import PruningPlan
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
IMAGENET_PEERS = ("l1", "l2", "lamp")
"""Torch-Pruning's criteria for ImageNet networks: of all seven, the best were always among them."""
PEER_CALIBRATION = "300 images"
"""What Torch-Pruning is calibrated on there…"""
PEER_SEEDS = 1
"""…and the number of its calibration sets."""
CHANNELS = ("inner", "all")
"""Which channels Torch-Pruning removes."""
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
PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "equal shares": {"plan": {"allocation": "uniform"}},
    "only consumers refitted": {"refit": {"layers": "consumers"}},
    "errors that a rectifier hides count": {"refit": {"rectified": False}},
    "without the joint estimate": {"refit": {"joint": False}},
    "without new batch-norm statistics": {"refit": {"recalibrate_batchnorm": False}},
}
"""secateur's settings without one of its parts (`bench/ablation.py`)."""
OPTIONS = {
    "cifar10": ("", RANK, FAST, DISTILLED, RANK_DISTILLED, *FEW, NO_IMAGES, *CRITERIA),
    "imagenet": tuple(CALIBRATIONS),
}
"""secateur's options by study."""
_ACTIONS = {"actions": ["channels", "rank"]}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    FAST: {"score": {"fast": True}},
    DISTILLED: {"distill": {"epochs": DISTILL_EPOCHS}},
    RANK: {"plan": _ACTIONS},
    RANK_DISTILLED: {"plan": _ACTIONS, "distill": {"epochs": DISTILL_EPOCHS}},
    **{name: {"score": {"criterion": name}} for name in CRITERIA},
    **PARTS,
}
"""What secateur's options change in a configuration, by section."""
STAGES = ("cut", "recalibrated", "refit", "distilled")
CUT_IMAGES = {"cifar10": 1000, "imagenet": 100}
"""Number of images that a plain cut is scored on, which only shows how far off it is."""
TARGETS = {
    "cifar10": (*studies.TARGETS["cifar10"], "macs=0.35"),
    "imagenet": ("macs=0.9", "macs=0.8"),
}
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
    is_imagenet = study == "imagenet"
    options = itertools.product(("uniform", "global"), ("inner",) if is_imagenet else CHANNELS)
    peers = itertools.product(IMAGENET_PEERS if is_imagenet else peer.CRITERIA, options)
    return [
        *(Method(OURS, option) for option in OPTIONS[study]),
        *(Method(PEER + name, f"{ranking}, {channels}") for name, (ranking, channels) in peers),
    ]


@dataclass(frozen=True, eq=False)
class Check:
    """The scored images, and the classes that the original network predicts for them."""

    batches: list[Batch]
    before: Tensor
    cut_images: int

    def score(self, stage: str, network: nn.Module) -> Measurement:
        """Return the fractions of correct predictions and of those equal to the original's."""
        batches = self.batches
        if stage == "cut":
            batches = batches[: -(-self.cut_images // len(batches[0].labels))]
        predicted = predictions(network, batches)
        return {
            f"{stage}_fraction": fraction_equal(predicted, labels(batches)),
            f"{stage}_same_class_fraction": fraction_equal(
                predicted, self.before[: len(predicted)]
            ),
        }


@dataclass(frozen=True, eq=False)
class Agreement:
    """Images like those of the calibration set, and what the original network predicts of them."""

    images: Images
    reader: BatchReader
    before: Tensor
    """By class: there is one image of each."""

    def score(self, network: nn.Module, calibration: Images) -> Measurement:
        """Return how often the class is the original's on images of classes without calibration."""
        rest = unused(self.images, calibration)
        predicted = predictions(network, channels_last(self.reader.read_shard(rest)))
        return {
            "unused_images": len(rest.labels),
            "agreement_fraction": fraction_equal(predicted, self.before[rest.labels]),
        }


# --- secateur ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pruned:
    """A network pruned by secateur."""

    stages: dict[str, nn.Module]
    macs_left: float
    seconds: dict[str, float]


class Ours:
    """secateur on one network with one calibration set; the filters are scored once."""

    def __init__(self, model: nn.Module, context: ScoringContext, config: RunConfig) -> None:
        self._model, self.context, self._config = model, context, config
        self._seconds: dict[str, float] = {}
        with _timed(self._seconds, "score"):
            self._plan_inputs = context.make_plan_inputs(model, config)[config.score.criterion]

    def prune(self, target: str) -> Pruned:
        """Return the network after every step, and the seconds of each step."""
        seconds = dict(self._seconds)
        dependencies = self.context.dependencies
        with _timed(seconds, "plan"):
            plan, _ = best_plan(
                self._model,
                self._plan_inputs,
                parse_budget(target),
                self.context,
                self._config.refit,
                seed=self._config.seed,
            )
        with _timed(seconds, "cut"):
            smaller = apply_plan(self._model, dependencies, plan)
        stages = {"cut": copy.deepcopy(smaller), "refit": smaller}
        with _timed(seconds, "refit"):
            refit_and_check(
                RefitInputs(
                    self._model, smaller, dependencies, plan.removed, plan.ranks, plan.dropped
                ),
                self.context.refit_images,
                self._config.refit,
                seed=self._config.seed,
            )
        if self._config.distill.epochs:
            stages["distilled"] = copy.deepcopy(smaller)
            with _timed(seconds, "distill"):
                self._distill(stages["distilled"], plan)
        macs = build_dependency_graph(smaller, self.context.example).macs()
        return Pruned(stages, macs / dependencies.macs(), seconds)

    def _distill(self, smaller: nn.Module, plan: PruningPlan) -> None:
        """Train a cut network on the calibration images, with the original as its teacher."""
        context, reader = self.context, self.context.reader
        fit, held_out = context.parts
        distill(
            self._model,
            smaller,
            TrainingData(fit, reader.preprocessing, reader.unreadable, context.task),
            partial(reader.read_shard, held_out),
            self._config.distill,
            seed=self._config.seed,
            sums=residual_sums(
                context.dependencies,
                plan.removed,
                dropped_branches(self._model, context.dependencies, plan),
            ),
        )


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[step] = round(time.perf_counter() - start, 2)


# --- Torch-Pruning -----------------------------------------------------------------------------


class Peers:
    """Torch-Pruning's cuts of one network; those by weights alone are made once."""

    def __init__(
        self,
        model: nn.Module,
        dependencies: DependencyGraph,
        image: Tensor,
        check: Check,
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
        agree: Callable[[nn.Module], Measurement],
    ) -> Measurement:
        """Return the results of a measurement.

        `gradients_of` computes the gradients, and `agree` the agreement with the original network.
        """
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
            **agree(smaller),
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


class PeerInputs(NamedTuple):
    """What Torch-Pruning is given beside the network."""

    batches: Sequence[Batch]
    gradients_of: Callable[[], Gradients]
    agree: Callable[[nn.Module], Measurement]


class Study:
    """One network of a study, and what its measurements share."""

    def __init__(self, study: str, network: str, arguments: argparse.Namespace) -> None:
        self._study, self._network, self._arguments = study, network, arguments
        config, dataset, self._model = self._inputs("")
        reader = make_reader(config)
        batches = channels_last(reader.read_shard(dataset.test))
        self._check = Check(batches, predictions(self._model, batches), CUT_IMAGES[study])
        self._agreement: Agreement | None = None
        if study == "imagenet":
            sample = dataset.validation
            before = predictions(self._model, channels_last(reader.read_shard(sample)))
            # The images are in the order of their classes.
            self._agreement = Agreement(sample, reader, before)
        self.base = {
            "base_fraction": fraction_equal(self._check.before, labels(batches)),
            "images": len(dataset.test.labels),
        }
        self._peers: Peers | None = None
        self._peer_inputs: dict[int, PeerInputs] = {}

    def measure(self, method: Method, seed: int, targets: Sequence[str]) -> Iterator[Measurement]:
        """Yield the results of a method for each target."""
        if method.method == OURS:
            context, config = self._context(method.options, seed)
            pruner = Ours(self._model, context, config)
            for target in targets:
                pruned = pruner.prune(target)
                measurement: Measurement = {
                    "calibration_images": len(context.calibration.labels),
                    "macs_left": pruned.macs_left,
                    "seconds": pruned.seconds,
                }
                for stage, network in pruned.stages.items():
                    measurement |= self._check.score(stage, network)
                yield measurement | self._agree(context.calibration, pruned.stages["refit"])
            return
        if seed not in self._peer_inputs:
            self._peer_inputs = {seed: self._make_peer_inputs(seed)}
        assert self._peers is not None
        batches, gradients_of, agree = self._peer_inputs[seed]
        for target in targets:
            count = {"calibration_images": sum(len(batch.labels) for batch in batches)}
            yield count | self._peers.measure(method, target, batches, gradients_of, agree)

    def _inputs(self, options: str) -> tuple[RunConfig, DataSet, nn.Module]:
        """Return the configuration, the images and the network, with secateur's options."""
        if self._study == "imagenet":
            calibration = CALIBRATIONS.get(options, CALIBRATIONS[PEER_CALIBRATION])
            config, dataset, model = load_study(self._network, self._arguments, calibration)
            config = resolve_config(config, dataset, model)
        else:
            config, dataset, model = load_inputs(self._study, self._network, self._arguments)
        config = config.model_copy(update={"refit": RefitSection()})
        if options in FEW:
            few = {"calibration_images": FEW[options]}
            config = config.model_copy(update={"data": config.data.model_copy(update=few)})
        if options == NO_IMAGES:
            none = {"source": SYNTHETIC}
            config = config.model_copy(update={"data": config.data.model_copy(update=none)})
            dataset = inputs.load_inputs(config)[0]
        if options in SETTINGS:
            tables = config.model_dump(mode="json", exclude_none=True)
            for section, values in SETTINGS[options].items():
                tables.setdefault(section, {}).update(values)
            config = from_dict(tables, RunConfig)
        return config, dataset, model

    def _context(self, options: str, seed: int) -> tuple[ScoringContext, RunConfig]:
        """Return what is pruned on; the calibration set is what differs between seeds."""
        config, dataset, _ = self._inputs(options)
        config = config.model_copy(update={"seed": seed})
        names = (config.score.criterion,)
        context = make_scoring_context(
            self._model, dataset, config, criterion_names=names, is_extended=True
        )
        return context, config

    def _agree(self, calibration: Images, network: nn.Module) -> Measurement:
        return {} if self._agreement is None else self._agreement.score(network, calibration)

    def _make_peer_inputs(self, seed: int) -> PeerInputs:
        context, _ = self._context("", seed)
        if self._peers is None:
            image = context.example[:1]
            self._peers = Peers(self._model, context.dependencies, image, self._check)
        batches = channels_last(context.reader.read_shard(context.calibration))
        gradients_of = cache(partial(gradients, self._model, [batch.images for batch in batches]))
        return PeerInputs(batches, gradients_of, partial(self._agree, context.calibration))


def measure(study: str, network: str, arguments: argparse.Namespace) -> None:
    """Append the missing measurements of a network, seed by seed."""
    known = {key_of(measurement, KEY) for measurement in measured()}
    origin = _origin(study)
    this: Study | None = None
    for seed, method in itertools.product(range(arguments.seeds), methods(study)):
        identity = {"method": method.method, "options": method.options}
        targets = [
            target
            for target in TARGETS[study]
            if fnmatch.fnmatch(target, arguments.targets)
            and (study, network, seed, target, *identity.values()) not in known
        ]
        is_wanted = fnmatch.fnmatch(_name(method), arguments.only)
        if not targets or not is_wanted or _is_left_out(study, network, seed, method):
            continue
        this = this or Study(study, network, arguments)
        for target, measurement in zip(targets, this.measure(method, seed, targets), strict=True):
            head = {"study": study, "network": network, "seed": seed, "target": target}
            append_measurement(RESULTS, head | identity | this.base | measurement | origin)


def _is_left_out(study: str, network: str, seed: int, method: Method) -> bool:
    """Return whether a method is not measured on a network, or not with this calibration set."""
    if study == "imagenet":
        return method.method != OURS and seed >= PEER_SEEDS
    return network not in FEW_STUDIED and method.options in (*FEW, NO_IMAGES)


def _name(method: Method) -> str:
    return ", ".join(filter(None, (method.method, method.options)))


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
    pruned = Ours(model, context, config).prune(COST_TARGET)
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
    ranked: list[tuple[bool, float, str]] = []
    for method in methods(study):
        method_columns = [[c for c in column if _method(c) == method] for column in columns]
        if any(method_columns):
            texts = [_text(column, study) for column in method_columns]
            mean = statistics.mean(_mean(column) if column else 0.0 for column in method_columns)
            is_peer = method.method != OURS
            # secateur's calibration sets stay in order: first those without the tested classes.
            place = len(ranked) if study == "imagenet" and not is_peer else -mean
            ranked.append((is_peer, place, f"| {_name(method)} | {' | '.join(texts)} |"))
    lines += [line for *_, line in sorted(ranked)]
    lines += ["", *_losses(columns, heads, study), ""]
    images = mine[0]["images"]
    kinds = {m["calibration_images"] for m in mine if m["options"] in ("", *CALIBRATIONS)}
    count = " or ".join(map(str, sorted(kinds)))
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
    suffix = f" ({_agreement(column):.1f})" if study == "imagenet" else ""
    return f"{cut:.1f} → {statistics.mean(values):.2f}{spread}{suffix}"


def _agreement(column: list[Measurement]) -> float:
    """Return the mean agreement with the original in % on unused images."""
    values: list[float] = [100 * measurement["agreement_fraction"] for measurement in column]
    return statistics.mean(values)


def _losses(columns: list[list[Measurement]], heads: list[str], study: str) -> Iterator[str]:
    """Yield the points lost by secateur and by the best peer of each setting.

    On ImageNet networks secateur has a column for each kind of calibration set; elsewhere the ratio
    of both losses is shown.
    """
    is_imagenet = study == "imagenet"
    options = list(CALIBRATIONS) if is_imagenet else [""]
    names = [f"lost by secateur{', ' * bool(option)}{option}" for option in options]
    ends = ["lost by the best of Torch-Pruning", *([] if is_imagenet else ["ratio"])]
    yield f"| setting | before | {' | '.join([*names, *ends])} |"
    yield f"|---|---|{'---|' * len([*names, *ends])}"
    for column, head in zip(columns, heads, strict=True):
        before = 100 * column[0]["base_fraction"]
        by_option = [[c for c in column if _method(c) == Method(OURS, o)] for o in options]
        best = _best_peer(column, study)
        losses = [before - _mean(part) if part else None for part in (*by_option, best)]
        texts = ["–" if points is None else f"{points:.2f}" for points in losses]
        if best:
            texts[-1] += f" ({best[0]['method'].removeprefix(PEER)}, {best[0]['options']})"
        if not is_imagenet:
            lost, theirs = losses
            texts.append("–" if lost is None or theirs is None else f"{lost / theirs:.2f}")
        yield f"| {head} | {before:.2f} | {' | '.join(texts)} |"


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
    targets = TARGETS["cifar10"]
    heads = " | ".join(target.removeprefix("macs=") for target in targets)
    lines = [f"| network, before | MACs left: | {heads} |", f"|---|---|{'---|' * len(targets)}"]
    for network in networks_of("cifar10"):
        mine = [c for c in measurements if c["network"] == network and "cut_fraction" in c]
        columns = [[c for c in mine if c["target"] == target] for target in targets]
        rows = {
            _name(method): [[c for c in column if _method(c) == method] for column in columns]
            for method in (Method(OURS), Method(OURS, RANK))
        }
        rows["best of Torch-Pruning"] = [_best_peer(column, "cifar10") for column in columns]
        before = f"{network}, {100 * mine[0]['base_fraction']:.2f}"
        for name, cells in rows.items():
            texts = " | ".join(f"{_mean(cell):.2f}" if cell else "–" for cell in cells)
            lines.append(f"| {before} | {name} | {texts} |")
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
