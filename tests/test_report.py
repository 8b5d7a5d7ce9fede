"""The report: one file, complete, offline, with text from outside escaped."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from runs import DigitsRun
from secateur.agreement import Agreement
from secateur.norms import NormChange
from secateur.polish import Polish, PolishEpoch
from secateur.report import count_text, score_rows, write_report
from secateur.training import Epoch


class Page(HTMLParser):
    """Collects tags, visible text and whatever would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        addresses = [v for k, v in attrs if k in ("src", "href") and v is not None]
        self.fetched += [v for v in addresses if not v.startswith("#")]
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def page(digits_run: DigitsRun) -> Page:
    return Page((digits_run.folder / "report.html").read_text())


def test_page_is_well_formed_and_fetches_nothing(page: Page) -> None:
    assert page.open == []
    assert page.fetched == []
    assert "main" in page.tags
    assert page.tags.count("h1") == 1


def test_every_stage_layer_and_reason_is_there(page: Page, digits_run: DigitsRun) -> None:
    text = " ".join(page.texts)
    for row in score_rows(digits_run.result):
        assert row["top-1 %"] in text
        assert row["MACs"] in text
    for group in digits_run.result.groups:
        kept = group.filters - len(group.removed)
        assert f"{group.name} {group.filters} {kept} {len(group.removed)}" in " ".join(text.split())
    for frozen in digits_run.result.frozen:
        assert frozen.reason in text
    assert digits_run.result.plan_hash[:16] in text


def test_norms_and_polish_are_told_of(digits_run: DigitsRun, tmp_path: Path) -> None:
    norms = NormChange("means", 0.25, 0.5125, 0.4875)
    before, after = Agreement(0.4875, 0.8125), Agreement(0.3125, 0.9375)
    polish = Polish(before, (PolishEpoch(Epoch(1, 0.1234, 0.0), after),), 1)
    result = digits_run.result.model_copy(update={"norms": norms, "polish": polish})
    write_report(result, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    text = " ".join(page.texts)
    assert page.open == []
    assert "means moved 25% of the way" in text
    for number in ("0.5125", "0.4875", "0.3125", "81.25", "93.75", "0.1234"):
        assert number in text
    assert "the weights of epoch 1 stayed" in text


def test_text_from_outside_is_escaped(page: Page, digits_run: DigitsRun) -> None:
    assert page.tags.count("script") == 2  # the data and what shows it
    assert "<script>alert(1)</script>" in " ".join(page.texts)


def test_names_from_data_are_escaped(digits_run: DigitsRun, tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    group = digits_run.result.groups[0].model_copy(update={"name": evil})
    result = digits_run.result.model_copy(update={"groups": (group,)})
    write_report(result, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert "img" not in page.tags
    assert evil in " ".join(page.texts)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1 k"),
        (40_551_040, "40.6 M"),
        (4_089_184_256, "4.09 G"),
        (2 * 10**12, "2 T"),
    ],
)
def test_counts_have_three_digits(number: int, text: str) -> None:
    assert count_text(number) == text
