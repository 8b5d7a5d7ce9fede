"""Compare our dissection with Network Dissection as published, on images with pixel masks.

    python bench/dissection.py --data DIR --weights DIR

Both use the same feature maps of the same images and find the best concept of each filter of each
group. Each network and data set makes a row of `results/dissection.json`; `--tables` only writes
the tables in docs/explanation/dissection.md. `--try --images N` is a quick trial.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagenet_networks import NETWORKS, load_network
from rows import ROOT, Row, put_row, read_rows, revision, surroundings
from secateur.config import RunConfig
from secateur.data import DataSet, FileImages
from secateur.graph.taps import Kernels
from secateur.pipeline.scoring_context import make_scoring_context
from secateur.scoring.criteria import DeferredUpdate, FeatureBatch, Need, Regions
from secateur.scoring.dissection import DETECTOR_IOU, Dissection
from secateur.scoring.feature_pass import run_feature_pass
from tables import with_table

sys.path.append(str(ROOT / "tests"))
from literal_dissection import ExactThresholds, LiteralTally

RESULTS = ROOT / "results" / "dissection.json"
PAGE = ROOT / "docs" / "explanation" / "dissection.md"
IMAGE_SIZE = 224
QUANTILE = 0.01
TOP_DETECTORS = 8
"""Number of detectors that a row lists, each of another concept."""
DATA = ("camvid", "ccp")


class Thresholds:
    """Exact thresholds of every filter; an `Observer`."""

    needs: frozenset[Need] = frozenset({"maps"})

    def __init__(self, images: int, quantile: float) -> None:
        self._images = images
        self._quantile = quantile
        self.parts: dict[str, ExactThresholds] = {}

    def reset(self, parts: Mapping[str, Kernels]) -> None:
        """Nothing to prepare: how many positions there are is not known yet."""

    def update(self, features: FeatureBatch) -> None:
        """Keeps the largest activations."""
        positions = self._images * features.maps.shape[2] * features.maps.shape[3]
        if features.tap not in self.parts:
            self.parts[features.tap] = ExactThresholds(positions, self._quantile)
        self.parts[features.tap].add(features.maps)

    def state(self) -> Iterable[Tensor]:
        """None: this runs in one process."""
        return ()


class Literal:
    """Literal tallies of every filter; an `Observer`."""

    needs: frozenset[Need] = frozenset({"maps", "concepts"})

    def __init__(self, thresholds: Thresholds, concepts: int) -> None:
        self.parts = {
            part: LiteralTally(exact.values, concepts) for part, exact in thresholds.parts.items()
        }
        self.sizes: dict[str, tuple[int, int]] = {}

    def reset(self, parts: Mapping[str, Kernels]) -> None:
        """All is prepared."""

    def update(self, features: FeatureBatch) -> DeferredUpdate:
        """The tally waits for the masks, which it takes as they are."""
        maps = features.maps
        self.sizes[features.tap] = (maps.shape[2], maps.shape[3])

        def count(regions: Regions) -> None:
            masks = regions.masks_at((IMAGE_SIZE, IMAGE_SIZE))
            self.parts[features.tap].add(maps, masks, regions.concepts)

        return count

    def state(self) -> Iterable[Tensor]:
        """None: this runs in one process."""
        return ()


def configuration(network: str, source: str, arguments: argparse.Namespace) -> RunConfig:
    """Return a configuration with all images, positions and groups, skip connections included."""
    expected = NETWORKS[network]
    return RunConfig.model_validate(
        {
            "model": {"name": f"{Path(__file__).with_name('imagenet_networks.py')}:{network}"},
            "data": {
                "source": "none",
                "calibration_images": arguments.images or 10**6,
                "image_size": IMAGE_SIZE,
                "mean": expected.mean,
                "std": expected.std,
                "batch_size": 16,
            },
            "score": {
                "concepts": f"masks:{arguments.data}/{source}",
                "quantile": arguments.quantile,
                "sample_every": 1,
                "threshold_positions": IMAGE_SIZE**2,
            },
            "plan": {"prune_residual": True},
        }
    )


def measure(network: str, source: str, arguments: argparse.Namespace) -> Row:
    """Compare both on every filter of a network."""
    config = configuration(network, source, arguments)
    model = load_network(network, Path(arguments.weights))
    nothing = FileImages((), torch.zeros(0, dtype=torch.int64))
    context = make_scoring_context(model, DataSet("none", (), nothing, nothing, nothing), config)
    names = tuple(concept.name for concept in context.source.concepts)
    batches = list(context.reader.read_shard(context.calibration))

    def time_pass(*observers: Any) -> float:
        """Return the processor seconds of a pass; the images have been read."""
        start = time.process_time()
        run_feature_pass(
            model, context.dependencies, lambda: batches, observers, context.source, config.score
        )
        return time.process_time() - start

    ours = Dissection(names)
    our_seconds = time_pass(ours)
    thresholds = Thresholds(len(context.calibration.labels), arguments.quantile)
    literal_seconds = time_pass(thresholds)
    literal = Literal(thresholds, len(names))
    literal_seconds += time_pass(literal)
    layers = []
    for part, tally in literal.parts.items():
        figures = compare(tally.iou, ours.iou(part))
        layers.append({"layer": part, "map": list(literal.sizes[part]), **figures})
    detectors = [
        {
            "layer": part,
            "filter": filter_,
            "concept": names[concept],
            "iou": round(iou, 4),
            "our_concept": names[int(ours.iou(part)[filter_].argmax())],
            "our_iou": round(float(ours.iou(part)[filter_].amax()), 4),
        }
        for part, tally in literal.parts.items()
        for filter_, (iou, concept) in enumerate(
            zip(*(values.tolist() for values in tally.iou.max(1)), strict=True)
        )
        if iou > DETECTOR_IOU
    ]
    return {
        "network": network,
        "data": source,
        "images": len(context.calibration.labels),
        "concepts": len(names),
        "quantile": arguments.quantile,
        "seed": config.seed,
        "our_seconds": round(our_seconds, 1),
        "literal_seconds": round(literal_seconds, 1),
        "layers": layers,
        "top": top_of(detectors),
        "command": f"python bench/dissection.py --data DIR --weights DIR {_options(arguments)}",
        "revision": revision(),
        "environment": surroundings(),
    }


def _options(arguments: argparse.Namespace) -> str:
    images = f" --images {arguments.images}" if arguments.images else ""
    return f"--quantile {arguments.quantile:g}{images}"


def compare(literal: Tensor, ours: Tensor) -> Row:
    """Compare the best concepts in two tables `[filter, concept]` of IoUs."""
    best, concept = literal.max(1)
    our_best, our_concept = ours.max(1)
    is_detector = best > DETECTOR_IOU
    return {
        "filters": len(best),
        "detectors": int(is_detector.sum()),
        "our_detectors": int((our_best > DETECTOR_IOU).sum()),
        "same_concept": int((concept == our_concept)[is_detector].sum()),
        "spearman": rank_correlation(best, our_best),
        "mean_iou": float(best.mean()),
        "our_mean_iou": float(our_best.mean()),
    }


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Return Spearman's rank correlation; None if all values of one side are equal."""
    ranks = torch.stack([_ranks(a), _ranks(b)])
    correlation = float(ranks.corrcoef()[0, 1])
    return None if math.isnan(correlation) else correlation


