from __future__ import annotations

import targets
from measurements import Measurement
from targets import measured, page, table


def test_the_table_shows_what_was_measured() -> None:
    measurement: Measurement = {
        "network": "resnet56",
        "target": "latency=0.6",
        "validation_fraction": {"before": 0.99, "after": 0.5},
        "test_fraction": {"before": 0.9, "after": 0.4567},
        "macs_left": 0.25,
        "parameters_left": 0.2,
        "seconds": {"before": [0.02, 0.01, 0.09], "after": [0.012]},
        "latency_left_predicted": 0.58,
        "trials": [],
    }
    assert table([measurement]).splitlines()[-1] == (
        "| resnet56 | `latency=0.6` | 99.00 → 50.00 | 90.00 → 45.67 | 0.250 | 0.580 | 0.600 "
        "| 20.0 → 12.0 |"
    )
    assert "| – | 0.600 |" in table([measurement | {"latency_left_predicted": None}])


def test_the_page_is_that_of_the_result_file() -> None:
    text = targets.PAGE.read_text()
    assert page(text, measured()) == text
