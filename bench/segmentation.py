"""Cut a trained segmentation network without training and without labels, and score its mean IoU.

    python bench/segmentation.py --data DIR --weights BASE

BASE is the U-Net that the commands in configs/unet_camvid.toml train.

This prunes the U-Net to each target by each method, calibrated on the training images without
their masks, and scores it on the images of CamVid's val part, which choose nothing. `--part
validation` scores training images that are held out instead: settings are chosen on them. Each
measurement adds a line to `results/segmentation.jsonl`; rows that it holds are not measured again.
Every method has the same allocation, refit and recalibration. `bench/results.py` writes the tables
in docs/reference/results.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from measurements import Measurement, append_measurement, key_of, read_measurements
from rows import ROOT, revision, surroundings
from secateur.config import RunConfig, parse_budget
from secateur.data import DataSet
from secateur.data.images import IGNORED, Images
from secateur.graph.module_state import evaluating
from secateur.pipeline.inputs import load_inputs, make_reader, resolve_config
from secateur.pipeline.scoring_context import make_scoring_context
from secateur.pruning.apply import apply_plan
from secateur.pruning.refit.layerwise import RefitInputs
from secateur.pruning.refit.refit_and_check import refit_and_check

RESULTS = ROOT / "results" / "segmentation.jsonl"
KEY = ("part", "network", "target", "method", "seed", "settings")
NETWORK = "unet"
TARGETS = ("macs=0.7", "macs=0.5")
WANTED = {"macs=0.7": 0.010, "macs=0.5": 0.030}
"""The most that mean IoU may fall, as a fraction."""
DRAWS = 2000
"""Bootstrap samples of the scored images."""
RANDOM_SEEDS = 1


@dataclass(frozen=True)
class Method:
    """A way to rank the filters."""

    name: str
    criterion: str
    concepts: str
    seeds: int = 1


METHODS = (
    Method("vote by outputs", "vote", "outputs"),
    Method("vote by saliency", "vote", "saliency"),
    Method("L1", "l1", "outputs"),
    Method("random", "random", "outputs", RANDOM_SEEDS),
)
"""The first is the default. Concepts matter to the vote alone."""


def configuration(arguments: argparse.Namespace) -> RunConfig:
    """Return the configuration of a run with the trained network."""
    return RunConfig.model_validate(
        {
            "model": {
                "name": f"{ROOT}/bench/segmentation_networks.py:{NETWORK}",
                "weights": str(arguments.weights),
            },
            "data": {
                "source": f"segmentation:{arguments.data}",
                "image_size": [192, 256],
                "fit": "stretch",
                "mean": [0.5, 0.5, 0.5],
                "std": [0.5, 0.5, 0.5],
                "batch_size": 16,
            },
        }
    )


def pairs_by_image(
    network: nn.Module, images: Images, config: RunConfig, classes: int
) -> Int[Tensor, "image wanted predicted"]:
    """Return how many pixels of each image have a class and are given one."""
    tables = []
    with evaluating(network), torch.inference_mode():
        for batch in make_reader(config).read(images):
            predicted = network(batch.images.contiguous(memory_format=torch.channels_last)).argmax(
                1
            )
            for wanted, settings_by_name in zip(batch.labels, predicted, strict=True):
                counts = wanted != IGNORED
                codes = wanted[counts] * classes + settings_by_name[counts]
                tables.append(codes.bincount(minlength=classes**2).reshape(classes, classes))
    return torch.stack(tables)


def class_iou(pairs: Int[Tensor, "*draw wanted predicted"]) -> Tensor:
    """Return the IoU of each class; NaN where a class is neither there nor predicted."""
    right = pairs.diagonal(dim1=-2, dim2=-1).double()
    return right / (pairs.sum(-1) + pairs.sum(-2) - right)


def mean_iou(pairs: Int[Tensor, "*draw wanted predicted"]) -> Tensor:
    """Return the mean over the classes that are there or predicted."""
    return class_iou(pairs).nanmean(-1)


def interval_of_drop(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the fall in mean IoU, over images, in pairs."""
    generator = torch.Generator().manual_seed(0)
    times = torch.stack(
        [
            torch.randint(len(before), (len(before),), generator=generator).bincount(
                minlength=len(before)
            )
            for _ in range(DRAWS)
        ]
    ).double()
    drawn = [torch.einsum("di,iwp->dwp", times, pairs.double()) for pairs in (before, after)]
    drops = mean_iou(drawn[0]) - mean_iou(drawn[1])
    low, high = drops.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def measure(arguments: argparse.Namespace) -> None:
    """Append the measurements that are missing; methods with the same concepts share a pass."""
    settings: dict[str, Any] = dict(part.split("=", 1) for part in arguments.set)
    text = json.dumps(settings) if settings else ""
    config = configuration(arguments)
    dataset, model = load_inputs(config)
    config = resolve_config(config, dataset, model)
    scored = dataset.test if arguments.part == "test" else dataset.validation
    classes = len(dataset.class_names)
    before = pairs_by_image(model, scored, config, classes)
    known = {key_of(row, KEY) for row in read_measurements(RESULTS, KEY)}
    head = {"part": arguments.part, "network": NETWORK, "settings": text}
    for seed, source in itertools.product(range(RANDOM_SEEDS), ("outputs", "saliency")):
        wanted = [
            (method, target)
            for method, target in itertools.product(METHODS, TARGETS)
            if method.concepts == source
            and seed < method.seeds
            and fnmatch.fnmatch(method.name, arguments.only)
            and key_of(head | {"method": method.name, "seed": seed, "target": target}, KEY)
            not in known
        ]
        for method, target, network, row in _pruned(
            model, dataset, _changed(config, source, seed, settings), wanted
        ):
            after = pairs_by_image(network, scored, config, classes)
            drop = float(mean_iou(before.sum(0)) - mean_iou(after.sum(0)))
            row |= {
                "before": float(mean_iou(before.sum(0))),
                "after": float(mean_iou(after.sum(0))),
                "drop": drop,
                "interval": interval_of_drop(before, after),
                "iou_before": _by_class(before, dataset),
                "iou_after": _by_class(after, dataset),
                "images": len(scored.labels),
                "command": "python bench/segmentation.py --data DIR --weights BASE",
                "revision": revision(),
                "environment": surroundings("timm"),
            }
            identity = head | {"method": method.name, "seed": seed, "target": target}
            append_measurement(RESULTS, identity | row)
            print(f"{method.name} {seed} {target} {text}: {100 * drop:.2f} lower", flush=True)


