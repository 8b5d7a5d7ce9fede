"""Prune to a latency in an engine, beside plans by MACs that take the same time there.

    python bench/engine_targets.py cifar10 --data DIR --weights DIR [--seeds 1]
    python bench/engine_targets.py imagenet --data DIR --weights DIR

Each network is pruned to `latency=0.6` in onnxruntime, as `secateur prune --no-finetune` does it,
and then by MACs, to the budget whose network takes the same time. One stopwatch measures both anew
beside the original: 16 images at a time, interleaved, on one thread. ResNet-56 is refitted on 2,000
images of CIFAR-10, MobileNetV2 on 300 ordinary ones of ImageNet, without labels. They are scored on
the test images, which choose nothing. ResNet-50 has random weights, equal shares and no refit: only
its time is measured. Each measurement adds a line to `results/engine_targets.jsonl`, and the table
is in docs/reference/targets.md.
"""

from __future__ import annotations

import argparse
import fnmatch
from functools import partial

import torch
import torchvision
from torch import nn

from measurements import Measurement, append_measurement, key_of, read_measurements
from rows import ROOT, revision, surroundings
from secateur.config import EngineName, PlanSection, RefitSection, RunConfig, ScoreSection
from secateur.data import DataSet
from secateur.engines.registry import find_engine
from secateur.graph.build import build_dependency_graph
from secateur.pipeline.inputs import make_reader
from secateur.pipeline.prune import prune
from secateur.pruning.cost.latency_profiler import Stopwatch
from studies import accuracy, channels_last, load_study_network, search_budget, study_parser
from tables import with_table

RESULTS = ROOT / "results" / "engine_targets.jsonl"
PAGE = ROOT / "docs" / "reference" / "targets.md"
KEY = ("network", "planned_by", "seed")
NETWORKS = {"cifar10": ("resnet56",), "imagenet": ("mobilenetv2", "resnet50")}
UNTRAINED = ("resnet50",)
ENGINE: EngineName = "onnxruntime"
TIME_LEFT, NEAR = 0.6, 0.01
EXAMPLES = 2
ATTEMPTS = 5


def main() -> None:
    """Measure the missing rows and write the table."""
    parser = study_parser(__doc__, NETWORKS)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.data is not None:
        for network in fnmatch.filter(NETWORKS[arguments.study], arguments.networks):
            for seed in range(arguments.seeds):
                measure(network, seed, arguments)
    rows = read_measurements(RESULTS, KEY)
    text = with_table(PAGE.read_text(), "results/engine_targets.jsonl", table(rows))
    PAGE.write_text(text)


def measure(network: str, seed: int, arguments: argparse.Namespace) -> None:
    """Append the rows of a network that the file lacks."""
    rows = {key_of(row, KEY): row for row in read_measurements(RESULTS, KEY)}
    keys = [(network, planned_by, seed) for planned_by in ("latency", "macs")]
    if network in UNTRAINED:
        keys = keys[:1]
    if all(key in rows for key in keys):
        return
    case = Case(network, seed, arguments)
    time_left = TIME_LEFT
    for key in keys:
        if key not in rows:
            attempt = partial(case.attempt, key[1])
            measured = (
                {"budget": TIME_LEFT, **attempt(TIME_LEFT)}
                if key[1] == "latency"
                else search_budget(attempt, time_left, NEAR, ATTEMPTS)
            )
            rows[key] = {**dict(zip(KEY, key, strict=True)), **case.described, **measured}
            append_measurement(RESULTS, rows[key])
            print(table([rows[key]]), flush=True)
        time_left = rows[key]["time_left"]


class Case:
    """A network with its images, which is pruned to budgets and timed."""

    def __init__(self, network: str, seed: int, arguments: argparse.Namespace) -> None:
        self._config, self._dataset, self._model = load(network, arguments)
        self._seed, self._is_trained = seed, network not in UNTRAINED
        reader = make_reader(self._config)
        self._batches = channels_last(reader.read_shard(self._dataset.test))
        self._images = reader.read_first(self._dataset.train, EXAMPLES)
        self._stopwatch = Stopwatch(self._model, self._images, find_engine(ENGINE))
        self.described: Measurement = {
            "engine": ENGINE,
            "is_trained": self._is_trained,
            "before_fraction": self._accuracy(self._model),
            "command": f"python bench/engine_targets.py {arguments.study} --data DIR --weights DIR",
            "revision": revision(),
            "environment": surroundings("onnxruntime"),
        }

    def attempt(self, planned_by: str, budget: float) -> Measurement:
        """Prune to a budget without training; return size, time and accuracy."""
        plan = self._config.plan.model_copy(
            update={"target": f"{planned_by}={budget:.4f}", "engine": ENGINE}
        )
        finetune = self._config.finetune.model_copy(update={"epochs": 0})
        changes = {"plan": plan, "finetune": finetune, "seed": self._seed}
        config = self._config.model_copy(update=changes)
        smaller = prune(self._model, self._dataset, config).model
        macs = [build_dependency_graph(one, self._images).macs() for one in (self._model, smaller)]
        return {
            "macs_left": macs[1] / macs[0],
            "time_left": self._stopwatch.fraction_left(smaller),
            "test_fraction": self._accuracy(smaller),
        }

    def _accuracy(self, network: nn.Module) -> float | None:
        return accuracy(network, self._batches) if self._is_trained else None


def load(network: str, arguments: argparse.Namespace) -> tuple[RunConfig, DataSet, nn.Module]:
    """Return the configuration of a network's run, its images, and the network."""
    if network not in UNTRAINED:
        return load_study_network(network, arguments)
    config, dataset, _ = load_study_network("mobilenetv2", arguments)
    torch.manual_seed(0)
    model = getattr(torchvision.models, network)().eval()
    changes = {
        "plan": PlanSection(allocation="uniform"),
        "score": ScoreSection(criterion="l1"),
        "refit": RefitSection(layers="none", recalibrate_batchnorm=False),
        "model": config.model.model_copy(update={"allow_untrained": True}),
    }
    return config.model_copy(update=changes), dataset, model


def table(rows: list[Measurement]) -> str:
    """Return time, MACs and accuracy by network and plan."""
    lines = [
        "| network, before | planned by | seed | time left in onnxruntime | MACs left | top-1 |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: key_of(row, KEY)):
        before, after = (
            "–" if fraction is None else f"{100 * fraction:.1f}"
            for fraction in (row["before_fraction"], row["test_fraction"])
        )
        lines.append(
            f"| {row['network']}, {before} | {row['planned_by']} | {row['seed']} | "
            f"{row['time_left']:.3f} | {row['macs_left']:.3f} | {after} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