def _ranks(values: Tensor) -> Tensor:
    """Return ranks; equal values get the mean of theirs."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    middle: Tensor = counts.cumsum(0).double() - (counts.double() - 1) / 2
    return middle[place]


def top_of(detectors: list[Row]) -> list[Row]:
    """Return the best detector of each concept, the best first."""
    ordered = sorted(detectors, key=lambda row: -row["iou"])
    first: dict[str, Row] = {}
    for row in ordered:
        first.setdefault(row["concept"], row)
    return list(first.values())[:TOP_DETECTORS]


# --- tables ------------------------------------------------------------------------------------


def ordered_rows() -> list[Row]:
    """Return the rows measured so far, in the order of the tables."""
    networks = list(NETWORKS)

    def place(row: Row) -> tuple[int, int, float]:
        return networks.index(row["network"]), DATA.index(row["data"]), -row["quantile"]

    return sorted(read_rows(RESULTS), key=place)


def summary(rows: list[Row]) -> str:
    """Return a table with one line for each network and data set."""
    lines = [
        "| network | images | q | layers | filters | detectors, literal | ours | same concept "
        "| Spearman: median (lowest) | layers ≥ 0.95 | CPU seconds, literal | ours |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        layers = row["layers"]
        detectors = sum(layer["detectors"] for layer in layers)
        same = sum(layer["same_concept"] for layer in layers)
        spearman = [layer["spearman"] for layer in layers if layer["spearman"] is not None]
        cells = [
            row["network"],
            f"{row['images']} of {row['data']}",
            f"{row['quantile']:g}",
            len(layers),
            sum(layer["filters"] for layer in layers),
            detectors,
            sum(layer["our_detectors"] for layer in layers),
            f"{100 * same / detectors:.1f} %" if detectors else "–",
            f"{statistics.median(spearman):.3f} ({min(spearman):.3f})",
            f"{sum(value >= 0.95 for value in spearman)} of {len(layers)}",
            f"{row['literal_seconds']:.0f}",
            f"{row['our_seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def by_layer(rows: list[Row]) -> str:
    """Return a table with one line for each layer of the first row."""
    shown = rows[0]
    lines = [
        "| layer | maps | filters | detectors, literal | ours | same concept | Spearman |",
        "|---|---|---|---|---|---|---|",
    ]
    for layer in shown["layers"]:
        same_percent = (
            f"{100 * layer['same_concept'] / layer['detectors']:.0f} %"
            if layer["detectors"]
            else "–"
        )
        spearman = "–" if layer["spearman"] is None else f"{layer['spearman']:.3f}"
        lines.append(
            f"| `{layer['layer']}` | {layer['map'][0]}×{layer['map'][1]} | {layer['filters']} "
            f"| {layer['detectors']} | {layer['our_detectors']} | {same_percent} | {spearman} |"
        )
    return "\n".join(
        [*lines, "", f"{rows[0]['network']}, {rows[0]['images']} images of {rows[0]['data']}."]
    )


def top(rows: list[Row]) -> str:
    """Return the best detectors of each row."""
    lines = [
        "| network | data | concept | layer | filter | IoU, literal | ours | our concept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for detector in row["top"]:
            lines.append(
                f"| {row['network']} | {row['data']} | {detector['concept']} "
                f"| `{detector['layer']}` | {detector['filter']} | {detector['iou']:.3f} "
                f"| {detector['our_iou']:.3f} | {detector['our_concept']} |"
            )
    return "\n".join(lines)


TABLES = {"": summary, " layers": by_layer, " top": top}


def main() -> None:
    """Measure each network on each data set and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="the folder of camvid and ccp")
    parser.add_argument("--weights", help="folder of the staged weights")
    parser.add_argument("--network", choices=list(NETWORKS), nargs="*", default=list(NETWORKS))
    parser.add_argument("--source", choices=DATA, nargs="*", default=list(DATA))
    parser.add_argument("--quantile", type=float, default=QUANTILE)
    parser.add_argument("--images", type=int, help="only so many images, drawn at random")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--try", dest="is_try", action="store_true", help="only print the table")
    parser.add_argument("--tables", action="store_true", help="only write the tables")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.tables:
        if arguments.data is None or arguments.weights is None:
            parser.error("--data and --weights are needed")
        for network in arguments.network:
            for source in arguments.source:
                row = measure(network, source, arguments)
                if arguments.is_try:
                    print(f"{summary([row])}\n\n{by_layer([row])}\n\n{top([row])}", flush=True)
                else:
                    put_row(RESULTS, row, ("network", "data", "quantile"))
    if not arguments.is_try:
        text = PAGE.read_text()
        for name, table in TABLES.items():
            text = with_table(text, f"results/dissection.json{name}", table(ordered_rows()))
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
