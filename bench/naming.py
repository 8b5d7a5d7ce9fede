"""Compare the names of filters with Network Dissection, where both know the same concepts.

    python bench/naming.py --data DIR --weights DIR

The image–text model is one that can't be wrong: it knows which part of each image shows which
concept, from the masks (CamVid, CCP), the pixels (eleven colours) or the network (`evidence`: where
it sees which class), and says of an image the root of that part. So what differs is that a name is
chosen by whole images, a detector's concept by pixels. Each case makes a row of
`results/naming.json`; `--tables` only writes the table in docs/explanation/naming.md.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from imagenet_networks import NETWORKS, load_network
from rows import ROOT, Row, put_row, read_rows, revision, surroundings
from secateur.config import RunConfig
from secateur.data import DataSet, FileImages
from secateur.data.concept_masks import UNLABELLED
from secateur.graph.taps import Kernels, all_taps
from secateur.pipeline.inputs import load_inputs, resolve_config
from secateur.pipeline.scoring_context import make_scoring_context
from secateur.scoring.criteria import DeferredUpdate, FeatureBatch, Need, Regions
from secateur.scoring.dissection import DETECTOR_IOU, Dissection
from secateur.scoring.feature_pass import run_feature_pass
from secateur.scoring.naming import FIRST, LAST, TEMPERATURE, ImageWords, Naming, soft_wpmi
from tables import with_table

RESULTS = ROOT / "results" / "naming.json"
PAGE = ROOT / "docs" / "explanation" / "naming.md"
CASES = (
    *(("resnet20", "evidence"), ("resnet20", "colours")),
    *(("squeezenet1_1", "camvid"), ("squeezenet1_1", "ccp")),
)
CLOSE = 1e-4
"""Nats between the best two words that count as a tie: float32 rounds sums over images so."""


def configuration(network: str, words: str, arguments: argparse.Namespace) -> RunConfig:
    """Return the configuration of a case: all groups of filters, skip connections included."""
    score: dict[str, Any] = {"sample_every": 1}
    data: dict[str, Any]
    if network in NETWORKS:
        expected = NETWORKS[network]
        size = {"image_size": 224, "mean": expected.mean, "std": expected.std, "batch_size": 16}
        model = {"name": f"{Path(__file__).with_name('imagenet_networks.py')}:{network}"}
        data = {"source": "none", "calibration_images": arguments.images or 150, **size}
        score["concepts"] = f"masks:{arguments.data}/{words}"
    else:
        weights = f"{arguments.weights}/cifar10_{network}.safetensors"
        model = {"name": network, "weights": weights}
        source = f"cifar10:{arguments.data}/cifar10"
        data = {"source": source, "calibration_images": arguments.images or 2000}
        score["concepts"] = words
    sections = {"model": model, "data": data, "score": score, "plan": {"prune_residual": True}}
    return RunConfig.model_validate(sections)


class Areas:
    """Part of each image that each concept covers; an `Observer`."""

    needs: frozenset[Need] = frozenset({"maps", "concepts"})

    def __init__(self, images: int, concepts: int) -> None:
        self.parts = torch.zeros(images, concepts)

    def reset(self, taps: Mapping[str, Kernels]) -> None:
        """Nothing to prepare."""

    def update(self, features: FeatureBatch) -> DeferredUpdate:
        """The masks of a batch are the same at every tap."""

        def add(regions: Regions) -> None:
            masks = regions.masks_at(regions.size)
            for index, image_masks, numbers in zip(
                features.indices.tolist(), masks, regions.concepts, strict=True
            ):
                is_shown = numbers != UNLABELLED
                covered = image_masks[is_shown].float().mean(dim=(1, 2))
                parts = torch.zeros_like(self.parts[index])
                self.parts[index] = parts.index_add_(0, numbers[is_shown], covered)

        return add

    def state(self) -> Iterable[Tensor]:
        """None: this runs in one process."""
        return ()


def sum_soft_wpmi(
    similarities: Float[Tensor, "image word"], top_images: Int[Tensor, "filter place"]
) -> Float[Tensor, "filter word"]:
    """Return soft-WPMI with sums over the top images, as the paper has it."""
    probabilities = (TEMPERATURE * similarities).softmax(1)[top_images]  # [filter, place, word]
    places = torch.arange(top_images.shape[1])[:, None]
    member = FIRST - places / len(places) * (FIRST - LAST)
    logarithms = (1 + member * (probabilities - 1)).log().sum(1)
    return logarithms - (logarithms.logsumexp(0) - math.log(len(logarithms)))


def measure(network: str, concepts: str, arguments: argparse.Namespace) -> Row:
    """Name the filters of a network, and count the detectors whose name is their concept."""
    config = configuration(network, concepts, arguments)
    if network in NETWORKS:
        nothing = FileImages((), torch.zeros(0, dtype=torch.int64))
        dataset = DataSet("none", (), nothing, nothing, nothing)
        model = load_network(network, Path(arguments.weights))
    else:
        dataset, model = load_inputs(config)
    context = make_scoring_context(model, dataset, resolve_config(config, dataset, model))
    words = tuple(concept.name for concept in context.source.concepts)
    areas = Areas(len(context.calibration.labels), len(words))
    image_words = ImageWords(words, areas.parts)
    dissection, names = Dissection(words), Naming(image_words)
    run_feature_pass(
        model,
        context.dependencies,
        lambda: context.reader.read(context.calibration),
        (areas, dissection, names),
        context.source,
        config.score,
    )
    areas.parts.clamp_(0, 1).sqrt_()
    start = time.process_time()
    for group in context.dependencies.groups.values():
        names.names(group)
    seconds = time.process_time() - start
    counts: Counter[str] = Counter()
    best_concepts: Counter[int] = Counter()
    for tap in all_taps(context.dependencies):
        iou, concept = dissection.iou(tap).max(dim=1)
        means, top = names.top_images(tap)
        is_live = means[:, 0] > means[:, -1]
        is_detector = (iou > DETECTOR_IOU)[is_live]
        counts["filters"] += len(iou)
        counts["detectors"] += int(is_detector.sum())
        best_concepts.update(concept[is_live][is_detector].tolist())
        for kind, function in (("mean", soft_wpmi), ("sum", sum_soft_wpmi)):
            similarities = function(image_words.similarities, top[is_live])
            best = similarities.topk(2, dim=1)
            is_same = best.indices[:, 0] == concept[is_live]
            counts[f"{kind}_same"] += int(is_same[is_detector].sum())
            counts[f"{kind}_ties"] += int((best.values[:, 0] - best.values[:, 1] < CLOSE).sum())
    return {
        "network": network,
        "concepts": concepts,
        "words": len(words),
        "images": len(context.calibration.labels),
        "top_images": image_words.top_count,
        **counts,
        "commonest": max(best_concepts.values()),
        "seconds": round(seconds, 2),
        "seed": config.seed,
        "command": "python bench/naming.py --data DIR --weights DIR",
        "revision": revision(),
        "environment": surroundings(),
    }


def table(rows: list[Row]) -> str:
    """Return a line for each case."""
    lines = [
        "| network | images | words | filters | detectors | named by their concept "
        "| with sums, as in the paper | all named by the commonest | ties of the best two words "
        "| with sums |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        same, sums, commonest = (
            f"{100 * row[key] / row['detectors']:.0f} %"
            for key in ("mean_same", "sum_same", "commonest")
        )
        cells = [
            row["network"],
            row["images"],
            f"{row['words']} of {row['concepts']}",
            row["filters"],
            row["detectors"],
            *(same, sums, commonest, row["mean_ties"], row["sum_ties"]),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Measure each case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="the folder of cifar10, camvid and ccp")
    parser.add_argument("--weights", help="folder of the staged weights")
    parser.add_argument("--images", type=int, help="only so many images: a quick trial")
    parser.add_argument("--tables", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for network, words in () if arguments.tables else CASES:
        row = measure(network, words, arguments)
        if arguments.images:
            print(table([row]), flush=True)
        else:
            put_row(RESULTS, row, ("network", "concepts"))
    if not arguments.images:
        rows = read_rows(RESULTS)
        PAGE.write_text(with_table(PAGE.read_text(), "results/naming.json", table(rows)))


if __name__ == "__main__":
    main()
