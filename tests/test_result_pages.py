"""The page of results is that of the result files; and Torch-Pruning is trained as we are."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import tomli_w

import results
import tuned
from layouts import write_classes
from secateur import sweep


def test_the_page_is_that_of_the_result_files() -> None:
    text = results.PAGE.read_text()
    assert results.page(text) == text


@pytest.fixture
def arguments(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> argparse.Namespace:
    """The bench on a few small images, with results of its own."""
    for part, count in (("train", 24), ("test", 8)):
        write_classes(tmp_path / "images" / part, ["bird", "cat"], count)
    content = {
        "criteria": ["l1"],
        "targets": ["macs=0.7"],
        "networks": [{"name": f"{model_file}:small", "label": "small"}],
        "data": {"source": "folder:data", "image_size": 16, "probe_images": 20},
        "finetune": {"epochs": 1, "batch_size": 8, "workers": 0, "warmup_steps": 0},
    }
    config = tmp_path / "comparison.toml"
    config.write_text(tomli_w.dumps(content))
    for name, path in (("CONFIG", config), ("WORK", "work"), ("RESULTS", "rows.jsonl")):
        monkeypatch.setattr(tuned, name, tmp_path / path)
    return argparse.Namespace(
        data=str(tmp_path / "images"), weights=tmp_path, jobs=1, seeds=None, peer=None
    )


def test_a_peer_is_cut_to_the_same_size_and_trained_alike(arguments: argparse.Namespace) -> None:
    pytest.importorskip("torch_pruning", reason="Torch-Pruning is for the benches")
    comparison, cells = tuned.asked_for(arguments)
    (cell,) = cells
    tuned.measure(comparison, cell)
    tuned.put(tuned.measure_peer(cell))
    own, peer = tuned.known_rows()
    assert (own.criterion, peer.criterion) == ("l1", tuned.PEER_NAME)
    assert own.before_top1_fraction == peer.before_top1_fraction
    assert own.images == peer.images == 16
    assert peer.macs_left == pytest.approx(0.7, abs=0.1)  # few filters make large steps
    assert peer.tuned_top1_fraction is not None
    text = tuned.table([own, peer])
    assert f"| {tuned.PEER_NAME} |" in text
    assert "all settings" in text
    assert sweep.read_comparison(tuned.CONFIG).compared_with == "l1"
