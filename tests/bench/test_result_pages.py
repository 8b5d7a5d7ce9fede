"""The page of results is that of the result files; and Torch-Pruning is trained alike."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest
import tomli_w
import torch
from scipy.stats import spearmanr

import benchmarks
import criteria
import dissection
import finetuned
import naming
import report
import results
import studies
import tables
from layouts import write_classes
from rows import read_rows
from secateur.experiments.compare.job_files import JOBS
from secateur.experiments.compare.spec import BenchmarkSpec, jobs_of
from secateur.pipeline.inputs import load_inputs
from secateur.pipeline.prune import prune


def test_the_page_is_that_of_the_result_files() -> None:
    text = results.PAGE.read_text()
    assert results.page(text) == text


@pytest.fixture
def spec(tmp_path: Path, model_file: Path) -> BenchmarkSpec:
    """The bench's on a few small images."""
    for part, count in (("train", 24), ("test", 8)):
        write_classes(tmp_path / "images" / part, ["bird", "cat"], count)
    content = {
        "criteria": ["l1"],
        "targets": ["macs=0.7"],
        "networks": [{"name": f"{model_file}:small", "label": "small", "allow_untrained": True}],
        "data": {"source": "folder:data", "image_size": 16, "calibration_images": 20},
        "finetune": {"epochs": 1, "batch_size": 8, "workers": 0, "warmup_steps": 0},
    }
    config = tmp_path / "benchmark.toml"
    config.write_text(tomli_w.dumps(content))
    arguments = argparse.Namespace(data=str(tmp_path / "images"), weights=None)
    return benchmarks.configured(config, arguments)


def test_rows_that_are_there_are_not_measured_again(
    spec: BenchmarkSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmarks, "ROOT", tmp_path)
    file = tmp_path / "rows.jsonl"
    benchmarks.measure(spec, file, 1)
    shutil.rmtree(tmp_path / "runs")
    more = spec.model_copy(update={"criteria": ("l1", "random")})
    benchmarks.measure(more, file, 1)
    assert [row.criterion for row in benchmarks.measured_rows(file)] == ["l1", "random"]
    assert len(list((tmp_path / "runs" / "rows" / JOBS).iterdir())) == 1
    # A row that did not come to the file before an interruption comes to it now.
    whole = file.read_text()
    file.write_text(whole.splitlines(keepends=True)[0])
    benchmarks.measure(more, file, 1)
    assert file.read_text() == whole
    text = benchmarks.table(tmp_path / "benchmark.toml", file)
    assert "| random |" in text
    assert "all settings" in text


def test_a_peer_is_cut_to_the_same_size_and_trained_alike(
    spec: BenchmarkSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch_pruning", reason="Torch-Pruning is for the benches")
    monkeypatch.setattr(finetuned, "WORK", tmp_path / "work")
    (job,) = jobs_of(spec)
    peer = finetuned.measure_peer(job)
    dataset, model = load_inputs(job.config)
    ours = prune(model, dataset, job.config).result
    assert peer.criterion == finetuned.PEER_NAME
    assert peer.before_top1_fraction == ours.stages[0].score.metric
    assert peer.images == ours.stages[0].score.images
    assert peer.macs_left == pytest.approx(0.7, abs=0.1)  # few filters make large steps
    assert peer.finetuned_top1_fraction is not None


@pytest.mark.parametrize("study", list(studies.TARGETS))
def test_the_criteria_page_shows_what_was_measured(study: str) -> None:
    text = criteria.PAGE.read_text()
    measurements = criteria.measured()
    if any(measurement["study"] == study for measurement in measurements):
        name = f"results/criteria.jsonl {study}"
        assert tables.with_table(text, name, criteria.table(study, measurements)) == text


def test_the_report_page_shows_what_was_measured() -> None:
    text = report.PAGE.read_text()
    assert tables.with_table(text, "results/report.json", report.table()) == text


def test_the_page_of_names_shows_what_was_measured() -> None:
    text, rows = naming.PAGE.read_text(), read_rows(naming.RESULTS)
    assert tables.with_table(text, "results/naming.json", naming.table(rows)) == text


def test_the_dissection_page_shows_what_was_measured() -> None:
    text = dissection.PAGE.read_text()
    for name, table in dissection.TABLES.items():
        shown = tables.with_table(
            text, f"results/dissection.json{name}", table(dissection.ordered_rows())
        )
        assert shown == text


def test_the_rank_correlation_is_scipys(generator: torch.Generator) -> None:
    a, b = torch.randint(0, 6, (2, 40), generator=generator).double()
    expected = spearmanr(a.numpy(), b.numpy()).statistic
    assert dissection.rank_correlation(a, b) == pytest.approx(expected)
    assert dissection.rank_correlation(a, torch.zeros(40)) is None
