"""`report.html`: one file that works offline and shows what went and what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from secateur.norms import NormChange
from secateur.result import RunResult


def render(template: str, **values: Any) -> str:
    """A page of ours; text from data is escaped."""
    environment = Environment(
        loader=PackageLoader("secateur", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def write_report(result: RunResult, path: Path) -> None:
    """Writes the report of a run."""
    page = render(
        "report.html.j2",
        result=result,
        rows=score_rows(result),
        layers=_layers(result),
        norms=None if result.norms is None else _norms_text(result.norms),
        config=result.config.model_dump(mode="json"),
        environment=result.environment.model_dump(),
    )
    path.write_text(page, encoding="utf-8")


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


def _norms_text(change: NormChange) -> str:
    if not change.share:
        return "left as they were"
    which = "means" if change.statistics == "means" else "means and variances"
    return f"{which} moved {change.share:.0%} of the way to the re-estimated ones"


def _layers(result: RunResult) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for group in result.groups:
        removed = set(group.removed)
        order = sorted(range(group.filters), key=lambda f: (-group.scores[f], f))
        rows.append(
            {
                "name": group.name,
                "filters": group.filters,
                "kept": group.filters - len(removed),
                "removed": len(removed),
                "cells": [
                    {"filter": f, "score": group.scores[f], "removed": f in removed} for f in order
                ],
            }
        )
    return rows
