"""Engines run networks and time their layers."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from secateur.config import EngineName
from secateur.engines.latency import latency_in
from secateur.engines.layer_file import layer_file
from secateur.engines.onnx_file import write_onnx
from secateur.engines.onnxruntime import _session
from secateur.engines.registry import find_engine
from secateur.graph.build import build_dependency_graph
from secateur.graph.channel_ids import Ids
from secateur.graph.layer_calls import Key, LayerCall, layer_call
from secateur.pruning.cost.latency_profiler import Stopwatch, measure_latency
from secateur.runtime.errors import UsageError

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")

NOTHING: Ids = np.zeros(0, dtype=np.int64)


class Layers(nn.Module):
    """A layer of each kind that can be timed on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", groups=8)
        self.transposed = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.linear = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.transposed(self.depthwise(self.dense(images).relu()).relu())
        logits: Tensor = self.linear(maps.mean(dim=(2, 3)))
        return logits


def calls_of(model: nn.Module, images: Tensor) -> dict[Key, LayerCall]:
    dependencies = build_dependency_graph(model, images)
    calls = (layer_call(dependencies, layer, NOTHING) for layer in dependencies.layers)
    return {call.key: call for call in calls}


def test_a_file_of_one_layer_computes_values_of_the_layer_s_shape() -> None:
    calls = list(calls_of(Layers().eval(), torch.rand(2, 3, 10, 10)).values())
    assert len(calls) == 4
    for call in calls:
        content = layer_file(call)
        assert content is not None
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        images = np.zeros(call.shapes[0], dtype=np.float32)
        (output,) = session.run(None, {"x": images})
        assert output.shape[1:] == tuple(call.node.meta["val"].shape[1:])


def engines() -> list[EngineName]:
    optional: list[EngineName] = ["openvino", "executorch"]
    return ["pytorch", "onnxruntime", *filter(importlib.util.find_spec, optional)]


@pytest.mark.parametrize("name", engines())
def test_an_engine_runs_a_network_and_times_its_layers(name: EngineName) -> None:
    model, images = Layers().eval(), torch.rand(2, 3, 10, 10)
    engine = find_engine(name)
    milliseconds, batch = latency_in(engine, model, images)
    assert milliseconds > 0
    assert batch in (1, 2, 4, 8, 16)  # smaller on a slow machine
    calls = calls_of(model, images)
    seconds: Mapping[Key, float] = engine.layer_seconds(calls)
    assert set(seconds) == (set() if name in ("pytorch", "executorch") else set(calls))
    assert all(value > 0 for value in seconds.values())


def test_threads_of_onnxruntime_rest_while_another_network_is_timed(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write_onnx(Layers().eval(), torch.rand(2, 3, 10, 10), path)
    options = _session(str(path), "model").get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_a_table_of_onnxruntime_s_times_holds_multiples_of_4() -> None:
    model, images = Layers().eval(), torch.rand(2, 3, 10, 10)
    dependencies = build_dependency_graph(model, images)
    engine = find_engine("onnxruntime")
    table = measure_latency(model, dependencies, images, engine)
    assert (table.hardware.engine, table.hardware.version) == ("onnxruntime", engine.version)
    dense, *_ = table.layers
    assert dense.produced == (4, 8)
    assert Stopwatch(model, images, engine).fraction_left(model) > 0


@pytest.mark.parametrize(
    ("name", "install"),
    [
        ("openvino", r"pip install 'secateur\[openvino\]'"),
        ("executorch", "pip install 'executorch>=1.5'"),
    ],
)
def test_an_engine_that_is_not_installed_is_said(
    name: EngineName, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(UsageError, match=install):
        find_engine(name)
