"""What keeping some classes saves: MACs at equal accuracy on those classes, without training.

    python bench/keep_classes.py resnet20 --data DIR/cifar10 --weights DIR/weights
    python bench/keep_classes.py mobilenetv2 --data DIR --weights DIR/weights

A network is pruned to several budgets in three ways: with all its classes, on calibration images
of all classes; with all its classes, on images of the kept classes alone; and with
`data.keep_classes`, on images of these. All are scored on the test images of the kept classes. A
row has two accuracies: `fraction`, where the prediction is the largest of all the network's
outputs, and `restricted_fraction`, where it is the largest of those of the kept classes. With
`data.keep_classes` both are the same. Of CIFAR-10 the classes are kept three at a time, in the
order of their numbers; of ImageNet those of Imagenette. Nothing is chosen on test images.

Each measurement adds a line to `results/keep_classes.jsonl`; those that it holds are not measured
again. `--seeds` is the number of calibration sets, and `--only` a pattern of methods. `--tables`
only writes the tables in docs/how_to/keep_classes.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from measurements import Measurement, append_measurement, key_of, read_measurements
from rows import ROOT, revision, surroundings
from secateur.config import RefitSection, RunConfig
from secateur.data import Batch, DataSet
from secateur.data.kept_classes import find_classes, images_of_classes
from secateur.graph.module_state import evaluating
from secateur.pipeline import inputs
from secateur.pipeline.inputs import make_reader, resolve_config
from secateur.pipeline.kept_classes import cut_to_classes
from secateur.pipeline.scoring_context import make_scoring_context
from studies import channels_last, cifar10
from tables import with_table
from training_free import Ours

RESULTS = ROOT / "results" / "keep_classes.jsonl"
PAGE = ROOT / "docs" / "how_to" / "keep_classes.md"
KEY = ("network", "classes", "seed", "method", "target")
ALL, THEIRS, KEPT = "all classes", "all classes, images of the kept", "kept classes"
"""The plan without the option, the same on fewer images, and the plan with the option."""
METHODS = (ALL, KEPT, THEIRS)
READINGS = ("fraction", "restricted_fraction")
"""Accuracies of a row: the prediction is one of all outputs, or one of the kept classes."""
CLASSES = {
    "resnet20": ("0,1,2", "3,4,5", "6,7,8"),
    "mobilenetv2": ("0,217,482,491,497,566,569,571,574,701",),
}
"""Classes that are kept, by their numbers."""
TARGETS: dict[str, dict[str, tuple[float, ...]]] = {
    "resnet20": {
        ALL: (0.7, 0.6, 0.5, 0.4, 0.3),
        THEIRS: (0.5, 0.4, 0.3),
        KEPT: (0.6, 0.5, 0.4, 0.3, 0.2),
    },
    "mobilenetv2": {
        ALL: (0.8, 0.7),
        THEIRS: (0.8, 0.7),
        KEPT: (0.5, 0.6, 0.4, 0.7),
    },
}
"""Fractions of the MACs to keep, by method."""
CALIBRATION_IMAGES = {"resnet20": 1000, "mobilenetv2": 300}


@dataclass(frozen=True, eq=False)
class Case:
    """What one method prunes: a network with some images."""

    config: RunConfig
    dataset: DataSet
    model: nn.Module
    kept: tuple[int, ...]
    """The network's outputs that are those of the kept classes."""


def make_case(
    classes: str, method: str, config: RunConfig, dataset: DataSet, model: nn.Module
) -> Case:
    """Return what a method prunes; its test images are those of the kept classes, renumbered."""
    if method == KEPT:
        section = config.data.model_copy(update={"keep_classes": (classes,)})
        config = config.model_copy(update={"data": section})
        resolved_config = resolve_config(config, dataset, model)
        reader = make_reader(resolved_config)
        dataset, model = cut_to_classes(dataset, model, resolved_config, reader)
        assert dataset.kept is not None
        outputs = tuple(range(len(dataset.kept.numbers)))
        return Case(resolve_config(config, dataset, model), dataset, model, outputs)
    kept = find_classes((classes,), dataset.class_names, len(dataset.class_names))
    if method == THEIRS:
        is_shown = torch.isin(dataset.train.labels, torch.tensor(kept.numbers))
        dataset = replace(dataset, train=dataset.train.take(is_shown.nonzero()[:, 0]))
    dataset = replace(dataset, test=images_of_classes(dataset.test, kept, dataset.kind))
    return Case(resolve_config(config, dataset, model), dataset, model, kept.numbers)


