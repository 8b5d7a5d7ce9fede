"""The bench of secateur's parts: the same calibration sets are compared, its page is current."""

from __future__ import annotations

import ablations_imagenet
from measurements import Measurement, read_measurements
from tables import with_table


def row(part: str, seed: int, top1: float) -> Measurement:
    return {
        "network": "mobilenetv2",
        "seed": seed,
        "part": part,
        "target": "macs=0.8",
        "base_fraction": 0.7,
        "calibration_images": 300,
        "refit_fraction": top1,
        "agreement_fraction": 0.9,
    }


def test_changes_are_of_the_same_calibration_sets() -> None:
    whole = [row("", 0, 0.6), row("", 1, 0.64)]
    text = ablations_imagenet.table([*whole, row("equal shares", 1, 0.59), row("l1", 2, 0.5)])
    assert "| the defaults | 62.00 ± 2.83 |  | 90.00 ± 0.00 |  |" in text
    assert "| equal shares | 59.00 | -5.00 | 90.00 | +0.00 |" in text
    assert "| l1 in place of the vote | 50.00 |  | 90.00 |  |" in text
    assert "random" not in text
    assert "with 300 images (calibration sets: 3); before: top-1 70.00." in text


def test_the_page_is_that_of_the_result_file() -> None:
    text = ablations_imagenet.PAGE.read_text()
    table = ablations_imagenet.table(
        read_measurements(ablations_imagenet.RESULTS, ablations_imagenet.KEY)
    )
    assert with_table(text, "results/ablations_imagenet.jsonl", table) == text
