"""What fine-tuning wins back after the cut, on CIFAR-10, beside the paper's figures.

    python bench/tuning.py --data DIR --weights DIR --vgg16 FILE [--only PATTERN] [--seeds N]

A line a cell goes to `results/tuning.jsonl`; cells that are there are not measured again, and a
cell that was interrupted goes on from its run folder in `runs/tuning`. Then the table in
docs/training.md is written; without weights only that. The base weights of the residual networks
are those of `../shared/data/weights`; VGG-16's come from `secateur train`. They have seen the
images that are held out here, so the accuracy on those says which epoch is best, and no more.
"""

from __future__ import annotations

import argparse
import fnmatch
from dataclasses import dataclass
from pathlib import Path

from cells import Cell, key_of, put_cell, read_cells, run_all
from rows import ROOT, revision, surroundings
from secateur import runs
from secateur.config import PlanSection, RefitSection, TrainingSection
from studies import cifar10
from tables import with_table

RESULTS = ROOT / "results" / "tuning.jsonl"
PAGE = ROOT / "docs" / "training.md"
KEY = ("network", "target", "seed")
VALIDATION_FRACTION = 0.02


@dataclass(frozen=True)
class Case:
    """A network to cut and train."""

    network: str
    target: str
    epochs: int
    largest_drop: float
    """Points of top-1 on the test images that may be lost, by the goal of this project."""
    paper: str
    """Points that the paper loses."""


CASES = (
    Case("resnet20", "macs=0.7", 40, 0.12, "0.12"),
    Case("resnet32", "macs=0.7", 60, 0.02, "0.02"),
    Case("resnet56", "macs=0.5", 60, 0.0, "–"),
    Case("vgg16_bn", "macs=0.5", 40, 0.30, "0.86"),
)


def training(case: Case) -> TrainingSection:
    """One recipe for all: labels and the original network as teachers."""
    return TrainingSection(
        epochs=case.epochs, learning_rate=0.05, label_weight=0.3, temperature=4.0
    )


def measure(case: Case, weights: str, data: str, seed: int) -> Cell:
    """One network cut, re-estimated and trained."""
    config = cifar10(case.network, argparse.Namespace(data=data, weights=""))
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"weights": weights}),
            "data": config.data.model_copy(update={"validation_fraction": VALIDATION_FRACTION}),
            "plan": PlanSection(target=case.target),
            "refit": RefitSection(),
            "finetune": training(case),
            "seed": seed,
        }
    )
    folder = ROOT / "runs" / "tuning" / f"{case.network}-{case.target}-{seed}"
    result = runs.run(config, folder, resume=True)
    tuning, before = result.tuning, result.score("before")
    assert tuning is not None
    assert before is not None
    stages = {stage.stage: stage.score.top1_fraction for stage in result.stages}
    return {
        "network": case.network,
        "target": case.target,
        "seed": seed,
        "test_fraction": {**stages, "last": tuning.last.top1_fraction},
        "best_epoch_test_fraction": tuning.best.top1_fraction,
        "best_epoch": tuning.best_epoch,
        "macs_left": tuning.last.macs / before.macs,
        "parameters_left": tuning.last.parameters / before.parameters,
        "settings": result.config.finetune.model_dump(mode="json"),
        "epochs": [[e.number, e.loss, e.validation] for e in tuning.epochs],
        "seconds": round(result.stages[-1].seconds, 1),
        "command": "python bench/tuning.py --data DIR --weights DIR --vgg16 FILE",
        "revision": revision(),
        "environment": surroundings("accelerate"),
    }


def table(found: list[Cell]) -> str:
    """What was lost, by seed, beside the goal and the paper."""
    lines = [
        "| network, MACs left | seed | base | cut and refit | last epoch | best on validation | "
        "points lost | goal | paper |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    cases = {(case.network, case.target): case for case in CASES}
    for cell in sorted(found, key=lambda each: key_of(each, KEY)):
        case = cases[cell["network"], cell["target"]]
        fractions = cell["test_fraction"]
        lost = 100 * (fractions["before"] - fractions["last"])
        texts = [
            f"{cell['network']}, {cell['macs_left']:.3f}",
            str(cell["seed"]),
            *(f"{100 * fractions[stage]:.2f}" for stage in ("before", "refit", "last")),
            f"{100 * cell['best_epoch_test_fraction']:.2f} (epoch {cell['best_epoch']})",
            f"{lost:.2f}",
            f"{case.largest_drop:.2f}",
            case.paper,
        ]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


def page(text: str, found: list[Cell]) -> str:
    """The page with its table brought up to date."""
    return with_table(text, "results/tuning.jsonl", table(found))


def main() -> None:
    """Measures what is missing and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="the folder of CIFAR-10")
    parser.add_argument("--weights", type=Path, help="the folder of the residual networks' weights")
    parser.add_argument("--vgg16", help="the weights of VGG-16")
    parser.add_argument("--only", default="*", help="pattern of networks")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cases = {case.network: case for case in CASES}
    if arguments.child:
        network, weights, seed = arguments.child
        put_cell(RESULTS, measure(cases[network], weights, arguments.data, int(seed)))
        return
    known = {key_of(cell, KEY) for cell in read_cells(RESULTS, KEY)}
    calls = []
    for case in CASES:
        weights = arguments.weights and str(
            arguments.weights / f"cifar10_{case.network}.safetensors"
        )
        if case.network == "vgg16_bn":
            weights = arguments.vgg16
        for seed in range(arguments.seeds):
            wanted = fnmatch.fnmatch(case.network, arguments.only) and weights
            if wanted and (case.network, case.target, seed) not in known:
                calls.append(
                    ["--data", arguments.data, "--child", case.network, weights, str(seed)]
                )
    run_all("tuning.py", calls, 1)
    PAGE.write_text(page(PAGE.read_text(), read_cells(RESULTS, KEY)))


if __name__ == "__main__":
    main()
