"""Measure the accuracy that fine-tuning recovers on CIFAR-10, beside the paper's figures.

    python bench/tuning.py --data DIR --weights DIR [--only PATTERN] [--seeds N] [--compile]

This runs the jobs of `configs/paper/*_cifar10.toml` that use the default criterion. Each job adds
a line to `results/tuning.jsonl`. Jobs that are already there are not run again, an interrupted job
resumes from its run folder in `runs/tuning`, and networks without weights in the folder are
skipped. Then the tables in docs/research/training.md and README are written; without weights only
those. The base weights of the residual networks are published ones (docs/reference/data.md),
VGG-16's come from `bench/base_network.py`. The former were trained on the images that are held out
here, so accuracy on those only says which epoch is best. `--compile` can be faster on a CPU
(bench/training.py); each line records its settings.
"""

from __future__ import annotations

import argparse
import fnmatch
import statistics
from dataclasses import dataclass
from pathlib import Path

from cells import Cell, key_of, put_cell, read_cells, run_all
from rows import ROOT, revision, surroundings
from secateur.config import RunConfig, ScoreSection
from secateur.experiments.compare.spec import jobs_of, read_spec
from secateur.experiments.run import run
from tables import with_table

RESULTS = ROOT / "results" / "tuning.jsonl"
PAGE = ROOT / "docs" / "research" / "training.md"
FRONT = ROOT / "README.md"
CONFIGS = ROOT / "configs" / "paper"
KEY = ("network", "target", "seed", "settings.epochs")


@dataclass(frozen=True)
class Case:
    """A network to cut and train."""

    file: str
    """Its comparison in `configs/paper`."""
    largest_drop: float
    """Points of top-1 on the test images that may be lost, by the goal of this project."""
    paper: str
    """Points that the paper loses."""


CASES = {
    ("resnet20", "macs=0.7"): Case("resnet20_cifar10.toml", 0.12, "0.12"),
    ("resnet32", "macs=0.7"): Case("resnet32_cifar10.toml", 0.02, "0.02"),
    ("resnet56", "macs=0.5"): Case("resnet56_cifar10.toml", 0.0, "–"),
    ("vgg16_bn", "macs=0.5"): Case("vgg16_cifar10.toml", 0.30, "0.86"),
}
"""By network and target."""


def configured(case: Case, data: str, weights: Path, seed: int, *, compiled: bool) -> RunConfig:
    """The run of a cell, with the default criterion."""
    comparison = read_spec(CONFIGS / case.file).with_weights_in(weights)
    (config,) = (
        cell.config
        for cell in jobs_of(comparison)
        if (cell.criterion, cell.seed) == (ScoreSection().criterion, seed)
    )
    images = config.data.model_copy(update={"source": f"cifar10:{data}"})
    finetune = config.finetune.model_copy(update={"compile": compiled})
    report = config.report.model_copy(update={"images": 0})  # no one looks at it here
    return config.model_copy(update={"data": images, "finetune": finetune, "report": report})


def measure(
    network: str, target: str, data: str, weights: Path, seed: int, *, compiled: bool
) -> Cell:
    """One network cut, re-estimated and trained."""
    config = configured(CASES[network, target], data, weights, seed, compiled=compiled)
    folder = ROOT / "runs" / "tuning" / f"{network}-{target}-{seed}-{config.finetune.epochs}"
    result = run(config, folder, resume=True)
    tuning, before = result.finetuning, result.score("before")
    assert tuning is not None
    assert before is not None
    stages = {stage.stage: stage.score.top1_fraction for stage in result.stages}
    return {
        "network": network,
        "target": target,
        "seed": seed,
        "test_fraction": {**stages, "last": tuning.last.top1_fraction},
        "best_epoch_test_fraction": tuning.best.top1_fraction,
        "best_epoch": tuning.best_epoch,
        "macs_left": tuning.last.macs / before.macs,
        "parameters_left": tuning.last.parameters / before.parameters,
        "settings": result.config.finetune.model_dump(mode="json"),
        "epochs": [[e.number, e.loss, e.validation] for e in tuning.epochs],
        "seconds": round(result.stages[-1].seconds, 1),
        "command": "python bench/tuning.py --data DIR --weights DIR",
        "revision": revision(),
        "environment": surroundings("accelerate"),
    }


