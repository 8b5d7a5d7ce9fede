"""The tables in docs/research/training.md, which benches write from result files."""

from __future__ import annotations

import json
import tomllib

import base_network
import training
import tuning
from measurements import Measurement, read_measurements
from rows import Row


def test_the_table_of_speed_shows_what_was_measured() -> None:
    measured: Row = {
        "network": "resnet20",
        "settings": {"precision": "auto"},
        "environment": {"threads": 2},
        "images_per_second": {
            "bare": 1000.0,
            "secateur": 990.5,
            "cut": 600.0,
            "cut, compiled": 1200.0,
        },
        "ratio": 0.99,
        "cut_macs_left": 0.7,
        "compiled_ratio": 2.0,
    }
    text = "<!-- table: results/training.json -->\nold\n<!-- end -->\n"
    lines = training.page(text, measured).splitlines()
    assert lines[3] == "| resnet20 | auto | 2 | 1000.0 | 990.5 | 0.99 |"
    assert lines[-2] == "| resnet20, 0.7 | 2 | 600.0 | 1200.0 | 2.0 |"


def test_the_table_of_the_base_network_shows_its_accuracy() -> None:
    training = {
        "config": "configs/one.toml",
        "epochs": [[1, 1.5, 0.6], [2, 0.9, 0.928]],
        "test_fraction": 0.9312,
        "seconds": 4801.0,
    }
    measured: Row = {"network": "vgg16_bn", "trainings": [training]}
    last = base_network.table(measured).splitlines()[-1]
    assert last == "| vgg16_bn | `configs/one.toml` | 2 | 92.80 | 93.12 | 80 |"


def test_the_table_of_tuning_shows_what_was_lost() -> None:
    measurement: Measurement = {
        "network": "resnet20",
        "target": "macs=0.7",
        "seed": 1,
        "macs_left": 0.6996,
        "test_fraction": {
            "before": 0.9173,
            "cut": 0.5,
            "refit": 0.9,
            "finetuned": 0.916,
            "last": 0.916,
        },
        "best_epoch_test_fraction": 0.9155,
        "best_epoch": 12,
        "settings": {"epochs": 40},
    }
    assert tuning.table([measurement]).splitlines()[-1] == (
        "| resnet20, 0.700 | 1 | 40 | "
        "91.73 | 90.00 | 91.60 | 91.55 (epoch 12) | 0.13 | 0.12 | 0.12 |"
    )
    shorter = measurement | {"settings": {"epochs": 4}}
    better = measurement | {
        "seed": 2,
        "test_fraction": measurement["test_fraction"] | {"last": 0.918},
    }
    assert tuning.summary([shorter, measurement, better]).splitlines()[2:] == [
        "| resnet20, 0.7 | 40 | 2 | 91.73 | 90.00 | 91.70 | 0.03 |"
    ]


def test_the_page_is_that_of_the_result_files() -> None:
    text = training.PAGE.read_text()
    assert training.page(text, json.loads(training.RESULTS.read_text())) == text
    assert base_network.page(text, json.loads(base_network.RESULTS.read_text())) == text
    measured = read_measurements(tuning.RESULTS, tuning.KEY)
    assert tuning.page(text, measured) == text
    readme = tuning.FRONT.read_text()
    assert tuning.front(readme, measured) == readme


def test_the_tuning_table_is_of_these_files() -> None:
    for (network, _), case in tuning.CASES.items():
        content = tomllib.loads((tuning.CONFIGS / case.file).read_text())
        assert [network["name"] for network in content["networks"]] == [network]
        targets = [target for name, target in tuning.CASES if name == network]
        assert content["targets"] == targets
        assert content["seeds"] == 3
