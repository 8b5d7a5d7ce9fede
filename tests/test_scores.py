from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import pytest
import torch
from torch import Tensor, nn

from networks import CLASSES, make_network, random_images
from secateur.config import CRITERIA, ScoreSection
from secateur.data import Batch
from secateur.data.preprocessing import Preprocessing
from secateur.graph.build import build_dependency_graph
from secateur.graph.dependency import DependencyGraph
from secateur.graph.module_state import tensors_of
from secateur.graph.taps import Kernels
from secateur.scoring import concepts, criteria
from secateur.scoring.criteria import FeatureBatch, Need
from secateur.scoring.scores import FilterScores, score_filters

IMAGES = random_images(10)
LABELS = torch.tensor([0, 3, 1, 4, 2, 2, 0, 1, 3, 3])
EVERY_CRITERION = CRITERIA
CLASS_NAMES = tuple("abcde")
SOURCES = ("evidence", "saliency", "factors:3", "colours")
SETTINGS = ScoreSection(top_fraction=0.3, quantile=0.1, sample_every=2, use_labels=True)


@pytest.fixture(scope="module", params=["chain", "concat"])
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, DependencyGraph]:
    model = make_network(request.param)
    return model, build_dependency_graph(model, random_images(2))


def calibration_batches(size: int, labels: Tensor) -> Callable[[], Iterable[Batch]]:
    numbers = torch.arange(len(IMAGES))
    split = zip(IMAGES.split(size), labels.split(size), numbers.split(size), strict=True)
    parts = [Batch(*parts) for parts in split]
    return lambda: iter(parts)


def source_of(network: tuple[nn.Module, DependencyGraph], text: str) -> concepts.ConceptSource:
    model, dependencies = network
    return concepts.make(
        text, dependencies.graph, tensors_of(model), CLASS_NAMES, Preprocessing(8, 8)
    )


def scores_by(
    names: Iterable[str],
    network: tuple[nn.Module, DependencyGraph],
    *,
    size: int = 4,
    labels: Tensor = LABELS,
    settings: ScoreSection = SETTINGS,
    source: str = "evidence",
) -> dict[str, FilterScores]:
    return score_filters(
        *network,
        calibration_batches(size, labels),
        {name: criteria.make(name, settings, 1, {}) for name in names},
        source_of(network, source),
        settings,
    )


WITHOUT_LABELS = SETTINGS.model_copy(update={"use_labels": False})


def assert_same(one: dict[str, FilterScores], other: dict[str, FilterScores]) -> None:
    assert one.keys() == other.keys()
    for name, scores in one.items():
        assert scores.scores.keys() == other[name].scores.keys()
        for group, score in scores.scores.items():
            assert torch.equal(score, other[name].scores[group]), (name, group)


def test_one_pass_for_all_criteria_equals_a_pass_for_each(
    network: tuple[nn.Module, DependencyGraph],
) -> None:
    together = scores_by(EVERY_CRITERION, network)
    for name in EVERY_CRITERION:
        alone = scores_by([name], network)
        assert_same(alone, {name: together[name]})
        assert alone[name].criterion == name


def test_scoring_twice_gives_the_same(network: tuple[nn.Module, DependencyGraph]) -> None:
    first, second = (scores_by(EVERY_CRITERION, network) for _ in range(2))
    assert_same(first, second)


@pytest.mark.parametrize("size", [1, 3, 10])
def test_batch_size_does_not_change_scores(
    network: tuple[nn.Module, DependencyGraph], size: int
) -> None:
    expected = scores_by(EVERY_CRITERION, network, size=5)
    scores = scores_by(EVERY_CRITERION, network, size=size)
    for name in EVERY_CRITERION:
        for group, score in scores[name].scores.items():
            assert torch.equal(score, expected[name].scores[group]), (name, group)


@pytest.mark.parametrize("source", SOURCES)
def test_labels_are_ignored_unless_they_may_be_used(
    network: tuple[nn.Module, DependencyGraph], source: str
) -> None:
    true, false = (
        scores_by(EVERY_CRITERION, network, labels=labels, settings=WITHOUT_LABELS, source=source)
        for labels in (LABELS, LABELS.flip(0))
    )
    assert_same(true, false)


def test_labels_count_where_they_may_be_used(network: tuple[nn.Module, DependencyGraph]) -> None:
    true, other = (
        scores_by(["vote-response", "taylor"], network, labels=labels)
        for labels in (LABELS, (LABELS + 1) % CLASSES)
    )
    for name in ("vote-response", "taylor"):
        assert any(
            not torch.equal(score, other[name].scores[group])
            for group, score in true[name].scores.items()
        )


def test_predictions_taken_as_labels_give_the_scores_without_labels(
    network: tuple[nn.Module, DependencyGraph],
) -> None:
    with torch.no_grad():
        predicted = network[0](IMAGES).argmax(1)
    labelled = scores_by(EVERY_CRITERION, network, labels=predicted)
    unlabelled = scores_by(EVERY_CRITERION, network, settings=WITHOUT_LABELS)
    assert_same(labelled, unlabelled)


def test_the_order_of_the_filters_is_that_of_the_layer(
    network: tuple[nn.Module, DependencyGraph],
) -> None:
    """Masking the last filter of a group takes all of its votes, and only its."""
    model, dependencies = network
    name, group = next(iter(dependencies.groups.items()))
    last = len(group) - 1
    twin = make_network("chain" if name == "conv1" else "concat")
    with torch.no_grad():
        for slots in dependencies.slots:
            if slots.dim == 0 and slots.tensor.endswith(("weight", "bias")):
                at = [i for i, c in enumerate(slots.channels) if c == group.channels[last]]
                twin.get_parameter(slots.tensor)[at] = 0.0
    before = scores_by(["vote-response", "l1"], (model, dependencies))
    after = scores_by(["vote-response", "l1"], (twin, dependencies))
    assert after["vote-response"].scores[name][last] == 0
    assert after["l1"].scores[name][last] == 0
    assert torch.equal(after["l1"].scores[name][:last], before["l1"].scores[name][:last])
    assert (after["vote-response"].scores[name][:last] > 0).any()


class Counting:
    """An onlooker that counts what it is shown."""

    needs: frozenset[Need] = frozenset({"maps"})

    def __init__(self) -> None:
        self.images: dict[str, int] = {}

    def reset(self, parts: Mapping[str, Kernels]) -> None:
        self.images = dict.fromkeys(parts, 0)

    def update(self, features: FeatureBatch) -> None:
        self.images[features.tap] += len(features.maps)

    def state(self) -> Iterable[Tensor]:
        return ()


@pytest.mark.parametrize("names", [["random"], ["vote-iou", "taylor"]])
def test_onlookers_see_every_image_in_the_same_pass(
    network: tuple[nn.Module, DependencyGraph], names: list[str]
) -> None:
    dependencies = network[1]
    counting = Counting()
    scores = score_filters(
        *network,
        calibration_batches(4, LABELS),
        {name: criteria.make(name, SETTINGS, 1, {}) for name in names},
        source_of(network, "evidence"),
        SETTINGS,
        observers=(counting,),
    )
    assert counting.images == dict.fromkeys(dependencies.groups, len(IMAGES))
    assert_same(scores, scores_by(names, network))
