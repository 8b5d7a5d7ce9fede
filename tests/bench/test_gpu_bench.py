"""The bench of a real accelerator, as far as a CPU can run it."""

from __future__ import annotations

import pytest
import torch

import gpu
from networks import make_network, random_images
from whole_run_case import FRACTION_LEFT


def test_it_ends_with_one_line_where_there_is_no_accelerator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="torch finds no accelerator on this machine"):
        gpu.main()


def test_it_measures_every_stage() -> None:
    network, images = make_network("residual"), random_images(60, 16)
    row, result = gpu.measure(network, images)
    assert row["stage_seconds"].keys() == {"before", "cut", "refit"}
    assert row["seconds"] > 0
    assert row["forward_seconds"] > 0
    assert row["peak_memory_mib"] is None
    assert row["macs_left"] <= FRACTION_LEFT
    assert gpu.common_fraction(result, result) == 1
