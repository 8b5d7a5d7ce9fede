"""README and front page show the figures of the result files."""

from __future__ import annotations

import headline


def test_the_table_of_criteria_is_that_of_the_result_file() -> None:
    text = headline.README.read_text()
    assert headline.readme(text) == text


def test_the_headline_figures_are_those_of_the_result_file() -> None:
    series = headline.training_free("resnet56")
    before, half, peer = series["secateur"][0], series["secateur"][2], series["best"][2]
    text = " ".join(headline.README.read_text().split())
    assert f"**{before:.1f} → {half:.1f} %**" in text
    assert f"reaches {peer:.1f} %" in text
