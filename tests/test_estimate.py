"""Estimates: what they count is what runs compute, on small networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.node import Node

import secateur
from secateur.cli.app import app
from secateur.config import Budget, RefitSection, RunConfig, ScoreSection, from_dict
from secateur.data import Batch
from secateur.graph.build import build_dependency_graph
from secateur.graph.dependency import DependencyGraph
from secateur.graph.interpreter import GraphInterpreter, partial_pass
from secateur.graph.module_state import tensors_of
from secateur.graph.taps import kernels_of
from secateur.pipeline import work
from secateur.pipeline.estimate import FACTOR_SLOWER, GATHERED_MACS, PRODUCT_SLOWER, Speed
from secateur.pipeline.work import Regression, Work
from secateur.pruning.ranking import rank
from secateur.pruning.refit import patch_regression
from secateur.pruning.sensitivity import measure_sensitivity, passes_behind
from secateur.runtime.timing import Rounds
from secateur.scoring.criteria import elimination, reconstruction
from secateur.scoring.scores import score_filters

IMAGES = 80


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    ).eval()


@pytest.fixture
def model() -> nn.Module:
    return _network()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(IMAGES, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def dependencies(model: nn.Module, images: Tensor) -> DependencyGraph:
    return build_dependency_graph(model, images[:2])


def test_the_sizes_of_taps_are_those_that_are_eliminated(
    model: nn.Module,
    images: Tensor,
    dependencies: DependencyGraph,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[tuple[int, int, int]] = []
    eliminate = elimination.eliminate

    def watch(covariance: Tensor, consumers: Tensor, filters: int, norms: Tensor | None) -> Any:
        sizes.append((len(covariance), filters, len(consumers)))
        return eliminate(covariance, consumers, filters, norms)

    monkeypatch.setattr(reconstruction, "eliminate", watch)
    secateur.prune(model, images)
    taps = work.tap_sizes(dependencies, tensors_of(model), 2**40, IMAGES)
    assert [(tap.values, tap.filters, tap.outputs) for tap in taps] == sizes
    assert sizes == [(72, 8, 12), (12, 12, 5)]
    assert [tap.positions for tap in taps] == [14 * 14, 12 * 12]
    small = work.tap_sizes(dependencies, tensors_of(model), 20_000, IMAGES)
    assert [tap.values for tap in small] == [8, 12]
    few = work.tap_sizes(dependencies, tensors_of(model), 2**40, 53)  # 54 * 16 = 12 * 72
    assert [tap.values for tap in few] == [8, 12]


def test_second_moments_fit_in_memory(model: nn.Module, images: Tensor) -> None:
    whole = secateur.prune(model, images)
    assert secateur.prune(model, images, settings={"refit.memory_mib": 1}).plan == whole.plan
    criterion = reconstruction.Reconstruction(memory_bytes=20_000)
    dependencies = build_dependency_graph(model, images[:2])
    criterion.reset(kernels_of(dependencies, tensors_of(model)))
    assert {window.taps for window in criterion._windows.values()} == {1}
    values = [8, 12]
    needed = reconstruction.moments_bytes(values) + reconstruction.elimination_bytes(values)
    assert needed == 24 * (81 + 169) + 64 * 144


def test_a_likely_cut_meets_the_target(dependencies: DependencyGraph) -> None:
    removed = work.likely_cut(dependencies, Budget("macs", 0.5))
    assert 0.4 < dependencies.macs(removed) / dependencies.macs() <= 0.5
    removed = work.likely_cut(dependencies, Budget("params", 0.6))
    assert 0.5 < dependencies.params(removed) / dependencies.params() <= 0.6
    removed = work.likely_cut(dependencies, Budget("filters", 0.5))
    assert sum(map(len, removed.values())) == 10
    assert work.cut_cost(dependencies, {}) == 1.0


def test_regressions_are_those_of_the_refit(
    model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[patch_regression.RowCounts] = []
    original = patch_regression.PatchRegression.__init__

    def watch(self: Any, layers: Any, state: Any, place: Any, count: Any, **others: Any) -> None:
        counts.append(count)
        original(self, layers, state, place, count, **others)

    monkeypatch.setattr(patch_regression.PatchRegression, "__init__", watch)
    pruned = secateur.prune(model, images, settings={"plan.allocation": "uniform"})
    dependencies = build_dependency_graph(model, images[:2])
    settings = RefitSection()
    score_images = len(pruned._dataset.train.labels)
    expected = work.regressions(dependencies, pruned.plan.removed, settings, score_images)
    assert [problem.counts(settings.memory_bytes // 2) for problem in expected] == counts
    assert len(counts) == 2


def test_groups_of_depthwise_layers_go_with_their_filters() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.ReLU(),
        nn.Conv2d(4, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1),
        nn.Flatten(),
        nn.Linear(6 * 36, 5),
    ).eval()
    dependencies = build_dependency_graph(network, torch.randn(2, 3, 8, 8))
    removed = {"0": (0,), "2": (0, 1)}
    problems = work.regressions(dependencies, removed, RefitSection(), 1000)
    sizes = [(problem.groups, problem.inputs, problem.outputs) for problem in problems]
    assert sizes == [(1, 3, 6), (6, 9, 1), (1, 6, 6), (1, 216, 5)]
    assert (problems[0].rows, problems[0].held_out) == (800 * 32, 200 * 32)
    assert problems[-1].rows == 800
    few = work.regressions(dependencies, removed, RefitSection(), 100)
    assert few[0].rows == 80 * 64  # all positions: 82 of each would be 8,192


def test_fewer_rows_than_unknowns_cost_less() -> None:
    primal, dual = Regression(5000, 500, 1, 4000, 64), Regression(100, 10, 1, 4000, 64)
    assert dual.work(2**31).float64 < primal.work(2**31).float64 / 100


def test_passes_of_the_sensitivity_are_counted(
    model: nn.Module,
    images: Tensor,
    dependencies: DependencyGraph,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    macs = {layer.node: layer.macs(dependencies.count_after({})) for layer in dependencies.layers}
    computed = 0
    compute = GraphInterpreter._compute

    def count(self: GraphInterpreter, node: Node, override: Any) -> Any:
        nonlocal computed
        value = compute(self, node, override)
        computed += len(value) * macs.get(node, 0)
        return value

    moments = reconstruction.Reconstruction()
    scores = score_filters(
        model,
        dependencies,
        lambda: [Batch(images, torch.zeros(IMAGES).long(), torch.arange(IMAGES))],
        {"reconstruction": moments},
        None,
        ScoreSection(),
    )["reconstruction"]
    ranking = rank(scores.scores, dependencies, "reconstruction")
    batches = [Batch(images, torch.zeros(IMAGES).long(), torch.arange(IMAGES))]
    monkeypatch.setattr(GraphInterpreter, "_compute", count)
    state = tensors_of(model)
    measure_sensitivity(state, dependencies, moments, ranking, batches, most_images=24)
    groups = dependencies.groups.values()
    parts = [
        partial_pass(dependencies.graph, (consumer.node for consumer in group.consumers))
        for group in groups
    ]
    passes = 1 + work.passes_before(dependencies, parts) + passes_behind(dependencies, parts)
    taps = work.tap_sizes(dependencies, state, 2**40, IMAGES)
    expected = work.sensitivity_work(taps, 24, passes).passes
    assert computed / dependencies.macs() == pytest.approx(expected)


def test_more_images_take_longer(model: nn.Module, images: Tensor) -> None:
    few = secateur.estimate(model, images[:30])
    many = secateur.estimate(model, images.repeat(200, 1, 1, 1), max_images=12000)
    assert list(few.seconds) == ["score original", "score filters and cut", "refit"]
    assert many.total_seconds > few.total_seconds
    assert many.memory_bytes > few.memory_bytes > 2**26
    assert str(few).splitlines()[-1].startswith("all: ")


def test_seconds_follow_from_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = Speed(a_pass=0.1, a_read=0.5, a_trace=1.0, float32=1e-9, float64=2e-9)
    monkeypatch.setattr("os.cpu_count", lambda: torch.get_num_threads())
    assert speed.seconds(Work(passes=10, reads=4)) == pytest.approx(3.0)
    monkeypatch.setattr("os.cpu_count", lambda: torch.get_num_threads() + 1)
    assert speed.seconds(Work(passes=10, reads=4)) == pytest.approx(2.0)
    assert speed.seconds(Work(float32=1e9)) == pytest.approx(PRODUCT_SLOWER)
    assert speed.seconds(Work(float64=1e9)) == pytest.approx(2 * FACTOR_SLOWER)
    assert speed.seconds(Work(copied=1e9)) == pytest.approx(GATHERED_MACS)
    both = Work(1, 2, 3, 4, 5) + Work(1, 1, 1, 1, 1) * 2
    assert both == Work(3, 4, 5, 6, 7)
    # 16 images take 1.6 s, 4 take 0.4 s: five rounds fit into 2 s
    assert speed.latency(Rounds(fewest=3, most=11, seconds=2.0, warm_up=1), 1) == pytest.approx(2.0)
    assert speed.latency(Rounds(fewest=3, most=4, seconds=9.0, warm_up=1), 2) == pytest.approx(4.0)


def test_a_dry_run_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["prune", "-m", "resnet20", "--allow-untrained", "-d", "digits", "--dry-run"]
    app([*arguments, "--no-finetune", "--calibration-images", "40"], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "score original",
        "score filters and cut",
        "refit",
        "report",
        "all",
    ]
    monkeypatch.setattr("secateur.pipeline.inputs.find_engine", lambda name: None)
    app([*arguments, "--json", "--engine", "openvino"], standalone_mode=False)
    content = json.loads(capsys.readouterr().out)
    assert set(content) == {"seconds", "memory_bytes", "not_counted"}
    assert "fine-tune" in content["seconds"]
    assert content["not_counted"].startswith("what OpenVINO takes to prepare networks and to time")
    assert not list(tmp_path.iterdir())


def test_fast_changes_defaults_alone() -> None:
    tables: dict[str, Any] = {"model": {"name": "resnet20"}, "data": {"source": "digits"}}

    def config(**sections: dict[str, Any]) -> RunConfig:
        return from_dict({**tables, **sections}, RunConfig)

    fast = config(score={"fast": True})
    assert fast.score.criterion == "l1"
    assert fast.data.calibration_images == 500
    assert fast.plan.sensitivity_images == 32
    assert not fast.refit.joint
    assert from_dict(fast.model_dump(mode="json", exclude_none=True), RunConfig) == fast
    few = {"source": "digits", "calibration_images": 100}
    partly = config(score={"fast": True, "criterion": "taylor"}, data=few)
    assert (partly.score.criterion, partly.data.calibration_images) == ("taylor", 100)
    assert config().score.criterion == "vote"
    assert config().plan.sensitivity_images == 256


def test_fast_from_python(model: nn.Module, images: Tensor) -> None:
    pruned = secateur.prune(model, images, settings={"score.fast": True})
    assert pruned.plan.criterion == "l1"
