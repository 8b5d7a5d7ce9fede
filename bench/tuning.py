"""Measure the accuracy that fine-tuning recovers on CIFAR-10, beside the paper's figures.

    python bench/tuning.py --data DIR --weights DIR [--only PATTERN] [--seeds N]
        [--workers N] [--compile]

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

import torch

from measurements import Measurement, append_measurement, key_of, read_measurements, run_all
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
    """A network to prune and fine-tune."""

    file: str
    """Its benchmark in `configs/paper`."""
    largest_drop: float
    """Points of top-1 on the test images that may be lost, by this project's goal."""
    paper: str
    """Points of top-1 that the paper loses."""


CASES = {
    ("resnet20", "macs=0.7"): Case("resnet20_cifar10.toml", 0.12, "0.12"),
    ("resnet20", "macs=0.58"): Case("resnet20_cifar10.toml", 0.11, "–"),
    ("resnet32", "macs=0.7"): Case("resnet32_cifar10.toml", 0.02, "0.02"),
    ("resnet56", "macs=0.5"): Case("resnet56_cifar10.toml", 0.0, "–"),
    ("vgg16_bn", "macs=0.5"): Case("vgg16_cifar10.toml", 0.30, "0.86"),
}
"""By network and target."""


def configured(
    network: str, target: str, data: str, weights: Path, seed: int, *, compiled: bool
) -> RunConfig:
    """Return the run of a case, with the default criterion."""
    spec = read_spec(CONFIGS / CASES[network, target].file).with_weights_in(weights)
    (config,) = (
        job.config
        for job in jobs_of(spec)
        if (job.criterion, job.target, job.seed) == (ScoreSection().criterion, target, seed)
    )
    images = config.data.model_copy(update={"source": f"cifar10:{data}"})
    finetune = config.finetune.model_copy(update={"compile": compiled})
    report = config.report.model_copy(update={"images": 0})  # nobody reads it here
    return config.model_copy(update={"data": images, "finetune": finetune, "report": report})


def measure(
    network: str, target: str, data: str, weights: Path, seed: int, *, compiled: bool
) -> Measurement:
    """Prune and fine-tune one network, and return what was measured."""
    config = configured(network, target, data, weights, seed, compiled=compiled)
    folder = ROOT / "runs" / "tuning" / f"{network}-{target}-{seed}-{config.finetune.epochs}"
    result = run(config, folder, resume=True)
    finetuning, before = result.finetuning, result.score("before")
    assert finetuning is not None
    assert before is not None
    stages = {stage.stage: stage.score.metric for stage in result.stages}
    return {
        "network": network,
        "target": target,
        "seed": seed,
        "test_fraction": {**stages, "last": finetuning.last.metric},
        "best_epoch_test_fraction": finetuning.best.metric,
        "best_epoch": finetuning.best_epoch,
        "macs_left": finetuning.last.macs / before.macs,
        "parameters_left": finetuning.last.parameters / before.parameters,
        "settings": result.config.finetune.model_dump(mode="json"),
        "epochs": [[e.number, e.loss, e.validation] for e in finetuning.epochs],
        "seconds": round(result.stages[-1].seconds, 1),
        "command": "python bench/tuning.py --data DIR --weights DIR",
        "revision": revision(),
        "environment": surroundings("accelerate"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def table(measurements: list[Measurement]) -> str:
    """Return the loss by seed, beside the goal and the paper."""
    lines = [
        "| network, MACs left | seed | epochs | base | cut and refit | last epoch | "
        "best on validation | points lost | goal | paper |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for measurement in sorted(measurements, key=lambda measurement: key_of(measurement, KEY)):
        case = CASES[measurement["network"], measurement["target"]]
        fractions = measurement["test_fraction"]
        lost = 100 * (fractions["before"] - fractions["last"])
        texts = [
            f"{measurement['network']}, {measurement['macs_left']:.3f}",
            str(measurement["seed"]),
            str(measurement["settings"]["epochs"]),
            *(f"{100 * fractions[stage]:.2f}" for stage in ("before", "refit", "last")),
            f"{100 * measurement['best_epoch_test_fraction']:.2f} "
            f"(epoch {measurement['best_epoch']})",
            f"{lost:.2f}",
            f"{case.largest_drop:.2f}",
            case.paper,
        ]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


def summary(measurements: list[Measurement]) -> str:
    """Return means over the seeds, of each network's longest training."""
    lines = [
        "| network, MACs left | epochs | seeds | before | cut and refit | after | points lost |",
        "|---|---|---|---|---|---|---|",
    ]
    for network, target in CASES:
        mine = [
            measurement
            for measurement in measurements
            if (measurement["network"], measurement["target"]) == (network, target)
        ]
        epochs = max((measurement["settings"]["epochs"] for measurement in mine), default=0)
        stages = [
            measurement["test_fraction"]
            for measurement in mine
            if measurement["settings"]["epochs"] == epochs
        ]
        if stages:
            before, refit, last = (
                100 * statistics.mean(fractions[stage] for fractions in stages)
                for stage in ("before", "refit", "last")
            )
            lines.append(
                f"| {network}, {target.removeprefix('macs=')} | {epochs} | {len(stages)} | "
                f"{before:.2f} | {refit:.2f} | {last:.2f} | {before - last:.2f} |"
            )
    return "\n".join(lines)


def page(text: str, measurements: list[Measurement]) -> str:
    """Return the page with a current table."""
    return with_table(text, "results/tuning.jsonl", table(measurements))


def front(text: str, measurements: list[Measurement]) -> str:
    """Return README with a current table."""
    return with_table(text, "results/tuning.jsonl summary", summary(measurements))


def main() -> None:
    """Measure the missing rows and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="the folder of CIFAR-10")
    parser.add_argument("--weights", type=Path, help="the folder of the base weights")
    parser.add_argument("--only", default="*", help="pattern of networks")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--compile", action="store_true", help="train the compiled network")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        network, target, seed = arguments.child
        measurement = measure(
            network,
            target,
            arguments.data,
            arguments.weights,
            int(seed),
            compiled=arguments.compile,
        )
        append_measurement(RESULTS, measurement)
        return
    known = {key_of(measurement, KEY) for measurement in read_measurements(RESULTS, KEY)}
    calls = []
    for (network, target), case in CASES.items():
        spec = read_spec(CONFIGS / case.file)
        (section,) = spec.networks
        if arguments.weights is None or not fnmatch.fnmatch(network, arguments.only):
            continue
        if not (arguments.weights / str(section.weights)).is_file():
            print(f"no {section.weights}: {network} is skipped")
            continue
        options = ["--data", arguments.data, "--weights", str(arguments.weights)]
        options += ["--compile"] * arguments.compile
        calls += [
            [*options, "--child", network, target, str(seed)]
            for seed in range(arguments.seeds)
            if (network, target, seed, spec.finetune.epochs) not in known
        ]
    run_all("tuning.py", calls, arguments.workers)
    measurements = read_measurements(RESULTS, KEY)
    PAGE.write_text(page(PAGE.read_text(), measurements))
    FRONT.write_text(front(FRONT.read_text(), measurements))


if __name__ == "__main__":
    main()
