"""Compare plans by time in an engine with plans by MACs that take the same time there.

    python bench/engine_targets.py cifar10 --data DIR --weights DIR [--seeds 1]
    python bench/engine_targets.py imagenet --data DIR --weights DIR

For each network this looks for the budget whose pruned network takes 0.6 of the original's time in
onnxruntime: 16 images at a time, interleaved, on one thread; once with a budget of latency, planned
by the times of layers in that engine, and once with one of MACs. ResNet-56 is refitted on 2,000
images of CIFAR-10, MobileNetV2 on 300 ordinary ones of ImageNet, without labels. They are scored on
the test images, which choose nothing. Each measurement adds a line to
`results/engine_targets.jsonl`, and the table is in docs/reference/targets.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools

import torch

from measurements import Measurement, append_measurement, key_of, read_measurements
from rows import ROOT, revision, surroundings
from secateur.config import EngineName
from secateur.engines.registry import find_engine
from secateur.pipeline.inputs import make_reader
from secateur.pipeline.scoring_context import make_scoring_context
from secateur.pruning.cost.latency_profiler import Stopwatch
from studies import (
    channels_last,
    fraction_equal,
    labels,
    load_study_network,
    predictions,
    search_budget,
    study_parser,
)
from tables import with_table
from training_free import Ours

RESULTS = ROOT / "results" / "engine_targets.jsonl"
PAGE = ROOT / "docs" / "reference" / "targets.md"
KEY = ("network", "planned_by", "seed")
NETWORKS = {"cifar10": ("resnet56",), "imagenet": ("mobilenetv2",)}
ENGINE: EngineName = "onnxruntime"
TIME_LEFT, NEAR = 0.6, 0.015
ATTEMPTS = 5


def main() -> None:
    """Measure the missing rows and write the table."""
    parser = study_parser(__doc__, NETWORKS)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.data is not None:
        known = {key_of(row, KEY) for row in read_measurements(RESULTS, KEY)}
        networks = fnmatch.filter(NETWORKS[arguments.study], arguments.networks)
        for network, planned_by, seed in itertools.product(
            networks, ("latency", "macs"), range(arguments.seeds)
        ):
            if (network, planned_by, seed) not in known:
                append_measurement(RESULTS, measure(network, planned_by, seed, arguments))
    rows = read_measurements(RESULTS, KEY)
    text = with_table(PAGE.read_text(), "results/engine_targets.jsonl", table(rows))
    PAGE.write_text(text)


def measure(network: str, planned_by: str, seed: int, arguments: argparse.Namespace) -> Measurement:
    """Return the row of the network whose time is nearest to the wanted one."""
    config, dataset, model = load_study_network(network, arguments)
    batches = channels_last(make_reader(config).read_shard(dataset.test))
    before = fraction_equal(predictions(model, batches), labels(batches))
    changes = {"target": f"{planned_by}={TIME_LEFT}", "engine": ENGINE}
    plan = config.plan.model_copy(update=changes)
    run_config = config.model_copy(update={"plan": plan, "seed": seed})
    context = make_scoring_context(
        model, dataset, run_config, criterion_names=(run_config.score.criterion,)
    )
    pruner = Ours(model, context, run_config)
    stopwatch = Stopwatch(model, context.example, find_engine(ENGINE))

    def attempt(budget: float) -> Measurement:
        pruned = pruner.prune(f"{planned_by}={budget:.4f}")
        smaller = pruned.stages["refit"]
        return {
            "macs_left": pruned.macs_left,
            "time_left": stopwatch.fraction_left(smaller),
            "test_fraction": fraction_equal(predictions(smaller, batches), labels(batches)),
        }

    best = search_budget(attempt, TIME_LEFT, NEAR, ATTEMPTS)
    return {
        "network": network,
        "planned_by": planned_by,
        "engine": ENGINE,
        "seed": seed,
        "before_fraction": before,
        **best,
        "command": f"python bench/engine_targets.py {arguments.study} --data DIR --weights DIR",
        "revision": revision(),
        "environment": surroundings("onnxruntime"),
    }


def table(rows: list[Measurement]) -> str:
    """Return time, MACs and accuracy by network and plan."""
    lines = [
        "| network, before | planned by | seed | time left in onnxruntime | MACs left | top-1 |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: key_of(row, KEY)):
        lines.append(
            f"| {row['network']}, {100 * row['before_fraction']:.1f} | {row['planned_by']} | "
            f"{row['seed']} | {row['time_left']:.3f} | {row['macs_left']:.3f} | "
            f"{100 * row['test_fraction']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
