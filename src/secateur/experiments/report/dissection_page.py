"""The index page of the pictures of `secateur inspect`: concepts and filters of every layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from secateur.experiments.report.html import read_script, render
from secateur.runtime.atomic_io import replace_file
from secateur.scoring.dissection import FilterConcept
from secateur.scoring.naming import FilterName

INDEX = "index.html"


@dataclass(frozen=True)
class DissectedLayer:
    """What the page shows of a layer."""

    name: str
    picture: str
    """Name of its file, beside the page."""
    pictured: int
    """Number of filters in the picture: the first ones."""
    filters: tuple[tuple[int, FilterConcept, FilterName | None], ...]
    """Number, best concept and name of each filter, the highest IoU first."""
    is_named: bool
    """Whether filters are named at all."""

    @property
    def histogram(self) -> list[tuple[str, int]]:
        """The number of detectors of each concept, most first."""
        return Counter(
            best.concept for _, best, _ in self.filters if best.is_detector
        ).most_common()


def by_iou(concepts: Sequence[FilterConcept]) -> list[int]:
    """Return the filters of a layer in the order of their IoU, the highest first."""
    return sorted(range(len(concepts)), key=lambda number: -concepts[number].iou)


def write_index(
    folder: Path,
    model: str,
    concepts: Mapping[str, Sequence[FilterConcept]],
    pictured: int,
    names: Mapping[str, Sequence[FilterName | None]],
) -> None:
    """Write the page to a folder that holds a picture `LAYER.png` of each layer.

    Args:
        folder: The folder; raises `WriteError` if the page can't be written.
        model: Name of the network.
        concepts: The best concept of each filter, by layer.
        pictured: Most filters in a picture.
        names: The name of each filter, by layer; empty if filters are not named.
    """
    layers = [
        DissectedLayer(
            name,
            f"{name}.png",
            min(pictured, len(best)),
            tuple(
                (number, best[number], names[name][number] if names else None)
                for number in by_iou(best)
            ),
            bool(names),
        )
        for name, best in concepts.items()
    ]
    script = read_script("theme.js", shows_files=True)
    page = render("dissection.html.j2", model=model, layers=layers, script=script)
    replace_file(folder / INDEX, page)
