"""Times in engines that were measured after a run: kept in its folder, in its report and card."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from runs import small_config
from secateur.experiments.engine_times import read_engine_times, record_engine_times
from secateur.experiments.manifest import read_manifest
from secateur.experiments.model_card import model_card
from secateur.experiments.report.times import END, START
from secateur.experiments.run import report, run
from secateur.experiments.run_folder import ENGINE_TIMES, REPORT
from secateur.pipeline.result import read_result
from secateur.pipeline.verdict import EngineTime, slower_notices
from secateur.runtime.errors import UsageError


def measured(batch: int, pruned_ms: float, original_ms: float | None = 5.0) -> EngineTime:
    return EngineTime(
        engine="onnxruntime",
        version="1.32.0",
        form="float32",
        batch=batch,
        pruned_ms=pruned_ms,
        original_ms=original_ms,
        threads=2,
        processor="AVX2",
    )


def test_later_times_are_in_report_and_card(model_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = run(small_config(model_file), folder)
    page = (folder / REPORT).read_text()
    assert result.engine == f"PyTorch {result.environment.torch}"
    assert f"images in {result.engine} on " in page
    assert START + END in page

    record_engine_times(folder, [measured(1, 2.5), measured(16, 9.0)])
    record_engine_times(folder, [measured(1, 6.25)])  # measured again
    times = read_engine_times(folder)
    page = (folder / REPORT).read_text()
    card = model_card("me/small", read_manifest(folder), read_result(folder), times)
    assert times == (measured(1, 6.25), measured(16, 9.0))
    assert page.startswith("<!doctype html>\n<html lang")
    assert page.endswith("</body>\n</html>")
    for text in (page, card):
        assert "In onnxruntime the pruned network is slower than the original (1 image: " in text
        assert "--target latency=F --engine onnxruntime" in text
    assert ">onnxruntime 1.32.0</td>" in page
    assert "| onnxruntime 1.32.0 | float32 | 1 | 2 | 5.00 | 6.25 | 0.80 |" in card
    assert f"in {result.engine} on " in card

    report(folder, images=0)
    assert ">6.25</td>" in (folder / REPORT).read_text()
    path = folder / ENGINE_TIMES
    path.write_text(json.dumps({**json.loads(path.read_text()), "plan_hash": "of another"}))
    assert read_engine_times(folder) == ()


def test_a_network_that_is_as_fast_needs_no_notice() -> None:
    assert slower_notices([measured(1, 5.1), measured(1, 9.0, None), measured(16, 4.0)]) == ()
    (notice,) = slower_notices([measured(1, 6.0), measured(16, 7.0)])
    assert "(1 image: 5.00 → 6.00 ms; 16 images: 5.00 → 7.00 ms)" in notice
    assert "--round-to 16" in notice


def test_an_engine_that_is_not_installed_is_said_before_the_run(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    config = small_config(model_file, plan={"engine": "openvino"})
    with pytest.raises(UsageError, match="OpenVINO needs the extra"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
