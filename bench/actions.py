"""Compare actions at equal measured latency, without training: channels alone, with rank or depth.

    python bench/actions.py cifar10 --data DIR --weights DIR [--networks PATTERN] [--seeds 3]
    python bench/actions.py imagenet --data DIR --weights DIR

For each of secateur's sets of actions this looks for the budget whose network takes 0.7 of the
original's time: both compiled by `torch.compile`, 16 images at a time, timed interleaved on one
thread. The budget is one of MACs or of latency, which is planned by the times of layers that are
not compiled. CIFAR-10's networks are refitted on 2,000 images, MobileNetV2 on 300 ordinary images
of ImageNet, without labels. They are scored on the test images, which choose nothing. Each
measurement adds a line to `results/actions.jsonl`, and the table is in docs/research/depth.md. It
needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import itertools
import statistics

import torch
from torch import Tensor, nn

from interleaved import Forward, time_interleaved
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
    search_budget,
    study_parser,
)
from tables import with_table
from training_free import Ours

RESULTS = ROOT / "results" / "actions.jsonl"
PAGE = ROOT / "docs" / "research" / "depth.md"
KEY = ("network", "actions", "planned_by", "seed")
NETWORKS = {"cifar10": ("resnet20", "resnet56"), "imagenet": ("mobilenetv2",)}
ACTIONS = (
    ("channels", "macs"),
    ("channels", "latency"),
    ("channels,rank", "macs"),
    ("rank", "macs"),
    ("depth", "latency"),
    ("channels,depth", "macs"),
    ("channels,depth", "latency"),
)
"""Sets of actions, and the quantity that they are planned by."""
TIME_LEFT = 0.7
NEAR = 0.02
"""Measured fractions that differ by less count as equal."""
ATTEMPTS = 4
BATCH = 16


def main() -> None:
    """Measure the missing rows and write the table."""
    parser = study_parser(__doc__, NETWORKS)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.data is not None:
        known = {key_of(row, KEY) for row in read_measurements(RESULTS, KEY)}
        networks = NETWORKS[arguments.study]
        for network, seed in itertools.product(networks, range(arguments.seeds)):
            if fnmatch.fnmatch(network, arguments.networks):
                missing = [
                    action_set
                    for action_set in ACTIONS
                    if (network, *action_set, seed) not in known
                ]
                measure(network, seed, missing, arguments)
    rows = read_measurements(RESULTS, KEY)
    PAGE.write_text(with_table(PAGE.read_text(), "results/actions.jsonl", table(rows)))


def measure(
    network: str, seed: int, action_sets: list[tuple[str, str]], arguments: argparse.Namespace
) -> None:
    """Append a row for each set of actions."""
    config, dataset, model = load_study_network(network, arguments)
    batches = channels_last(make_reader(config).read_shard(dataset.test))
    before = fraction_equal(predictions(model, batches), labels(batches))
    images = batches[0].images[:BATCH]
    for actions, planned_by in action_sets:
        target = f"{planned_by}={TIME_LEFT}"
        plan = config.plan.model_copy(
            update={"actions": tuple(actions.split(",")), "target": target}
        )
        run_config = config.model_copy(update={"plan": plan, "seed": seed})
        context = make_scoring_context(
            model, dataset, run_config, criterion_names=(run_config.score.criterion,)
        )
        pruner = Ours(model, context, run_config)

        def attempt(budget: float, pruner: Ours = pruner, by: str = planned_by) -> Measurement:
            pruned = pruner.prune(f"{by}={budget:.4f}")
            smaller = pruned.stages["refit"]
            ratios = time_ratios(model, smaller, images)
            return {
                "macs_left": pruned.macs_left,
                "time_left": statistics.median(ratios),
                "time_left_quartiles": statistics.quantiles(ratios, n=4)[::2],
                "test_fraction": fraction_equal(predictions(smaller, batches), labels(batches)),
            }

        best = search_budget(attempt, TIME_LEFT, NEAR, ATTEMPTS)
        append_measurement(
            RESULTS,
            {
                "network": network,
                "actions": actions,
                "planned_by": planned_by,
                "seed": seed,
                "before_fraction": before,
                **best,
                "command": f"python bench/actions.py {arguments.study} --data DIR --weights DIR",
                "revision": revision(),
                "environment": surroundings(),
            },
        )


def time_ratios(model: nn.Module, smaller: nn.Module, images: Tensor) -> list[float]:
    """Return the time of the smaller network over that of the original, in each turn."""
    forwards = {"original": compiled(model, images), "smaller": compiled(smaller, images)}
    seconds = time_interleaved(forwards, images)
    return [
        mine / whole for mine, whole in zip(seconds["smaller"], seconds["original"], strict=True)
    ]


def compiled(model: nn.Module, images: Tensor) -> Forward:
    """Return the compiled network, after its first call."""
    forward: Forward = torch.compile(copy.deepcopy(model).eval(), dynamic=False)
    with torch.no_grad():
        forward(images)
    return forward


def table(rows: list[Measurement]) -> str:
    """Return MACs, time and accuracy by network and actions, means over the seeds."""
    lines = [
        "| network, before | actions | planned by | MACs left | time left | top-1 |",
        "|---|---|---|---|---|---|",
    ]
    networks = itertools.chain.from_iterable(NETWORKS.values())
    for network, action_set in itertools.product(networks, ACTIONS):
        mine = [
            row
            for row in rows
            if (row["network"], row["actions"], row["planned_by"]) == (network, *action_set)
        ]
        if not mine:
            continue
        accuracies = [100 * row["test_fraction"] for row in mine]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(mine) > 1 else ""
        times = [row["time_left"] for row in mine]
        lines.append(
            f"| {network}, {100 * mine[0]['before_fraction']:.2f} | {' | '.join(action_set)} | "
            f"{statistics.mean(row['macs_left'] for row in mine):.2f} | "
            f"{min(times):.2f} to {max(times):.2f} | {statistics.mean(accuracies):.2f}{spread} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
