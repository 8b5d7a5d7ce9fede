"""Pages that benches write are those of the result files and of the code."""

from __future__ import annotations

import tomllib

import pytest

import configuration
import criteria
import report
import studies
import tables
import tuning


@pytest.mark.parametrize("study", list(studies.TARGETS))
def test_the_criteria_page_shows_what_was_measured(study: str) -> None:
    text = criteria.PAGE.read_text()
    cells = criteria.cells()
    if any(cell["study"] == study for cell in cells):
        name = f"results/criteria.jsonl {study}"
        assert tables.with_table(text, name, criteria.table(study, cells)) == text


def test_the_page_of_the_configuration_has_every_key() -> None:
    text = configuration.PAGE.read_text()
    assert configuration.page(text) == text


def test_the_report_page_shows_what_was_measured() -> None:
    text = report.PAGE.read_text()
    assert tables.with_table(text, "results/report.json", report.table()) == text


def test_the_tuning_table_is_of_these_files() -> None:
    for (network, target), case in tuning.CASES.items():
        content = tomllib.loads((tuning.CONFIGS / case.file).read_text())
        assert [each["name"] for each in content["networks"]] == [network]
        assert content["targets"] == [target]
        assert content["seeds"] == 3
