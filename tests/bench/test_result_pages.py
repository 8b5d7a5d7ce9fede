"""The page of results is that of the result files; and Torch-Pruning is trained as we are."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest
import tomli_w

import comparisons
import results
import tuned
from layouts import write_classes
from secateur.experiments.compare.runner import CELLS
from secateur.experiments.compare.spec import BenchmarkSpec, jobs_of
from secateur.pipeline.inputs import load_inputs
from secateur.pipeline.prune import prune


def test_the_page_is_that_of_the_result_files() -> None:
    text = results.PAGE.read_text()
    assert results.page(text) == text


@pytest.fixture
def comparison(tmp_path: Path, model_file: Path) -> BenchmarkSpec:
    """The bench's on a few small images."""
    for part, count in (("train", 24), ("test", 8)):
        write_classes(tmp_path / "images" / part, ["bird", "cat"], count)
    content = {
        "criteria": ["l1"],
        "targets": ["macs=0.7"],
        "networks": [{"name": f"{model_file}:small", "label": "small"}],
        "data": {"source": "folder:data", "image_size": 16, "calibration_images": 20},
        "finetune": {"epochs": 1, "batch_size": 8, "workers": 0, "warmup_steps": 0},
    }
    config = tmp_path / "benchmark.toml"
    config.write_text(tomli_w.dumps(content))
    arguments = argparse.Namespace(data=str(tmp_path / "images"), weights=None)
    return comparisons.asked_for(config, arguments)


def test_rows_that_are_there_are_not_measured_again(
    comparison: BenchmarkSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparisons, "ROOT", tmp_path)
    file = tmp_path / "rows.jsonl"
    comparisons.measure(comparison, file, 1)
    shutil.rmtree(tmp_path / "runs")
    more = comparison.model_copy(update={"criteria": ("l1", "random")})
    comparisons.measure(more, file, 1)
    assert [row.criterion for row in comparisons.rows_in(file)] == ["l1", "random"]
    assert len(list((tmp_path / "runs" / "rows" / CELLS).iterdir())) == 1
    # A row that did not come to the file before an interruption comes to it now.
    whole = file.read_text()
    file.write_text(whole.splitlines(keepends=True)[0])
    comparisons.measure(more, file, 1)
    assert file.read_text() == whole
    text = comparisons.table(tmp_path / "benchmark.toml", file)
    assert "| random |" in text
    assert "all settings" in text


def test_a_peer_is_cut_to_the_same_size_and_trained_alike(
    comparison: BenchmarkSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch_pruning", reason="Torch-Pruning is for the benches")
    monkeypatch.setattr(tuned, "WORK", tmp_path / "work")
    (cell,) = jobs_of(comparison)
    peer = tuned.measure_peer(cell)
    dataset, model = load_inputs(cell.config)
    own = prune(model, dataset, cell.config).result
    assert peer.criterion == tuned.PEER_NAME
    assert peer.before_top1_fraction == own.stages[0].score.top1_fraction
    assert peer.images == own.stages[0].score.images
    assert peer.macs_left == pytest.approx(0.7, abs=0.1)  # few filters make large steps
    assert peer.finetuned_top1_fraction is not None
