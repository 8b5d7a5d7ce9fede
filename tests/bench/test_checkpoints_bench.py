"""The page of checkpoints shows the results, and the benchmark tells right from wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import checkpoints
from checkpoint_makers import Make, Saved, from_downloads, from_scripts, load_module, trained
from checkpoints import check, page, summary


def test_the_page_shows_the_results() -> None:
    results = json.loads(checkpoints.RESULTS.read_text())
    text = checkpoints.PAGE.read_text()
    assert page(text, results) == text
    rows = results["rows"]
    assert len(rows) >= 30
    assert all(row["is_right"] and row["outcome"] == row["expected"] for row in rows)
    assert summary(results).startswith(f"{len(rows)} of {len(rows)} are as they should be")
    libraries = {row["library"] for row in rows}
    assert libraries >= {"torch", "timm", "Lightning", "accelerate", "transformers", "fastai"}
    assert libraries >= {"ema-pytorch", "safetensors", "torchvision's reference script"}


@pytest.mark.parametrize("make", [from_scripts, from_downloads])
def test_what_is_saved_without_other_libraries_is_as_it_should_be(
    make: Make, tmp_path: Path
) -> None:
    load_module(tmp_path)
    (tmp_path / "files").mkdir()
    rows = [check(saved, tmp_path) for saved in make(tmp_path / "files")]
    assert rows
    assert [row for row in rows if not row["is_right"]] == []


def test_a_wrong_outcome_is_told_from_a_right_one(tmp_path: Path) -> None:
    load_module(tmp_path)
    path, state = tmp_path / "w.pth", trained().state_dict()
    torch.save(state, path)
    other = {name: tensor + 1 for name, tensor in state.items()}
    assert check(Saved("torch", "", path, state), tmp_path)["is_right"]
    assert not check(Saved("torch", "", path, other), tmp_path)["is_right"]
    assert not check(Saved("torch", "", path, refused="anything"), tmp_path)["is_right"]
    path.write_bytes(b"")
    assert check(Saved("torch", "", path, refused="is empty"), tmp_path)["is_right"]
    assert not check(Saved("torch", "", path, refused="TorchScript"), tmp_path)["is_right"]
    assert not check(Saved("torch", "", path, state), tmp_path)["is_right"]
