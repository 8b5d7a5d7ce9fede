"""Measure what multiples of 4 channels cost in accuracy, without training.

    python bench/widths.py cifar10 --data DIR --weights DIR [--networks PATTERN] [--seeds 3]
    python bench/widths.py imagenet --data DIR --weights DIR

By default every layer keeps a multiple of four filters, and of 16 where feature maps are
concatenated. For each network and calibration set this prunes to the same fraction of the MACs with
free widths, by default and with multiples of 4, 8 and 16, and refits. CIFAR-10's networks are
refitted on 2,000 images, MobileNetV2 and SqueezeNet on 300 ordinary images of ImageNet. They are
scored on the test images, which choose nothing. Each measurement adds a line to
`results/widths.jsonl`, and the table is in docs/explanation/widths.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import statistics

import torch

from measurements import Measurement, append_measurement, key_of, read_measurements
from rows import ROOT, revision, surroundings
from secateur.pipeline.inputs import make_reader
from secateur.pipeline.scoring_context import make_scoring_context
from studies import (
    channels_last,
    fraction_equal,
    labels,
    load_study_network,
    predictions,
    study_parser,
)
from tables import with_table
from training_free import Ours

RESULTS = ROOT / "results" / "widths.jsonl"
PAGE = ROOT / "docs" / "explanation" / "widths.md"
KEY = ("network", "target", "round_to", "seed")
TARGETS = {
    "resnet20": "macs=0.5",
    "resnet56": "macs=0.5",
    "mobilenetv2": "macs=0.8",
    "squeezenet1_1": "macs=0.8",
}
NETWORKS = {"cifar10": ("resnet20", "resnet56"), "imagenet": ("mobilenetv2", "squeezenet1_1")}
MULTIPLES = (1, 0, 4, 8, 16)
"""0 stands for the default."""


def main() -> None:
    """Measure the missing rows and write the table."""
    parser = study_parser(__doc__, NETWORKS)
    parser.add_argument("--multiples", type=int, nargs="+", default=MULTIPLES)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.data is not None:
        known = {key_of(row, KEY) for row in read_measurements(RESULTS, KEY)}
        networks = fnmatch.filter(NETWORKS[arguments.study], arguments.networks)
        for network, seed in itertools.product(networks, range(arguments.seeds)):
            missing = [
                multiple
                for multiple in arguments.multiples
                if (network, TARGETS[network], multiple, seed) not in known
            ]
            if missing:
                measure(network, seed, missing, arguments)
    rows = read_measurements(RESULTS, KEY)
    PAGE.write_text(with_table(PAGE.read_text(), "results/widths.jsonl", table(rows)))


def measure(network: str, seed: int, multiples: list[int], arguments: argparse.Namespace) -> None:
    """Append a row for each multiple."""
    config, dataset, model = load_study_network(network, arguments)
    batches = channels_last(make_reader(config).read_shard(dataset.test))
    before = fraction_equal(predictions(model, batches), labels(batches))
    target = TARGETS[network]
    for multiple in multiples:
        plan = config.plan.model_copy(update={"target": target, "round_to": multiple or None})
        run_config = config.model_copy(update={"plan": plan, "seed": seed})
        context = make_scoring_context(
            model, dataset, run_config, criterion_names=(run_config.score.criterion,)
        )
        pruned = Ours(model, context, run_config).prune(target)
        smaller = pruned.stages["refit"]
        row: Measurement = {
            "network": network,
            "target": target,
            "round_to": multiple,
            "seed": seed,
            "before_fraction": before,
            "macs_left": pruned.macs_left,
            "test_fraction": fraction_equal(predictions(smaller, batches), labels(batches)),
            "threads": torch.get_num_threads(),
            "command": f"python bench/widths.py {arguments.study} --data DIR --weights DIR",
            "revision": revision(),
            "environment": surroundings(),
        }
        print(row, flush=True)
        append_measurement(RESULTS, row)


def table(rows: list[Measurement]) -> str:
    """Return accuracy by network and multiple, means over the seeds, and the change by seed."""
    lines = [
        "| network, before | multiple of | seeds | MACs left | top-1 | change, mean ± sd |",
        "|---|---|---|---|---|---|",
    ]
    for network, multiple in itertools.product(TARGETS, MULTIPLES):
        mine = {(row["round_to"], row["seed"]): row for row in rows if row["network"] == network}
        seeds = [seed for kind, seed in mine if kind == multiple]
        if not seeds:
            continue
        selected = [mine[multiple, seed] for seed in seeds]
        changes = [
            100 * (mine[multiple, seed]["test_fraction"] - mine[1, seed]["test_fraction"])
            for seed in seeds
            if (1, seed) in mine
        ]
        spread = f" ± {statistics.stdev(changes):.2f}" if len(changes) > 1 else ""
        change = f"{statistics.mean(changes):+.2f}{spread}" if changes and multiple != 1 else "–"
        lines.append(
            f"| {network}, {100 * selected[0]['before_fraction']:.2f} | {multiple or 'default'} | "
            f"{len(seeds)} | {statistics.mean(row['macs_left'] for row in selected):.3f} | "
            f"{100 * statistics.mean(row['test_fraction'] for row in selected):.2f} | "
            f"{change.replace('-', '−')} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