def table(found: list[Cell]) -> str:
    """What was lost, by seed, beside the goal and the paper."""
    lines = [
        "| network, MACs left | seed | epochs | base | cut and refit | last epoch | "
        "best on validation | points lost | goal | paper |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in sorted(found, key=lambda each: key_of(each, KEY)):
        case = CASES[cell["network"], cell["target"]]
        fractions = cell["test_fraction"]
        lost = 100 * (fractions["before"] - fractions["last"])
        texts = [
            f"{cell['network']}, {cell['macs_left']:.3f}",
            str(cell["seed"]),
            str(cell["settings"]["epochs"]),
            *(f"{100 * fractions[stage]:.2f}" for stage in ("before", "refit", "last")),
            f"{100 * cell['best_epoch_test_fraction']:.2f} (epoch {cell['best_epoch']})",
            f"{lost:.2f}",
            f"{case.largest_drop:.2f}",
            case.paper,
        ]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


def summary(found: list[Cell]) -> str:
    """Means over the seeds, of each network's longest training."""
    lines = [
        "| network, MACs left | epochs | seeds | before | cut and refit | after | points lost |",
        "|---|---|---|---|---|---|---|",
    ]
    for network, target in CASES:
        mine = [cell for cell in found if (cell["network"], cell["target"]) == (network, target)]
        epochs = max((cell["settings"]["epochs"] for cell in mine), default=0)
        stages = [cell["test_fraction"] for cell in mine if cell["settings"]["epochs"] == epochs]
        if stages:
            before, refit, last = (
                100 * statistics.mean(each[stage] for each in stages)
                for stage in ("before", "refit", "last")
            )
            lines.append(
                f"| {network}, {target.removeprefix('macs=')} | {epochs} | {len(stages)} | "
                f"{before:.2f} | {refit:.2f} | {last:.2f} | {before - last:.2f} |"
            )
    return "\n".join(lines)


def page(text: str, found: list[Cell]) -> str:
    """The page with its table brought up to date."""
    return with_table(text, "results/tuning.jsonl", table(found))


def front(text: str, found: list[Cell]) -> str:
    """README with its table brought up to date."""
    return with_table(text, "results/tuning.jsonl summary", summary(found))


def main() -> None:
    """Measures what is missing and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="the folder of CIFAR-10")
    parser.add_argument("--weights", type=Path, help="the folder of the base weights")
    parser.add_argument("--only", default="*", help="pattern of networks")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="train the compiled network")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        network, target, seed = arguments.child
        cell = measure(
            network,
            target,
            arguments.data,
            arguments.weights,
            int(seed),
            compiled=arguments.compile,
        )
        put_cell(RESULTS, cell)
        return
    known = {key_of(cell, KEY) for cell in read_cells(RESULTS, KEY)}
    calls = []
    for (network, target), case in CASES.items():
        comparison = read_spec(CONFIGS / case.file)
        (section,) = comparison.networks
        if arguments.weights is None or not fnmatch.fnmatch(network, arguments.only):
            continue
        if not (arguments.weights / str(section.weights)).is_file():
            print(f"no {section.weights}: {network} is left out")
            continue
        options = ["--data", arguments.data, "--weights", str(arguments.weights)]
        options += ["--compile"] * arguments.compile
        calls += [
            [*options, "--child", network, target, str(seed)]
            for seed in range(arguments.seeds)
            if (network, target, seed, comparison.finetune.epochs) not in known
        ]
    run_all("tuning.py", calls, 1)
    found = read_cells(RESULTS, KEY)
    PAGE.write_text(page(PAGE.read_text(), found))
    FRONT.write_text(front(FRONT.read_text(), found))


if __name__ == "__main__":
    main()
