"""The tables in docs/research/training.md, which benches write from result files."""

from __future__ import annotations

import json

import base_network
import training
import tuning
from cells import Cell, read_cells
from rows import Row


def test_the_tables_of_speed_tell_what_was_measured() -> None:
    found: Row = {
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
    lines = training.page(text, found).splitlines()
    assert lines[3] == "| resnet20 | auto | 2 | 1000.0 | 990.5 | 0.99 |"
    assert lines[-2] == "| resnet20, 0.7 | 2 | 600.0 | 1200.0 | 2.0 |"


def test_the_table_of_the_base_network_tells_what_it_is_worth() -> None:
    training = {
        "config": "configs/one.toml",
        "epochs": [[1, 1.5, 0.6], [2, 0.9, 0.928]],
        "test_fraction": 0.9312,
        "seconds": 4801.0,
    }
    found: Row = {"network": "vgg16_bn", "trainings": [training]}
    last = base_network.table(found).splitlines()[-1]
    assert last == "| vgg16_bn | `configs/one.toml` | 2 | 92.80 | 93.12 | 80 |"


def test_the_table_of_tuning_tells_what_was_lost() -> None:
    cell: Cell = {
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
    assert tuning.table([cell]).splitlines()[-1] == (
        "| resnet20, 0.700 | 1 | 40 | "
        "91.73 | 90.00 | 91.60 | 91.55 (epoch 12) | 0.13 | 0.12 | 0.12 |"
    )
    shorter = cell | {"settings": {"epochs": 4}}
    better = cell | {"seed": 2, "test_fraction": cell["test_fraction"] | {"last": 0.918}}
    assert tuning.summary([shorter, cell, better]).splitlines()[2:] == [
        "| resnet20, 0.7 | 40 | 2 | 91.73 | 90.00 | 91.70 | 0.03 |"
    ]


def test_the_page_is_that_of_the_result_files() -> None:
    text = training.PAGE.read_text()
    assert training.page(text, json.loads(training.RESULTS.read_text())) == text
    assert base_network.page(text, json.loads(base_network.RESULTS.read_text())) == text
    found = read_cells(tuning.RESULTS, tuning.KEY)
    assert tuning.page(text, found) == text
    readme = tuning.FRONT.read_text()
    assert tuning.front(readme, found) == readme