def _by_class(pairs: Tensor, dataset: DataSet) -> dict[str, float]:
    return dict(zip(dataset.class_names, class_iou(pairs.sum(0)).tolist(), strict=True))


def _changed(config: RunConfig, concepts: str, seed: int, settings: dict[str, Any]) -> RunConfig:
    """Return the configuration with other concepts, seed and keys."""
    tables = config.model_dump()
    tables["score"]["concepts"] = concepts
    tables["seed"] = seed
    for name, value in settings.items():
        section, key = name.split(".")
        tables[section][key] = json.loads(value)
    return RunConfig.model_validate(tables)


def _pruned(
    model: nn.Module, dataset: DataSet, config: RunConfig, wanted: list[tuple[Method, str]]
) -> Iterator[tuple[Method, str, nn.Module, Measurement]]:
    """Yield the network cut by each method to each target and refitted, with what that took."""
    if not wanted:
        return
    start = time.perf_counter()
    names = tuple(dict.fromkeys(method.criterion for method, _ in wanted))
    context = make_scoring_context(model, dataset, config, criterion_names=names)
    plan_inputs = context.make_plan_inputs(model, config)
    scoring = time.perf_counter() - start
    for method, target in wanted:
        start = time.perf_counter()
        plan = plan_inputs[method.criterion].plan(parse_budget(target))
        smaller = apply_plan(model, context.dependencies, plan)
        outcome = refit_and_check(
            RefitInputs(model, smaller, context.dependencies, plan.removed),
            context.refit_images,
            config.refit,
            seed=config.seed,
        )
        kept = {
            name: [len(group) - len(plan.removed.get(name, ())), len(group)]
            for name, group in context.dependencies.groups.items()
        }
        row: Measurement = {
            "macs_left": context.dependencies.macs(plan.removed) / context.dependencies.macs(),
            "parameters_left": sum(p.numel() for p in smaller.parameters())
            / sum(p.numel() for p in model.parameters()),
            "calibration_images": len(context.calibration.labels),
            "kept": kept,
            "recalibrated": 0.0 if outcome.batchnorm is None else outcome.batchnorm.fraction,
            "seconds": {
                "score": round(scoring, 1),
                "cut and refit": round(time.perf_counter() - start, 1),
            },
        }
        yield method, target, smaller, row


def measured() -> list[Measurement]:
    """Return the rows with default settings on images that choose nothing."""
    rows = read_measurements(RESULTS, KEY)
    return [row for row in rows if row["part"] == "test" and not row["settings"]]


def table(rows: list[Measurement]) -> str:
    """Return the mean IoU that each method loses, with intervals."""
    heads = [f"{target.removeprefix('macs=')} of MACs" for target in TARGETS]
    lines = [f"| method | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for method in METHODS:
        cells = []
        for target in TARGETS:
            rows_by_key = [r for r in rows if (r["method"], r["target"]) == (method.name, target)]
            cells.append(_cell(rows_by_key))
        lines.append(f"| {method.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(rows: list[Measurement]) -> str:
    if not rows:
        return "–"
    drops = [100 * row["drop"] for row in rows]
    if len(rows) > 1:
        return f"{sum(drops) / len(drops):.1f} ({min(drops):.1f} to {max(drops):.1f}, seeds)"
    low, high = (100 * bound for bound in rows[0]["interval"])
    return f"{drops[0]:.2f} ({low:.2f} to {high:.2f})"


def class_table(rows: list[Measurement]) -> str:
    """Return the IoU of each class before, and after the default's cuts."""
    ours = {row["target"]: row for row in rows if row["method"] == METHODS[0].name}
    first = next(iter(ours.values()))
    heads = ["before", *(f"{target.removeprefix('macs=')}" for target in ours)]
    lines = [f"| class | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for name, before in first["iou_before"].items():
        values = [before, *(row["iou_after"][name] for row in ours.values())]
        lines.append(f"| {name} | {' | '.join(f'{100 * value:.1f}' for value in values)} |")
    means = [first["before"], *(row["after"] for row in ours.values())]
    lines.append(f"| **mean** | {' | '.join(f'{100 * value:.1f}' for value in means)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--part", choices=["test", "validation"], default="test")
    parser.add_argument("--only", default="*", help="pattern of methods, such as 'vote*'")
    parser.add_argument("--set", nargs="*", default=[], help="keys of the configuration")
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