def _load(
    network: str, method: str, arguments: argparse.Namespace
) -> tuple[RunConfig, DataSet, nn.Module]:
    count = CALIBRATION_IMAGES[network]
    if network == "mobilenetv2":
        from imagenet import Calibration, load_study

        calibration = Calibration(count, has_tested_classes=method != ALL)
        config, dataset, model = load_study(network, arguments, calibration)
    else:
        config = cifar10(network, arguments)
        dataset, model = inputs.load_inputs(config)
    section = config.data.model_copy(update={"calibration_images": count})
    config = config.model_copy(update={"data": section, "refit": RefitSection()})
    return config, dataset, model


def measure(network: str, method: str, seed: int, arguments: argparse.Namespace) -> None:
    """Append the measurements of a method at all its budgets that the file lacks.

    A network that is pruned with all classes on images of all is the same for all sets of classes.
    """
    known = {key_of(row, KEY) for row in read_measurements(RESULTS, KEY)}
    sets = CLASSES[network]
    wanted = [f"macs={fraction}" for fraction in TARGETS[network][method]]
    loaded: tuple[RunConfig, DataSet, nn.Module] | None = None
    for chosen in [sets] if method == ALL else [(classes,) for classes in sets]:
        targets = [
            target
            for target in wanted
            if any((network, classes, seed, method, target) not in known for classes in chosen)
        ]
        if not targets:
            continue
        loaded = loaded or _load(network, method, arguments)
        cases = {classes: make_case(classes, method, *loaded) for classes in chosen}
        case = cases[chosen[0]]
        config = case.config.model_copy(update={"seed": seed})
        names = (config.score.criterion,)
        context = make_scoring_context(case.model, case.dataset, config, criterion_names=names)
        scored = {
            classes: channels_last(make_reader(config).read_shard(case.dataset.test))
            for classes, case in cases.items()
        }
        bases = {c: fractions_right(case.model, scored[c], cases[c].kept) for c in chosen}
        ours = Ours(case.model, context, config)
        for target in targets:
            pruned = ours.prune(target)
            for classes in chosen:
                fraction, restricted = fractions_right(
                    pruned.stages["refit"], scored[classes], cases[classes].kept
                )
                row = {
                    "network": network,
                    "classes": classes,
                    "seed": seed,
                    "method": method,
                    "target": target,
                    "macs": round(pruned.macs_left * context.dependencies.macs()),
                    "base_macs": context.dependencies.macs(),
                    "base_fraction": bases[classes][0],
                    "base_restricted_fraction": bases[classes][1],
                    "fraction": fraction,
                    "restricted_fraction": restricted,
                    "images": sum(len(batch.labels) for batch in scored[classes]),
                    "calibration_images": len(context.calibration.labels),
                    "seconds": pruned.seconds,
                    "command": f"python bench/keep_classes.py {network} --data DIR --weights DIR",
                    "revision": revision(),
                    "environment": surroundings(),
                }
                append_measurement(RESULTS, row)
                print(classes, seed, method, target, row["macs"], fraction, restricted, flush=True)


def fractions_right(
    network: nn.Module, batches: Sequence[Batch], outputs: Sequence[int]
) -> tuple[float, float]:
    """Return the accuracy among all outputs of the network, and among those of the kept classes.

    `outputs` are the latter: label `i` is output `outputs[i]`.
    """
    kept = torch.tensor(outputs)
    right = torch.zeros(2, dtype=torch.int64)
    with evaluating(network), torch.inference_mode():
        for batch in batches:
            logits = network(batch.images)
            among_all = logits.argmax(1) == kept[batch.labels]
            among_kept = logits[:, kept].argmax(1) == batch.labels
            right += torch.stack([among_all.sum(), among_kept.sum()])
    count = sum(len(batch.labels) for batch in batches)
    return int(right[0]) / count, int(right[1]) / count


