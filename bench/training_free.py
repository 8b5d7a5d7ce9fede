"""Pruning without training and without labels: secateur and Torch-Pruning at equal MACs.

    python bench/training_free.py cifar10 --data DIR --weights DIR --jobs 2
    python bench/training_free.py imagenet --data DIR --weights DIR
    python bench/training_free.py cost --data DIR --weights DIR

cuts each network to each target by secateur and by every criterion of Torch-Pruning, from the same
unlabelled calibration images, and scores the test images, on which nothing is chosen. After Torch-
Pruning's cut the statistics of the batch norms are estimated anew on the calibration images. `cost`
takes the time and the memory of secateur's way, each network in a process of its own; its `--data`
is the folder of `cifar10`, `imagenet_sample` and `imagenette_subset`. A line a cell goes to
`results/training_free.jsonl`; cells that are there are not measured again, so a run can be
interrupted. `--only PATTERN` picks methods, such as `secateur` or `torch-pruning*`; `--tables` only
writes the tables into docs/explanation/training_free.md and the README.
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
from cells import Cell, key_of, put_cell, read_cells, run_all
from peer_search import BY_GRADIENT, Found, Gradients, cut_to, gradients
from rows import ROOT, reason_of, revision, surroundings
from secateur.config import PlanSection, RefitSection, RunConfig, parse_budget
from secateur.data import Batch, DataSet
from secateur.graph.dependency import RESIDUAL, DependencyGraph
from secateur.models import zoo
from secateur.pipeline.inputs import make_reader, resolve_config
from secateur.pipeline.scoring_context import (
    ScoringContext,
    collect_plan_inputs,
    make_scoring_context,
)
from secateur.pipeline.stages import refit_in_place
from secateur.pruning.apply import apply_plan
from studies import (
    TARGETS,
    answers,
    channels_last,
    labels,
    load_inputs,
    networks_of,
    share,
)
from tables import with_table

RESULTS = ROOT / "results" / "training_free.jsonl"
PAGE = ROOT / "docs" / "explanation" / "training_free.md"
README = ROOT / "README.md"
KEY = ("study", "network", "seed", "target", "method", "options")
SEEDS = 3
OURS = "secateur"
PEER = "torch-pruning "
"""What the methods of Torch-Pruning start with."""
ALL_IMAGES = "all images"
"""The option of secateur's to look at every unlabelled image that there is."""
STAGES = ("cut", "norms", "refit", "distilled")
CUT_IMAGES = 1000
"""How many of the scored images a plain cut is scored on, which only shows that it is far off."""
EQUAL = 0.01
"""How far from the target the MACs of a cut that is compared may be."""
COST = {"resnet20": 2000, "torchvision:resnet50": 256}
"""Networks whose cost is taken, and from how many images."""
COST_TARGET = "macs=0.5"
COST_THREADS = 2


@dataclass(frozen=True)
class Way:
    """A method with its options."""

    method: str
    options: str = ""


def ways(study: str) -> list[Way]:
    """All that are compared, and secateur's with as many images as there are."""
    options = itertools.product(("uniform", "global"), ("inner", "all"))
    peers = itertools.product(peer.CRITERIA, options)
    return [
        Way(OURS),
        *([Way(OURS, ALL_IMAGES)] if study == "imagenet" else []),
        *(Way(PEER + name, f"{ranking}, {channels}") for name, (ranking, channels) in peers),
    ]


