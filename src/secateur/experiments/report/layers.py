"""What the page and the charts show of each layer: its filters by score, and its detectors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secateur.experiments.report.gallery import Gallery, LayerGallery
from secateur.pipeline.result import GroupResult, RunResult

SHORTEST = 0.06
"""Height of a layer's shortest bar, of 1."""
MAX_CONCEPTS = 30
"""Rows of the concept map: the concepts with the most detectors before pruning."""


def layer_rows(result: RunResult, gallery: Gallery | None) -> list[dict[str, Any]]:
    """Return the rows of the page's table of layers."""
    galleries = {layer.name: layer for layer in gallery.layers} if gallery else {}
    return [
        {
            "name": group.name,
            "filters": group.filters,
            "kept": group.filters - len(group.removed),
            "removed": len(group.removed),
            **_strip_paths(group),
            **_detector_counts(galleries.get(group.name)),
        }
        for group in result.groups
    ]


def filter_heights(group: GroupResult) -> list[tuple[int, float]]:
    """Return the filters of a layer, the best by score first, each with the height of its bar.

    From the lowest score of the layer to its highest, heights rise with the square root of the
    distance from the lowest, from `SHORTEST` to 1: the scores of most criteria are so uneven that
    other bars would not be seen.
    """
    low, high = min(group.scores), max(group.scores)
    order = sorted(range(group.filters), key=lambda f: (-group.scores[f], f))
    places = [(group.scores[f] - low) / (high - low) if high > low else 1.0 for f in order]
    heights = [SHORTEST + (1 - SHORTEST) * math.sqrt(place) for place in places]
    return list(zip(order, heights, strict=True))


def _strip_paths(group: GroupResult) -> dict[str, str]:
    """Return SVG paths of the kept and the removed filters, each a column one unit wide."""
    removed = set(group.removed)
    paths = {"kept_path": "", "removed_path": ""}
    for place, (filter_, height) in enumerate(filter_heights(group)):
        key = "removed_path" if filter_ in removed else "kept_path"
        paths[key] += f"M{place} 1V{1 - height:.3g}h1V1"
    return paths


def _detector_counts(layer: LayerGallery | None) -> dict[str, int | None]:
    """Return the numbers of detectors and of detected concepts, before and after pruning."""
    if layer is None:
        return {
            "detectors": None,
            "detectors_after": None,
            "concepts": None,
            "concepts_after": None,
        }
    before, after = detectors(layer, after=False), detectors(layer, after=True)
    return {
        "detectors": before.total(),
        "detectors_after": after.total(),
        "concepts": len(before),
        "concepts_after": len(after),
    }


def detectors(layer: LayerGallery, *, after: bool) -> Counter[str]:
    """Return the number of detectors of each concept in a layer, before or after pruning."""
    best = layer.after if after else [row[0] for row in layer.concepts if row]
    return Counter(
        overlap.concept for overlap in best if overlap is not None and overlap.is_detector
    )


@dataclass(frozen=True)
class ConceptMap:
    """Numbers of detectors by concept and layer."""

    concepts: tuple[str, ...]
    """The concepts with the most detectors before pruning, most first."""
    others: int
    """Number of concepts with detectors that are not listed."""
    layers: tuple[str, ...]
    before: tuple[tuple[int, ...], ...]
    """`[concept][layer]`."""
    after: tuple[tuple[int, ...], ...]

    @property
    def most(self) -> int:
        """The largest number before pruning, at least 1."""
        return max((count for row in self.before for count in row), default=1) or 1


def concept_map(gallery: Gallery, max_concepts: int = MAX_CONCEPTS) -> ConceptMap:
    """Return how many detectors of each concept the layers have."""
    before, after = (
        [detectors(layer, after=after) for layer in gallery.layers] for after in (False, True)
    )
    total: Counter[str] = sum(before, Counter())
    names = [name for name, _ in total.most_common()]
    listed = names[:max_concepts]

    def table(layers: Sequence[Counter[str]]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(layer[name] for layer in layers) for name in listed)

    return ConceptMap(
        concepts=tuple(listed),
        others=max(0, len(names) - max_concepts),
        layers=tuple(layer.name for layer in gallery.layers),
        before=table(before),
        after=table(after),
    )