@dataclass(frozen=True)
class Point:
    """A method at one budget: means over the calibration sets."""

    target: str
    macs: float
    fraction: float


def curve(
    rows: Sequence[Measurement], network: str, classes: str, method: str, reading: str
) -> list[Point]:
    """Return the points of a method by a reading of the outputs, the largest budget first."""
    of_curve = [row for row in rows if key_of(row, KEY[:2]) == (network, classes)]
    by_target: dict[str, list[Measurement]] = {}
    for row in of_curve:
        if row["method"] == method:
            by_target.setdefault(row["target"], []).append(row)
    points = [
        Point(
            target,
            statistics.mean(row["macs"] for row in group),
            statistics.mean(row[reading] for row in group),
        )
        for target, group in by_target.items()
    ]
    return sorted(points, key=lambda point: -point.macs)


def macs_at(points: Sequence[Point], fraction: float) -> float | None:
    """Return the MACs at which a curve has an accuracy, linear between its points; None outside.

    Where it is reached more than once, the most MACs count.
    """
    for more, fewer in itertools.pairwise(points):
        if fewer.fraction <= fraction <= more.fraction:
            rise = more.fraction - fewer.fraction
            part = (fraction - fewer.fraction) / rise if rise else 1.0
            return fewer.macs + part * (more.macs - fewer.macs)
    return None


def ratio(kept: Sequence[Point], point: Point) -> str:
    """Return the MACs that a curve needs for the accuracy of a point, over the MACs of the point.

    Where the smallest network of the curve has a higher accuracy, the ratio is below its MACs; none
    is given where the largest has a lower one.
    """
    if point.fraction < kept[-1].fraction:
        return f"< {kept[-1].macs / point.macs:.2f}"
    macs = macs_at(kept, point.fraction)
    return "–" if macs is None else f"{macs / point.macs:.2f}"


def make_table(rows: Sequence[Measurement], network: str) -> str:
    """Return the table of a network: accuracy at each budget, and the MACs that are needed."""
    lines = [
        "| classes | MACs that stay | without, all outputs | without, kept outputs | "
        "images of the kept, all outputs | images of the kept, kept outputs | with | "
        "MACs ratio, all outputs | MACs ratio, kept outputs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for classes in CLASSES[network]:
        curves = [
            curve(rows, network, classes, method, reading)
            for method in (ALL, THEIRS)
            for reading in READINGS
        ]
        kept = curve(rows, network, classes, KEPT, READINGS[0])
        if not kept:
            continue
        for number, target in enumerate(_targets([*curves, kept])):
            at_target = [
                next((point for point in points if point.target == target), None)
                for points in (*curves, kept)
            ]
            cells = [
                _shown(classes) if number == 0 else "",
                target.removeprefix("macs="),
                *("–" if point is None else f"{point.fraction:.2%}" for point in at_target),
                *("–" if point is None else ratio(kept, point) for point in at_target[:2]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _targets(curves: Sequence[Sequence[Point]]) -> list[str]:
    """Return the targets of all curves, the largest budget first."""
    targets = {point.target for points in curves for point in points}
    return sorted(targets, key=lambda target: -float(target.removeprefix("macs=")))


def _shown(classes: str) -> str:
    numbers = classes.split(",")
    return classes.replace(",", ", ") if len(numbers) <= 3 else f"{len(numbers)} of ImageNet"


def page(text: str) -> str:
    """Return the page with the tables of the rows."""
    rows = read_measurements(RESULTS, KEY)
    for network in CLASSES:
        text = with_table(text, f"keep classes, {network}", make_table(rows, network))
    return text


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", nargs="?", choices=tuple(CLASSES))
    parser.add_argument("--data", help="folder of the images")
    parser.add_argument("--weights", help="folder of the weights")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="*", help="pattern of methods")
    parser.add_argument("--tables", action="store_true", help="only write the tables")
    arguments = parser.parse_args()
    if not arguments.tables:
        torch.set_num_threads(1)
        for seed, method in itertools.product(range(arguments.seeds), METHODS):
            if fnmatch.fnmatch(method, arguments.only):
                measure(arguments.network, method, seed, arguments)
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
