"""`report.html`: one file that works offline and shows what went and what it cost."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from secateur.experiments.compare.statistics import BenchmarkStatistics
from secateur.experiments.report.gallery import Gallery, LayerGallery, to_json
from secateur.pipeline.result import GroupResult, RunResult
from secateur.pruning.outcome import BatchNormRecalibration
from secateur.runtime.atomic_io import replace_file

MOST_CONCEPTS = 30
"""Rows of the concept map: those concepts with most detectors before the cut."""


def render(template: str, **values: Any) -> str:
    """A page of ours; text from data is escaped."""
    environment = Environment(
        loader=PackageLoader("secateur", "experiments/report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


@dataclass(frozen=True)
class Script:
    """Code of ours in a page, which the page names by its hash as the only one that may run."""

    text: Markup

    @property
    def policy(self) -> str:
        """What the page may do: run this, show pictures that it holds, and nothing else."""
        digest = base64.b64encode(hashlib.sha256(self.text.encode()).digest()).decode()
        return (
            "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
            f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
        )


def read_script(*names: str) -> Script:
    """The named files of this package, one after the other."""
    files = (resources.files(__name__).joinpath(name) for name in names)
    return Script(Markup("").join(Markup(file.read_text(encoding="utf-8")) for file in files))


def write_report(
    result: RunResult,
    path: Path,
    gallery: Gallery | None = None,
    beside: BenchmarkStatistics | None = None,
) -> None:
    """Writes the report of a run, with what its filters see and a comparison where there are any.

    The file is the old one or the whole new one at any moment. Raises `OSError`.
    """
    from secateur.experiments.report.run_charts import tradeoff  # takes a second to import

    layers = _layers(result, gallery)
    page = render(
        "report.html.j2",
        result=result,
        cards=_cards(result),
        rows=score_rows(result),
        tradeoff=tradeoff(result, beside),
        layers=layers,
        concept_map=None if gallery is None else concept_map(gallery),
        gallery=gallery,
        norms=None
        if result.batchnorm_recalibration is None
        else _norms_text(result.batchnorm_recalibration),
        config=result.config.model_dump(mode="json"),
        environment=result.environment.model_dump(),
        data=to_json(result, gallery),
        script=read_script("theme.js", "report.js"),
    )
    replace_file(path, page)


def score_rows(result: RunResult) -> list[dict[str, str]]:
    """The scores by stage as text, with what they are relative to the first stage."""
    rows = []
    first = result.stages[0].score
    for stage in result.stages:
        score = stage.score
        rows.append(
            {
                "stage": stage.stage if stage.round == 1 else f"{stage.stage} ({stage.round})",
                "top-1 %": f"{100 * score.top1_fraction:.2f}",
                "top-5 %": f"{100 * score.top5_fraction:.2f}",
                "loss": f"{score.loss:.3f}",
                "MACs": f"{count_text(score.macs)} {score.macs / first.macs:.0%}",
                "params": (
                    f"{count_text(score.parameters)} {score.parameters / first.parameters:.0%}"
                ),
                "latency ms": f"{score.latency_ms:.1f}",
                "seconds": "–" if stage.stage == "before" else f"{stage.seconds:.1f}",
            }
        )
    return rows


def count_text(number: int) -> str:
    """A count with three digits and a unit: `40.6 M`."""
    value = float(number)
    for unit in ("", " k", " M", " G"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} T"


@dataclass(frozen=True)
class Card:
    """One figure before the run and after it."""

    title: str
    before: str
    after: str
    change: str


def _cards(result: RunResult) -> list[Card]:
    first, last = result.stages[0].score, result.stages[-1].score
    points = 100 * (last.top1_fraction - first.top1_fraction)
    filters = sum(group.filters for group in result.groups)
    kept = filters - sum(len(group.removed) for group in result.groups)

    def card(title: str, before: str, after: str, ratio: float) -> Card:
        return Card(title, before, after, f"{ratio - 1:+.1%}".replace("-", "−"))

    return [
        Card(
            "Top-1",
            f"{100 * first.top1_fraction:.2f} %",
            f"{100 * last.top1_fraction:.2f} %",
            f"{points:+.2f} points".replace("-", "−"),
        ),
        card("MACs", count_text(first.macs), count_text(last.macs), last.macs / first.macs),
        card(
            "Parameters",
            count_text(first.parameters),
            count_text(last.parameters),
            last.parameters / first.parameters,
        ),
        card(
            "Latency",
            f"{first.latency_ms:.1f} ms",
            f"{last.latency_ms:.1f} ms",
            last.latency_ms / first.latency_ms,
        ),
        card("Prunable filters", str(filters), str(kept), kept / max(1, filters)),
    ]


def _norms_text(change: BatchNormRecalibration) -> str:
    if not change.fraction:
        return "left as they were"
    which = "means" if change.statistics == "means" else "means and variances"
    return f"{which} moved {change.fraction:.0%} of the way to the re-estimated ones"


def _layers(result: RunResult, gallery: Gallery | None) -> list[dict[str, Any]]:
    seen = {layer.name: layer for layer in gallery.layers} if gallery else {}
    return [
        {
            "name": group.name,
            "filters": group.filters,
            "kept": group.filters - len(group.removed),
            "removed": len(group.removed),
            **_strip(group, seen.get(group.name)),
            **_detectors(seen.get(group.name)),
        }
        for group in result.groups
    ]


def strip(group: GroupResult, layer: LayerGallery | None) -> list[tuple[int, float]]:
    """Filters by score, the best first, each with its votes, or its score where none were counted.

    Over the highest of the layer; values below zero count from the lowest.
    """
    values = group.scores if layer is None else layer.votes
    low = min(0.0, *values)
    high = max(values) - low or 1.0
    order = sorted(range(group.filters), key=lambda f: (-group.scores[f], f))
    return [(filter_, (values[filter_] - low) / high) for filter_ in order]


def _strip(group: GroupResult, layer: LayerGallery | None) -> dict[str, str]:
    """The strip as two outlines, of filters that stay and of those that go.

    In a box one wide for each filter and one high.
    """
    removed = set(group.removed)
    paths = {"kept_path": "", "removed_path": ""}
    for place, (filter_, height) in enumerate(strip(group, layer)):
        key = "removed_path" if filter_ in removed else "kept_path"
        paths[key] += f"M{place} 1V{1 - height:.3g}h1V1"
    return paths


def _detectors(layer: LayerGallery | None) -> dict[str, int | None]:
    """How many filters are detectors of a concept before and after, and of how many concepts."""
    if layer is None:
        return {"detectors": None, "detectors_after": None, "seen": None, "seen_after": None}
    before, after = detectors(layer, after=False), detectors(layer, after=True)
    return {
        "detectors": before.total(),
        "detectors_after": after.total(),
        "seen": len(before),
        "seen_after": len(after),
    }


def detectors(layer: LayerGallery, *, after: bool) -> Counter[str]:
    """How many filters of a layer are detectors of each concept, before the cut or after it."""
    best = layer.after if after else [row[0] for row in layer.concepts if row]
    return Counter(seen.concept for seen in best if seen is not None and seen.is_detector)


@dataclass(frozen=True)
class ConceptMap:
    """Detectors by concept and layer."""

    concepts: tuple[str, ...]
    """Those with most detectors before the cut, the first most."""
    others: int
    """Concepts with detectors that are not listed."""
    layers: tuple[str, ...]
    before: tuple[tuple[int, ...], ...]
    """`[concept][layer]`."""
    after: tuple[tuple[int, ...], ...]

    @property
    def most(self) -> int:
        """The largest count, at least 1."""
        return max((count for row in self.before for count in row), default=1) or 1


def concept_map(gallery: Gallery, most: int = MOST_CONCEPTS) -> ConceptMap:
    """Which layers have detectors of which concepts."""
    counts = [
        [detectors(layer, after=after) for layer in gallery.layers] for after in (False, True)
    ]
    total: Counter[str] = sum(counts[0], Counter())
    names = [name for name, _ in total.most_common()]

    def table(layers: Sequence[Counter[str]]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(layer[name] for layer in layers) for name in names[:most])

    return ConceptMap(
        concepts=tuple(names[:most]),
        others=max(0, len(names) - most),
        layers=tuple(layer.name for layer in gallery.layers),
        before=table(counts[0]),
        after=table(counts[1]),
    )
