"""Take secateur's parts away one by one, at equal MACs, without training and without labels.

    python bench/ablation.py --data DIR --weights DIR [--networks PATTERN] [--seeds 3]

ResNet-20 is pruned to half of its MACs on 2,000 images of CIFAR-10, MobileNetV2 to 0.8 on 300
images of ImageNet, by the defaults, without each part, with other criteria in place of the vote,
and by channels and rank. The test images choose nothing. `--data` and `--weights` are as for
`bench/training_free.py`: for MobileNetV2, `--data` is the folder of `imagenet_sample`. Each
measurement adds a line to `results/ablation.jsonl`, and the table is in docs/research/ablation.md;
`--tables` only writes that.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import statistics
from collections.abc import Sequence

import torch

from measurements import Measurement, append_measurement, key_of, read_measurements
from rows import ROOT, revision, surroundings
from tables import with_table
from training_free import CRITERIA, OURS, PARTS, RANK, Method, Study

RESULTS = ROOT / "results" / "ablation.jsonl"
PAGE = ROOT / "docs" / "research" / "ablation.md"
KEY = ("network", "seed", "part")
NETWORKS = {"resnet20": ("cifar10", "macs=0.5"), "mobilenetv2": ("imagenet", "macs=0.8")}
"""For each network its study and its target."""
ROWS = ("", *PARTS, *CRITERIA, RANK)
NAMES = {"": "the defaults", **{name: f"{name} in place of the vote" for name in CRITERIA}}


def main() -> None:
    """Measure the missing rows and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="the folder of CIFAR-10, or of the ImageNet samples")
    parser.add_argument("--weights", help="folder of the weights")
    parser.add_argument("--networks", default="*", help="pattern of networks")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tables", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.tables:
        if arguments.data is None or arguments.weights is None:
            parser.error("--data and --weights are needed")
        for network in fnmatch.filter(NETWORKS, arguments.networks):
            measure(network, arguments)
    rows = read_measurements(RESULTS, KEY)
    PAGE.write_text(with_table(PAGE.read_text(), "results/ablation.jsonl", table(rows)))


def measure(network: str, arguments: argparse.Namespace) -> None:
    """Append the missing rows of a network, seed by seed."""
    study_name, target = NETWORKS[network]
    known = {key_of(row, KEY) for row in read_measurements(RESULTS, KEY)}
    study: Study | None = None
    for seed, part in itertools.product(range(arguments.seeds), ROWS):
        if (network, seed, part) in known:
            continue
        study = study or Study(study_name, network, arguments)
        (measurement,) = study.measure(Method(OURS, part), seed, [target])
        head: Measurement = {"network": network, "seed": seed, "part": part, "target": target}
        origin = {
            "command": "python bench/ablation.py --data DIR --weights DIR",
            "revision": revision(),
            "environment": surroundings(),
        }
        append_measurement(RESULTS, head | study.base | measurement | origin)


def table(rows: Sequence[Measurement]) -> str:
    """Return top-1 by network and part, and what is lost against the defaults on the same images.

    Of ImageNet networks the agreement with the original on images that were not used stands beside.
    """
    networks = [name for name in NETWORKS if any(row["network"] == name for row in rows)]
    heads = []
    for name in networks:
        row = next(row for row in rows if row["network"] == name)
        fraction = row["target"].removeprefix("macs=")
        heads += [f"{name} at {fraction} (before: {100 * row['base_fraction']:.2f})", "change"]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for part in ROWS:
        cells = itertools.chain.from_iterable(_cells(rows, name, part) for name in networks)
        lines.append(f"| {NAMES.get(part, part)} | {' | '.join(cells)} |")
    seeds = sorted({len({row["seed"] for row in rows if row["network"] == n}) for n in networks})
    count = " or ".join(map(str, seeds))
    return "\n".join(
        [
            *lines,
            "",
            f"Top-1 in %, means over {count} calibration sets; in brackets the agreement in % with "
            "the original network on images that were not used. Changes are in points, on the "
            "same calibration sets.",
        ]
    )


def _cells(rows: Sequence[Measurement], network: str, part: str) -> tuple[str, str]:
    by_part = {
        name: {row["seed"]: row for row in rows if (row["network"], row["part"]) == (network, name)}
        for name in ("", part)
    }
    mine, whole = by_part[part], by_part[""]
    if not mine:
        return "–", "–"
    top1 = [100 * row["refit_fraction"] for row in mine.values()]
    spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
    agreements = [100 * r["agreement_fraction"] for r in mine.values() if "agreement_fraction" in r]
    agreement = f" ({statistics.mean(agreements):.1f})" if agreements else ""
    changes = [
        100 * (row["refit_fraction"] - whole[seed]["refit_fraction"])
        for seed, row in mine.items()
        if seed in whole
    ]
    change = f"{statistics.mean(changes):+.2f}" if part and changes else ""
    return f"{statistics.mean(top1):.2f}{spread}{agreement}", change


if __name__ == "__main__":
    main()
