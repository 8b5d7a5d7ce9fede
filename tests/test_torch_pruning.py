from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from networks import CLASSES, make_network, random_images
from secateur.config import ScoreSection
from secateur.data import Batch
from secateur.data.preprocessing import Preprocessing
from secateur.graph.build import build_dependency_graph
from secateur.graph.module_state import tensors_of
from secateur.pruning.torch_pruning import CriterionImportance
from secateur.runtime.errors import UnknownName, UsageError
from secateur.scoring import concepts, criteria
from secateur.scoring.scores import score_filters

torch_pruning = pytest.importorskip("torch_pruning")
IMAGES = random_images(6)
BATCHES = [(IMAGES[:4], torch.tensor([0, 1, 2, 3])), (IMAGES[4:], torch.tensor([4, 0]))]


def pruner_of(model: nn.Module, importance: CriterionImportance, **more: Any) -> Any:
    return torch_pruning.pruner.MagnitudePruner(
        model,
        example_inputs=IMAGES[:1],
        importance=importance,
        ignored_layers=[model.get_submodule("linear")],
        **{"pruning_ratio": 0.5, "in_channel_groups": {}, "out_channel_groups": {}, **more},
    )


def scores_of(model: nn.Module, name: str = "l2") -> dict[str, Tensor]:
    dependencies = build_dependency_graph(model, IMAGES[:2], prune_residual=True)
    settings = ScoreSection(criterion=name)
    state, size = tensors_of(model), Preprocessing(8, 8)
    source = concepts.make(settings.concepts, dependencies.graph, state, tuple("abcde"), size)
    criterion = criteria.make(name, settings, 0, {})
    numbers = torch.arange(len(IMAGES)).split(4)
    batches = [Batch(*tensors, indices) for tensors, indices in zip(BATCHES, numbers, strict=True)]
    scored = score_filters(
        model, dependencies, lambda: batches, {name: criterion}, source, settings
    )
    return scored[name].scores


def cut_and_watch(model: nn.Module, pruner: Any) -> dict[str, set[int]]:
    """One step of the pruner: the filters that each layer loses."""
    names = {module: name for name, module in model.named_modules()}
    removed: dict[str, set[int]] = {}
    for group in pruner.step(interactive=True):
        for dep, indices in group:
            if "out_channels" in dep.handler.__name__ and dep.target.module in names:
                removed.setdefault(names[dep.target.module], set()).update(indices)
        group.prune()
    return removed


def assert_lowest_go(scores: Tensor, removed: set[int]) -> None:
    kept = [i for i in range(len(scores)) if i not in removed]
    assert removed
    assert kept
    assert scores[sorted(removed)].max() <= scores[kept].min()


@pytest.mark.parametrize("network", ["chain", "residual", "concat", "depthwise", "flattened"])
@pytest.mark.parametrize("criterion", ["l2", "taylor", "activation_std", "vote-response", "vote"])
def test_the_filters_with_the_lowest_scores_go(network: str, criterion: str) -> None:
    model = make_network(network)
    expected = scores_of(model, criterion)
    importance = CriterionImportance(model, IMAGES[:2], criterion, BATCHES)
    removed = cut_and_watch(model, pruner_of(model, importance))
    assert expected
    assert not importance.skipped
    for layer, scores in expected.items():
        assert len(removed[layer]) == (len(scores) + 1) // 2
        assert_lowest_go(scores, removed[layer])
    assert model(IMAGES).shape == (6, CLASSES)


def test_the_network_is_scored_anew_after_each_step() -> None:
    model = make_network("chain")
    pruner = pruner_of(model, CriterionImportance(model, IMAGES[:2], "l2"), iterative_steps=2)
    pruner.step()
    halfway = scores_of(model)
    assert len(halfway["conv2"]) < 7
    assert_lowest_go(halfway["conv2"], cut_and_watch(model, pruner)["conv2"])


def test_frozen_layers_are_left_whole_and_named() -> None:
    model = make_network("view_fixed")
    importance = CriterionImportance(model, IMAGES[:2], "l2")
    pruner_of(model, importance).step()
    assert model.get_submodule("conv.0").out_channels == 6
    assert model.get_submodule("stem.0").out_channels == 2
    assert list(importance.skipped) == ["conv.0"]
    assert importance.skipped["conv.0"]


def test_images_must_be_given_where_they_are_needed() -> None:
    model = make_network("chain")
    with pytest.raises(UsageError, match="'taylor' needs images: pass batches"):
        CriterionImportance(model, IMAGES[:2], "taylor")
    with pytest.raises(UnknownName, match="unknown criterion 'l3'"):
        CriterionImportance(model, IMAGES[:2], "l3")


def test_torch_pruning_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(UsageError, match="pip install torch-pruning"):
        CriterionImportance(make_network("chain"), IMAGES[:2], "l2")
