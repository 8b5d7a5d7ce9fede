"""What README and front page show of the results: `python bench/headline.py`.

Draws `docs/images/headline.png` from `results/training_free.jsonl` and `results/finetuned.jsonl`,
and writes the table of criteria in README from the latter. Nothing is measured.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from PIL import Image

from tables import with_table

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "headline.png"
README = ROOT / "README.md"
TABLE = "results/finetuned.jsonl refit"
NETWORKS = {"resnet56": "ResNet-56", "resnet32": "ResNet-32", "resnet20": "ResNet-20"}
TARGETS = {0.7: "macs=0.7", 0.5: "macs=0.5"}
CRITERIA = {"vote": "`vote` (default)", "l1": "`l1`", "taylor": "`taylor`", "random": "`random`"}
PEER = "torch-pruning "
Row = dict[str, Any]


def rows(name: str) -> list[Row]:
    """Return the lines of a file in `results/`."""
    return [json.loads(line) for line in (ROOT / "results" / name).read_text().splitlines()]


def means(
    lines: Sequence[Row], key: Callable[[Row], Any], value: Callable[[Row], float | None]
) -> dict[Any, float]:
    """Return the mean over the seeds, in %, by key; skip lines without a value."""
    groups: dict[Any, list[float]] = defaultdict(list)
    for line in lines:
        fraction = value(line)
        if fraction is not None:
            groups[key(line)].append(fraction)
    return {name: 100 * statistics.mean(values) for name, values in groups.items()}


def training_free(network: str) -> dict[str, list[float]]:
    """Return top-1 in % before and at every target: secateur, the best peer, and the peer's L1."""
    lines = [
        line
        for line in rows("training_free.jsonl")
        if line["study"] == "cifar10" and line["network"] == network and "cut_fraction" in line
    ]
    accuracies = means(
        lines,
        lambda line: (line["target"], line["method"], line["options"]),
        lambda line: line.get("refit_fraction", line.get("recalibrated_fraction")),
    )
    before = 100 * lines[0]["base_fraction"]
    series: dict[str, list[float]] = {"secateur": [before], "best": [before], "l1": [before]}
    for target in TARGETS.values():
        peers = {key[1]: 0.0 for key in accuracies if key[1].startswith(PEER)}
        for (goal, method, _), top1 in accuracies.items():
            if goal == target and method in peers:
                peers[method] = max(peers[method], top1)
        series["secateur"].append(accuracies[target, "secateur", ""])
        series["best"].append(max(peers.values()))
        series["l1"].append(peers[PEER + "l1"])
    return series


def criteria() -> dict[tuple[str, str, str], float]:
    """Return top-1 in % of ResNet-20 by criterion, target and stage (`refit` or `finetuned`)."""
    lines = [
        {**line, "stage": stage, "top1": line[f"{stage}_top1_fraction"]}
        for line in rows("finetuned.jsonl")
        for stage in ("refit", "finetuned")
        if line["criterion"] in CRITERIA
    ]
    return means(
        lines,
        lambda line: (line["criterion"], line["target"], line["stage"]),
        lambda line: line["top1"],
    )


def draw(path: Path) -> None:
    """Draw accuracy against MACs, without labels or training, for three networks."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.4), sharey=True, layout="constrained")
    places = [1.0, *TARGETS]
    for axis, (network, title) in zip(axes, NETWORKS.items(), strict=True):
        series = training_free(network)
        axis.plot(
            places, series["best"], "s--", color="#c2570c", label="best Torch-Pruning criterion"
        )
        axis.plot(places, series["l1"], "v:", color="#8a6d3b", label="Torch-Pruning L1")
        if network == "resnet20":
            random = [criteria()["random", target, "refit"] for target in TARGETS.values()]
            label = "random filters with secateur's refit (ResNet-20)"
            axis.plot(places, [series["l1"][0], *random], "x-.", color="#777777", label=label)
        axis.plot(
            places, series["secateur"], "o-", color="#0b6e4f", linewidth=2.5, label="secateur"
        )
        for name, offset in (("secateur", (0, 6)), ("best", (17, 0))):
            for place, top1 in zip(places[1:], series[name][1:], strict=True):
                axis.annotate(
                    f"{top1:.1f}",
                    (place, top1),
                    xytext=offset,
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
        axis.set_title(f"{title} ({series['best'][0]:.1f} % unpruned)", fontsize=10)
        axis.set_xlim(1.04, 0.40)
        axis.set_ylim(50, 99)
        axis.set_xticks(places, [f"{place:.0%}" for place in places])
        axis.set_xlabel("remaining MACs")
        axis.grid(color="#dddddd")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test top-1, %")
    handles, labels = axes[2].get_legend_handles_labels()
    order = [3, 0, 1, 2]
    figure.legend(
        [handles[index] for index in order],
        [labels[index] for index in order],
        loc="outside lower center",
        ncols=4,
        fontsize=8,
        frameon=False,
    )
    figure.suptitle("CIFAR-10, 2,000 unlabelled images, no training", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    colours = Image.open(path).convert("RGB").quantize(64)
    colours.save(path, optimize=True)


def table() -> str:
    """Return README's table: each criterion after the refit, and after ten epochs of training."""
    top1 = criteria()
    lines = [
        "| criterion | 70 % of MACs, refit | 50 % of MACs, refit "
        "| 70 %, ten epochs | 50 %, ten epochs |",
        "|---|---|---|---|---|",
    ]
    for criterion, shown in CRITERIA.items():
        cells = [
            f"{top1[criterion, target, stage]:.2f}"
            for stage in ("refit", "finetuned")
            for target in TARGETS.values()
        ]
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def readme(text: str) -> str:
    """Return README with its table of criteria up to date."""
    return with_table(text, TABLE, table())


def main() -> None:
    """Draw the picture and write the table."""
    draw(PICTURE)
    README.write_text(readme(README.read_text()))


if __name__ == "__main__":
    main()
