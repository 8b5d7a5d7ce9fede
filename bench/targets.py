"""Compare `--max-drop` and latency targets with measurements, without training.

    python bench/targets.py --data DIR --resnet56 FILE --vgg16 FILE

ResNet-56 and VGG-16 are pruned to the smallest network that loses at most one point on validation
images, and to 0.6 of the time of a forward pass. Then accuracy on validation images and both
networks' forward passes (interleaved) are measured. Each combination adds a line to
`results/targets.jsonl`; lines that are already there are not measured again. VGG-16's weights are
those that `secateur train` writes. Finally the table in docs/reference/targets.md is written;
without weights only that. Times use all threads of the machine: leave it idle.
"""

from __future__ import annotations

import argparse
import statistics

from interleaved import time_interleaved
from measurements import Measurement, append_measurement, key_of, read_measurements, run_all
from rows import ROOT, revision, surroundings
from secateur.config import PlanSection, RefitSection
from secateur.models.evaluate import evaluate
from secateur.pipeline.inputs import load_inputs, make_reader
from secateur.pipeline.prune import prune
from secateur.pipeline.scoring_context import make_scoring_context
from secateur.pruning.cost.quantities import count_quantity
from secateur.runtime.errors import TargetError
from secateur.runtime.timing import LATENCY_BATCH, repeat_to_batch
from studies import cifar10
from tables import with_table

RESULTS = ROOT / "results" / "targets.jsonl"
PAGE = ROOT / "docs" / "reference" / "targets.md"
KEY = ("network", "target")
NETWORKS = {"resnet56": "resnet56", "vgg16": "vgg16_bn"}
"""Option that names the weights -> network."""
TARGETS = {
    "max-drop=1": PlanSection(target="macs=0.5", max_drop=1.0),
    "latency=0.6": PlanSection(target="latency=0.6"),
    "latency=0.6 prune-residual": PlanSection(target="latency=0.6", prune_residual=True),
}
NO_RESIDUAL = ("vgg16_bn", "latency=0.6 prune-residual")
"""Skipped: without skip connections `prune_residual` changes nothing."""


def measured() -> list[Measurement]:
    """Return the rows measured so far."""
    return read_measurements(RESULTS, KEY)


def measure(data: str, network: str, target: str, weights: str) -> Measurement:
    """Prune a network to a target, and return what was measured."""
    config = cifar10(network, argparse.Namespace(data=data, weights=""))
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"weights": weights}),
            "plan": TARGETS[target],
            "refit": RefitSection(),
            "finetune": config.finetune.model_copy(update={"epochs": 0}),
        }
    )
    head = {
        "network": network,
        "target": target,
        "seed": config.seed,
        "command": "python bench/targets.py --data DIR --resnet56 FILE --vgg16 FILE",
        "revision": revision(),
        "environment": surroundings(),
    }
    dataset, model = load_inputs(config)
    try:
        pruned = prune(model, dataset, config)
    except TargetError as error:
        return {**head, "refused": str(error)}
    config = pruned.result.config
    networks = {"before": model.eval(), "after": pruned.model.eval()}
    shown = list(make_reader(config).read_shard(dataset.validation))
    validation = {name: evaluate(network, shown).metric for name, network in networks.items()}
    test = {
        "before": pruned.result.stages[0].score,
        "after": pruned.result.stages[-1].score,
    }
    seconds = time_interleaved(networks, repeat_to_batch(shown[0].images, LATENCY_BATCH))
    predicted = None
    if pruned.latency is not None:
        dependencies = make_scoring_context(model, dataset, config).dependencies
        time_of = count_quantity(dependencies, "latency", pruned.latency)
        predicted = time_of(pruned.plan.removed) / time_of({})
    return {
        **head,
        "validation_fraction": validation,
        "test_fraction": {name: score.metric for name, score in test.items()},
        "macs_left": test["after"].macs / test["before"].macs,
        "parameters_left": test["after"].parameters / test["before"].parameters,
        "seconds": seconds,
        "latency_left_predicted": predicted,
        "trials": [
            [trial.fraction_left, trial.validation_metric] for trial in pruned.result.size_trials
        ],
    }


def table(measurements: list[Measurement]) -> str:
    """Return the table of targets and what was measured for them."""
    lines = [
        "| network | options | validation top-1 | test top-1 | MACs left | time left: predicted | "
        "measured | ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for measurement in sorted(measurements, key=lambda measurement: key_of(measurement, KEY)):
        if "refused" in measurement:
            reason = measurement["refused"].partition(" (")[0]
            lines.append(
                f"| {measurement['network']} | `{measurement['target']}` "
                f"| refused: {reason} | | | | | |"
            )
            continue
        times = {
            name: 1e3 * statistics.median(values) for name, values in measurement["seconds"].items()
        }
        predicted = measurement["latency_left_predicted"]
        texts = [
            measurement["network"],
            f"`{measurement['target']}`",
            *(_percents(measurement[f"{images}_fraction"]) for images in ("validation", "test")),
            f"{measurement['macs_left']:.3f}",
            "–" if predicted is None else f"{predicted:.3f}",
            f"{times['after'] / times['before']:.3f}",
            f"{times['before']:.1f} → {times['after']:.1f}",
        ]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


def _percents(fractions: dict[str, float]) -> str:
    return " → ".join(f"{100 * fractions[name]:.2f}" for name in ("before", "after"))


def page(text: str, measurements: list[Measurement]) -> str:
    """Return the page with a current table."""
    return with_table(text, "results/targets.jsonl", table(measurements))


def main() -> None:
    """Measure the missing rows and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="the folder of CIFAR-10")
    for option in NETWORKS:
        parser.add_argument(f"--{option}", help="weights")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        append_measurement(RESULTS, measure(arguments.data, *arguments.child))
        return
    known = {key_of(measurement, KEY) for measurement in measured()}
    calls = [
        ["--data", arguments.data, "--child", network, target, weights]
        for option, network in NETWORKS.items()
        if (weights := getattr(arguments, option)) is not None
        for target in TARGETS
        if (network, target) not in known and (network, target) != NO_RESIDUAL
    ]
    if calls and arguments.data is None:
        parser.error("--data is needed")
    run_all("targets.py", calls, 1)
    PAGE.write_text(page(PAGE.read_text(), measured()))


if __name__ == "__main__":
    main()
