"""Compare `--max-drop` and latency targets with measurements, without training.

    python bench/promises.py --data DIR --resnet56 FILE --vgg16 FILE

ResNet-56 and VGG-16 are pruned to the smallest network that loses at most one point on validation
images, and to 0.6 of the time of a forward pass. Then accuracy on validation images and both
networks' forward passes (interleaved) are measured. Each combination adds a line to
`results/promises.jsonl`; lines that are already there are not measured again. VGG-16's weights are
those that `secateur train` writes. Finally the table in docs/reference/targets.md is written;
without weights only that. Times use all threads of the machine: leave it idle.
"""

from __future__ import annotations

import argparse
import statistics

from cells import Cell, key_of, put_cell, read_cells, run_all
from rows import ROOT, revision, surroundings
from secateur.config import PlanSection, RefitSection
from secateur.errors import TargetError
from secateur.evaluation.evaluate import evaluate
from secateur.evaluation.timing import LATENCY_BATCH, repeat_to_batch
from secateur.pipeline.inputs import load_inputs, make_reader
from secateur.pipeline.prune import prune
from secateur.pipeline.scoring_context import make_scoring_context
from secateur.pruning.cost.quantities import count_quantity
from studies import cifar10
from tables import with_table
from turns import in_turns

RESULTS = ROOT / "results" / "promises.jsonl"
PAGE = ROOT / "docs" / "reference" / "targets.md"
KEY = ("network", "promise")
NETWORKS = {"resnet56": "resnet56", "vgg16": "vgg16_bn"}
"""Option that names the weights -> network."""
PROMISES = {
    "max-drop=1": PlanSection(target="macs=0.5", max_drop=1.0),
    "latency=0.6": PlanSection(target="latency=0.6"),
    "latency=0.6 prune-residual": PlanSection(target="latency=0.6", prune_residual=True),
}
NO_STREAM = ("vgg16_bn", "latency=0.6 prune-residual")
"""It has no residual sums: the same as without."""


def cells() -> list[Cell]:
    """What has been measured."""
    return read_cells(RESULTS, KEY)


def measure(data: str, network: str, promise: str, weights: str) -> Cell:
    """One network pruned by one promise, and what came of it."""
    config = cifar10(network, argparse.Namespace(data=data, weights=""))
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"weights": weights}),
            "plan": PROMISES[promise],
            "refit": RefitSection(),
            "finetune": config.finetune.model_copy(update={"epochs": 0}),
        }
    )
    found = {
        "network": network,
        "promise": promise,
        "seed": config.seed,
        "command": "python bench/promises.py --data DIR --resnet56 FILE --vgg16 FILE",
        "revision": revision(),
        "environment": surroundings(),
    }
    dataset, model = load_inputs(config)
    try:
        pruned = prune(model, dataset, config)
    except TargetError as error:
        return {**found, "refused": str(error)}
    config = pruned.result.config
    networks = {"before": model.eval(), "after": pruned.model.eval()}
    shown = list(make_reader(config).read_shard(dataset.validation))
    validation = {name: evaluate(each, shown).top1_fraction for name, each in networks.items()}
    test = {
        "before": pruned.result.stages[0].score,
        "after": pruned.result.stages[-1].score,
    }
    seconds = in_turns(networks, repeat_to_batch(shown[0].images, LATENCY_BATCH))
    predicted = None
    if pruned.latency is not None:
        dependencies = make_scoring_context(model, dataset, config).dependencies
        time_of = count_quantity(dependencies, "latency", pruned.latency)
        predicted = time_of(pruned.plan.removed) / time_of({})
    return {
        **found,
        "validation_fraction": validation,
        "test_fraction": {name: score.top1_fraction for name, score in test.items()},
        "macs_left": test["after"].macs / test["before"].macs,
        "parameters_left": test["after"].parameters / test["before"].parameters,
        "seconds": seconds,
        "latency_left_predicted": predicted,
        "trials": [
            [t.fraction_left, t.validation_top1_fraction] for t in pruned.result.size_trials
        ],
    }


def table(found: list[Cell]) -> str:
    """Return the table of targets and what was measured for them."""
    lines = [
        "| network | options | validation top-1 | test top-1 | MACs left | time left: predicted | "
        "measured | ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in sorted(found, key=lambda each: key_of(each, KEY)):
        if "refused" in cell:
            reason = cell["refused"].partition(" (")[0]
            lines.append(
                f"| {cell['network']} | `{cell['promise']}` | refused: {reason} | | | | | |"
            )
            continue
        times = {n: 1e3 * statistics.median(each) for n, each in cell["seconds"].items()}
        predicted = cell["latency_left_predicted"]
        texts = [
            cell["network"],
            f"`{cell['promise']}`",
            *(_percents(cell[f"{images}_fraction"]) for images in ("validation", "test")),
            f"{cell['macs_left']:.3f}",
            "–" if predicted is None else f"{predicted:.3f}",
            f"{times['after'] / times['before']:.3f}",
            f"{times['before']:.1f} → {times['after']:.1f}",
        ]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


def _percents(fractions: dict[str, float]) -> str:
    return " → ".join(f"{100 * fractions[name]:.2f}" for name in ("before", "after"))


def page(text: str, found: list[Cell]) -> str:
    """The page with its table brought up to date."""
    return with_table(text, "results/promises.jsonl", table(found))


def main() -> None:
    """Measures what is missing and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="the folder of CIFAR-10")
    for option in NETWORKS:
        parser.add_argument(f"--{option}", help="weights")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        put_cell(RESULTS, measure(arguments.data, *arguments.child))
        return
    known = {key_of(cell, KEY) for cell in cells()}
    calls = [
        ["--data", arguments.data, "--child", network, promise, weights]
        for option, network in NETWORKS.items()
        if (weights := getattr(arguments, option)) is not None
        for promise in PROMISES
        if (network, promise) not in known and (network, promise) != NO_STREAM
    ]
    if calls and arguments.data is None:
        parser.error("--data is needed")
    run_all("promises.py", calls, 1)
    PAGE.write_text(page(PAGE.read_text(), cells()))


if __name__ == "__main__":
    main()
