from __future__ import annotations

import pytest
import torch

import speed
from interleaved import ROUNDS, time_interleaved
from networks import make_network, random_images
from rows import Row, read_rows
from speed import latency_table, page, surgery_table
from whole_run import whole_run_table


def row_of(mode: str, **more: object) -> Row:
    return {"network": "resnet50", "mode": mode, "outcome": "ok", **more}


def test_the_table_of_pruning_compares_medians() -> None:
    steps = (
        "dependency_graph",
        "scores",
        "plan",
        "surgery",
        "peer_graph",
        "peer_pruner",
        "peer_cut",
    )
    seconds = {step: [1.0, 2.0, 90.0] for step in steps}
    seconds["peer_cut"] = [6.0]
    failed = row_of("surgery", outcome="failed", reason="It broke")
    table = surgery_table([row_of("surgery", seconds=seconds), failed])
    assert "| resnet50 | 2.00 | 4.00 | 2.00 | 2.00 | 2.00 | 6.00 | 2.00 |" in table
    assert "failed: It broke" in table


def test_the_table_of_forward_passes_compares_with_the_ideal() -> None:
    timings: list[Row] = [
        {"engine": "eager", "batch": 1, "seconds": {"original": [0.3], "cut": [0.2]}},
        {"engine": "compiled", "batch": 16, "reason": "It | broke\nhere"},
    ]
    row = row_of("latency", timings=timings, macs={"original": 200, "cut": 100})
    table = latency_table([row])
    assert "| resnet50 | eager | 1 | 300.0 | 200.0 | 1.50× | 75 % |" in table
    assert "| resnet50 | compiled | 16 | It \\| broke ||||" in table


def test_the_table_of_whole_runs_compares_medians_of_turns() -> None:
    def run(cpu: float) -> Row:
        return {"cpu_seconds": cpu, "forward_cpu_seconds": 2.0, "peak_memory_mib": 900.0}

    runs = {"before": [run(80.0), run(90.0), run(70.0)], "now": [run(20.0)] * 3}
    row = row_of("whole", runs=runs | {"Torch-Pruning": [run(25.0)]}, revision_before="abc")
    graph = row_of("whole", runs=runs) | {"network": "resnet50, graph"}
    failed = row_of("whole", outcome="failed", reason="now: It broke", runs={})
    table = whole_run_table([row, graph, failed])
    assert "| resnet50 | 80.0 | 20.0 | 0.25 | 40.0 | 10.0 | 900 | 900 | 25.0 |" in table
    assert "| resnet50, graph | 80.00 | 20.00 | 0.25 |  |  | 900 | 900 |  |" in table
    assert "now: It broke" in table


@pytest.mark.parametrize("engine", ["eager", "onnxruntime"])
def test_engines_give_the_output_of_the_network(engine: str) -> None:
    if engine == "onnxruntime":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model, images = make_network("residual"), random_images(3)
    forward = speed._forward(model, engine, images)
    with torch.no_grad():
        torch.testing.assert_close(forward(images), model(images))
    seconds = time_interleaved({"original": forward, "cut": forward}, images)
    assert len(seconds["original"]) == len(seconds["cut"]) == ROUNDS.most


def test_the_page_is_that_of_the_result_file() -> None:
    assert page(read_rows(speed.RESULTS)) == speed.DOCS.read_text()