@dataclass(frozen=True, eq=False)
class Check:
    """The scored images and what the original network answers to them."""

    batches: list[Batch]
    before: Tensor

    def score(self, stage: str, network: nn.Module) -> Cell:
        """Share of right answers after a stage, and of answers that are the original's."""
        batches = self.batches
        if stage == "cut":
            batches = batches[: -(-CUT_IMAGES // len(batches[0].labels))]
        found = answers(network, batches)
        return {
            f"{stage}_fraction": share(found, labels(batches)),
            f"{stage}_agreement_fraction": share(found, self.before[: len(found)]),
        }


# --- secateur ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pruned:
    """What secateur makes of a network."""

    stages: dict[str, nn.Module]
    macs_left: float
    seconds: dict[str, float]


def ours(
    model: nn.Module,
    context: ScoringContext,
    config: RunConfig,
    target: str,
) -> Pruned:
    """The network after every step, and what each step took."""
    seconds: dict[str, float] = {}
    config = config.model_copy(update={"plan": PlanSection(target=target)})
    with _timed(seconds, "survey"):
        survey = collect_plan_inputs(model, context, config)[config.score.criterion]
    with _timed(seconds, "plan"):
        plan = survey.plan(parse_budget(target))
    with _timed(seconds, "cut"):
        smaller = apply_plan(model, context.dependencies, plan)
    stages = {"cut": copy.deepcopy(smaller), "refit": smaller}
    with _timed(seconds, "refit"):
        refit_in_place(model, smaller, context, plan, config)
    return Pruned(
        stages, context.dependencies.macs(plan.removed) / context.dependencies.macs(), seconds
    )


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[step] = round(time.perf_counter() - start, 2)


# --- Torch-Pruning -----------------------------------------------------------------------------


class Peers:
    """Torch-Pruning's cuts of one network; those that look at weights alone are made once."""

    def __init__(
        self, model: nn.Module, dependencies: DependencyGraph, image: Tensor, check: Check
    ) -> None:
        self._model, self._image, self._check = model, image, check
        self._whole = {"inner": all_but_inner(model, dependencies)}
        if any(group.reason == RESIDUAL for group in dependencies.frozen):
            classes = answers_count(model, image)
            self._whole["all"] = frozenset(peer.heads(model, classes))
        self._made: dict[tuple[Way, str], tuple[Found, Cell]] = {}

    def measure(
        self, way: Way, target: str, batches: Sequence[Batch], found: Callable[[], Gradients]
    ) -> Cell:
        """The part of a cell that tells what came of it; `found` gives the gradients."""
        criterion = way.method.removeprefix(PEER)
        ranking, channels = way.options.split(", ")
        if channels not in self._whole:
            return _none("no channels are tied by residual sums: the same as inner")
        settings = peer.Settings(criterion, ranking == "global", self._whole[channels])
        fraction = parse_budget(target).fraction_left
        seconds: dict[str, float] = {}
        with _timed(seconds, "gradients"):
            given = found().of(criterion) if criterion in BY_GRADIENT else None
        with _timed(seconds, "search"):
            try:
                if given is not None or (way, target) not in self._made:
                    cut = cut_to(self._model, self._image, settings, fraction, given)
                    if abs(cut.macs_left - fraction) > EQUAL:
                        return _none(f"the nearest cut leaves {cut.macs_left:.3f} of the MACs")
                    self._made[way, target] = cut, self._check.score("cut", cut.model)
            except Exception as error:  # whatever the peer raises is a finding
                return _none(reason_of(error))
        cut, scores = self._made[way, target]
        smaller = copy.deepcopy(cut.model)
        with _timed(seconds, "norms"):
            update_bn((batch.images for batch in batches), smaller)
        return {
            **scores,
            **self._check.score("norms", smaller),
            "macs_left": cut.macs_left,
            "ratio": cut.ratio,
            "raised_layers": cut.raised,
            "seconds": seconds,
        }


def all_but_inner(model: nn.Module, dependencies: DependencyGraph) -> frozenset[str]:
    """Names of the layers whose filters secateur leaves whole without `prune_residual`."""
    inner = {layer.name for group in dependencies.groups.values() for layer in group.layers}
    return frozenset(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and name not in inner
    )


def answers_count(model: nn.Module, image: Tensor) -> int:
    """How many classes the network tells apart."""
    with torch.inference_mode():
        return int(model(image).shape[1])


def _none(reason: str) -> Cell:
    return {"outcome": "not applicable", "reason": reason}


# --- measuring ---------------------------------------------------------------------------------


def cells() -> list[Cell]:
    """What has been measured."""
    return read_cells(RESULTS, KEY)


def measure(study: str, network: str, arguments: argparse.Namespace) -> None:
    """Appends every cell of a network that is missing, seed by seed."""
    known = {key_of(cell, KEY) for cell in cells()}
    wanted = [
        (seed, target, way)
        for seed in range(arguments.seeds)
        for target in TARGETS[study]
        for way in ways(study)
        if fnmatch.fnmatch(way.method, arguments.only)
        and (study, network, seed, target, way.method, way.options) not in known
    ]
    if not wanted:
        return
    config, dataset, model = load_inputs(study, network, arguments)
    config = config.model_copy(update={"refit": RefitSection()})
    batches = channels_last(make_reader(config).read_shard(dataset.test))
    check = Check(batches, answers(model, batches))
    base = {
        "base_fraction": share(check.before, labels(batches)),
        "images": len(dataset.test.labels),
    }
    origin = _origin(study)
    peers: Peers | None = None
    for seed, group in itertools.groupby(wanted, key=lambda each: each[0]):
        # The held-out images are the same for every seed; the calibration set is what differs.
        config = config.model_copy(update={"seed": seed})
        context = make_scoring_context(
            model, dataset, config, criterion_names=(config.score.criterion,)
        )
        probe = channels_last(context.reader.read_shard(context.calibration))
        peers = peers or Peers(model, context.dependencies, context.example[:1], check)
        found = cache(partial(gradients, model, [batch.images for batch in probe]))
        for _, target, way in group:
            looked_at = context
            if way.options == ALL_IMAGES:
                every = {"calibration_images": len(dataset.train.labels)}
                whole = {"data": config.data.model_copy(update=every)}
                looked_at = make_scoring_context(
                    model,
                    dataset,
                    config.model_copy(update=whole),
                    criterion_names=(config.score.criterion,),
                )
            if way.method == OURS:
                cell = _ours_cell(ours(model, looked_at, config, target), check)
            else:
                cell = peers.measure(way, target, probe, found)
            head = {"study": study, "network": network, "seed": seed, "target": target}
            method = {"method": way.method, "options": way.options}
            count = {"calibration_images": len(looked_at.calibration.labels)}
            put_cell(RESULTS, head | method | base | count | cell | origin)


def _ours_cell(pruned: Pruned, check: Check) -> Cell:
    cell: Cell = {"macs_left": pruned.macs_left, "seconds": pruned.seconds}
    for stage, network in pruned.stages.items():
        cell |= check.score(stage, network)
    return cell


def _origin(study: str) -> Cell:
    return {
        "command": f"python bench/training_free.py {study} --data DIR --weights DIR",
        "revision": revision(),
        "environment": surroundings("torch-pruning"),
    }


def measure_cost(network: str, arguments: argparse.Namespace) -> None:
    """Appends what secateur's way costs on one network, in this process, which does nothing else.

    The weights of ResNet-50 are random: its cost does not depend on them.
    """
    head: Cell = {"study": "cost", "network": network, "seed": 0, "target": COST_TARGET}
    head |= {"method": OURS, "options": ""}
    if key_of(head, KEY) in {key_of(cell, KEY) for cell in cells()}:
        return
    config, dataset, model = _cost_inputs(network, Path(arguments.data), arguments.weights)
    seconds: dict[str, float] = {}
    with _timed(seconds, "ground"):
        context = make_scoring_context(
            model, dataset, config, criterion_names=(config.score.criterion,)
        )
    with _timed(seconds, "forward"), torch.inference_mode():
        for batch in context.reader.read_shard(context.calibration):
            model(batch.images)
    pruned = ours(model, context, config, COST_TARGET)
    seconds |= pruned.seconds
    total = sum(seconds.values()) - seconds["forward"]
    found = {
        "macs_left": pruned.macs_left,
        "seconds": seconds,
        "total_seconds": round(total, 1),
        "forward_passes": round(total / seconds["forward"], 1),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "calibration_images": len(context.calibration.labels),
    }
    put_cell(RESULTS, head | found | _origin("cost"))


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
    return resolve_config(config, dataset), dataset, model


# --- tables ------------------------------------------------------------------------------------


def table(study: str, found: list[Cell]) -> str:
    """Every method in every setting, and how the losses compare; see
    `docs/explanation/training_free.md`."""
    mine = [cell for cell in found if cell["study"] == study and "cut_fraction" in cell]
    settings = [
        (network, target)
        for network, target in itertools.product(networks_of(study), TARGETS[study])
        if any((cell["network"], cell["target"]) == (network, target) for cell in mine)
    ]
    heads = [f"{network} {target.removeprefix('macs=')}" for network, target in settings]
    lines = [f"| method | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    columns = [[c for c in mine if (c["network"], c["target"]) == each] for each in settings]
    ranked = []
    for way in ways(study):
        own = [[c for c in column if _way(c) == way] for column in columns]
        if any(own):
            texts = [_text(column, study) for column in own]
            mean = statistics.mean(_mean(column) if column else 0.0 for column in own)
            name = ", ".join(filter(None, (way.method, way.options)))
            ranked.append((way.method != OURS, -mean, f"| {name} | {' | '.join(texts)} |"))
    lines += [line for *_, line in sorted(ranked)]
    lines += ["", *_comparison(columns, heads, study), ""]
    images, probes = mine[0]["images"], min(cell["calibration_images"] for cell in mine)
    seeds = sorted({len({cell["seed"] for cell in column}) for column in columns})
    off = max(abs(cell["macs_left"] - _fraction(cell)) for cell in mine)
    lines.append(
        f"Top-1 in % of {images} images; {' to '.join(map(str, seeds))} calibration sets of "
        f"{probes} images; MACs left differ from the target by {off:.4f} at most."
    )
    left_out = [cell for cell in found if cell["study"] == study and "reason" in cell]
    lines += ["", *_left_out(left_out)] if left_out else []
    return "\n".join(lines)


def _way(cell: Cell) -> Way:
    return Way(cell["method"], cell["options"])


def _fraction(cell: Cell) -> float:
    return parse_budget(str(cell["target"])).fraction_left


def _stage(cell: Cell) -> str:
    """The last that there is."""
    return [stage for stage in STAGES if f"{stage}_fraction" in cell][-1]


def _mean(column: list[Cell]) -> float:
    """Mean top-1 in % after the last stage."""
    values: list[float] = [100 * cell[f"{_stage(cell)}_fraction"] for cell in column]
    return statistics.mean(values)


def _text(column: list[Cell], study: str) -> str:
    if not column:
        return "–"
    last = _stage(column[0])
    values = [100 * cell[f"{last}_fraction"] for cell in column]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    cut = statistics.mean(100 * cell["cut_fraction"] for cell in column)
    agreement = statistics.mean(100 * cell[f"{last}_agreement_fraction"] for cell in column)
    more = f" ({agreement:.1f})" if study == "imagenet" else ""
    return f"{cut:.1f} → {statistics.mean(values):.2f}{spread}{more}"


def _comparison(columns: list[list[Cell]], heads: list[str], study: str) -> Iterator[str]:
    """Points lost by secateur and by the best peer of each setting, and their ratio."""
    yield "| setting | before | lost by secateur | lost by the best of Torch-Pruning | ratio |"
    yield "|---|---|---|---|---|"
    for column, head in zip(columns, heads, strict=True):
        before = 100 * column[0]["base_fraction"]
        own = [cell for cell in column if _way(cell) == Way(OURS)]
        best = _best_peer(column, study)
        lost = before - _mean(own) if own else None
        theirs = before - _mean(best) if best else None
        name = f" ({best[0]['method'].removeprefix(PEER)}, {best[0]['options']})" if best else ""
        ratio = "–" if lost is None or theirs is None else f"{lost / theirs:.2f}"
        texts = ["–" if each is None else f"{each:.2f}" for each in (lost, theirs)]
        yield f"| {head} | {before:.2f} | {texts[0]} | {texts[1]}{name} | {ratio} |"


def _left_out(found: list[Cell]) -> Iterator[str]:
    """Which methods could not be used, by network and reason."""
    yield "Not in the table, because they could not be used:"
    yield ""
    names: dict[tuple[str, str], dict[str, None]] = {}
    for cell in found:
        # Sizes in a message differ from one cut to the next.
        reason = re.sub(r" \(\d+x\d+ and \d+x\d+\)", "", cell["reason"])
        name = f"{cell['method'].removeprefix(PEER)} ({cell['options']})"
        names.setdefault((cell["network"], reason), {})[name] = None
    for (network, reason), mine in sorted(names.items()):
        yield f"- {network}, {reason}: {', '.join(mine)}"


def cost_table(found: list[Cell]) -> str:
    """Seconds of each step, the whole in forward passes, and memory."""
    shown = {"ground": "prepare", "survey": "score"}
    steps = ("forward", "ground", "survey", "plan", "cut", "refit")
    names = (
        "network, images",
        *(shown.get(step, step) for step in steps),
        "all but forward",
        "in forward passes",
        "peak memory, GiB",
    )
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for cell in found:
        if cell["study"] == "cost":
            texts = [f"{cell['seconds'][step]:.1f}" for step in steps]
            texts += [f"{cell['total_seconds']:.1f}", f"{cell['forward_passes']:.1f}"]
            texts.append(f"{cell['peak_memory_mib'] / 1024:.1f}")
            images = f"{cell['network']}, {cell['calibration_images']}"
            lines.append(f"| {images} | {' | '.join(texts)} |")
    return "\n".join(lines)


def summary(found: list[Cell]) -> str:
    """Mean top-1 in % of CIFAR-10 networks: secateur's, and that of the best peer."""
    names = [target.removeprefix("macs=") for target in TARGETS["cifar10"]]
    heads = [f"{who} {name}" for who in ("secateur", "best of Torch-Pruning") for name in names]
    lines = [f"| MACs left | before | {' | '.join(heads)} |", f"|---|---|{'---|' * len(heads)}"]
    for network in networks_of("cifar10"):
        mine = [c for c in found if c["network"] == network and "cut_fraction" in c]
        columns = [[c for c in mine if c["target"] == target] for target in TARGETS["cifar10"]]
        own = [[c for c in column if _way(c) == Way(OURS)] for column in columns]
        best = [_best_peer(column, "cifar10") for column in columns]
        texts = [f"{_mean(cells):.2f}" if cells else "–" for cells in [*own, *best]]
        lines.append(f"| {network} | {100 * mine[0]['base_fraction']:.2f} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _best_peer(column: list[Cell], study: str) -> list[Cell]:
    """The cells of the peer's way that has the highest mean; none where there are no peers."""
    peers = [[c for c in column if _way(c) == way] for way in ways(study) if way.method != OURS]
    return max(filter(None, peers), key=_mean, default=[])


def page(text: str, found: list[Cell]) -> str:
    """The page with its tables brought up to date."""
    for study in TARGETS:
        if any(cell["study"] == study for cell in found):
            text = with_table(text, f"results/training_free.jsonl {study}", table(study, found))
    return with_table(text, "results/training_free.jsonl cost", cost_table(found))


def readme(text: str, found: list[Cell]) -> str:
    """The README with its table brought up to date."""
    return with_table(text, "results/training_free.jsonl summary", summary(found))


def main() -> None:
    """Measures what is missing and writes the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=[*TARGETS, "cost"])
    parser.add_argument("--data", help="the folder of CIFAR-10, or of the ImageNet samples")
    parser.add_argument("--weights", help="folder of the weights")
    parser.add_argument("--only", default="*", help="pattern of methods")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=1, help="networks side by side")
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
        is_cost = arguments.study == "cost"
        # The largest network first: it takes longest.
        networks = list(COST) if is_cost else list(reversed(networks_of(arguments.study)))
        calls = [[arguments.study, *options, "--child", network] for network in networks]
        run_all("training_free.py", calls, 1 if is_cost else arguments.jobs)
    found = cells()
    PAGE.write_text(page(PAGE.read_text(), found))
    README.write_text(readme(README.read_text(), found))


if __name__ == "__main__":
    main()
