"""Criteria against small, slow references."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.node import Node

from networks import Chain, make_network, random_images
from secateur.config import CRITERIA, ScoreSection
from secateur.data import Batch
from secateur.data.concept_masks import UNLABELLED, Concept, ConceptMasks, at_resolution
from secateur.graph.build import build_dependency_graph
from secateur.graph.dependency import DependencyGraph
from secateur.graph.patches import Window
from secateur.graph.taps import ConsumerKernel, Kernels
from secateur.runtime.errors import DataError, UnknownName, UsageError
from secateur.scoring.concepts import ConceptInput
from secateur.scoring.criteria import Criterion, FeatureBatch, Need, Regions, dependence, make
from secateur.scoring.criteria.dependence import ChannelIndependence, nuclear_norm_losses
from secateur.scoring.criteria.elimination import RIDGE, ROUNDS, eliminate, error_curve
from secateur.scoring.criteria.kernels import KernelFunction, l2
from secateur.scoring.criteria.reconstruction import (
    POSITIONS,
    WEIGHT_UNITS,
    Reconstruction,
    _spread,
)
from secateur.scoring.criteria.statistics import ActivationEntropy, ActivationStd, Apoz
from secateur.scoring.criteria.votes import VoteSettings, shares, winners
from secateur.scoring.scores import score_filters
from secateur.scoring.thresholds import ActivationStatistics, StatisticsAccumulator

IMAGES = random_images(6)
LABELS = torch.tensor([0, 3, 1, 4, 2, 2])
SETTINGS = ScoreSection(quantile=0.15, top_fraction=0.3, sample_every=1, use_labels=True)
GROUPS = ("conv1", "conv2")


class TwoRegions:
    """Where an image's first channel is positive, and its left half: two concepts."""

    concepts = (Concept("bright", "test"), Concept("left", "test"))
    node: Node | None = None
    needs_gradient = False
    needs_learning = False

    def learn(self, concept_input: ConceptInput) -> None:
        raise AssertionError("there is nothing to learn")

    def finish_learning(self) -> None:
        raise AssertionError("there is nothing to learn")

    def find(self, concept_input: ConceptInput) -> ConceptMasks:
        return two_regions(concept_input.images)


def two_regions(images: Tensor) -> ConceptMasks:
    bright = images[:, 0] > 0
    left = torch.zeros_like(bright)
    left[:, :, :4] = True
    return ConceptMasks(torch.stack([bright, left], 1), torch.tensor([0, 1]).repeat(len(images), 1))


def calibration_batches() -> Iterator[Batch]:
    for part in torch.arange(6).split(4):
        yield Batch(IMAGES[part], LABELS[part], part)


@pytest.fixture(scope="module")
def chain() -> Chain:
    model = make_network("chain")
    assert isinstance(model, Chain)
    return model


@pytest.fixture(scope="module")
def dependencies(chain: Chain) -> DependencyGraph:
    return build_dependency_graph(chain, random_images(2))


def scores_of(
    name: str,
    model: nn.Module,
    dependencies: DependencyGraph,
    settings: ScoreSection = SETTINGS,
    weights: dict[int, float] | None = None,
) -> dict[str, Tensor]:
    criterion = make(name, settings, 0, weights or {})
    scores = score_filters(
        model, dependencies, calibration_batches, {name: criterion}, TwoRegions(), settings
    )
    assert scores[name].criterion == name
    return scores[name].scores


def maps_by_hand(model: Chain) -> dict[str, Tensor]:
    """What `conv2` and the pooling read, caught by hooks on an eager run."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.bn1.register_forward_hook(lambda m, x, y: seen.update(conv1=F.relu(y))),
        model.bn2.register_forward_hook(lambda m, x, y: seen.update(conv2=F.relu(y))),
    ]
    with torch.no_grad():
        model(IMAGES)
    for hook in hooks:
        hook.remove()
    return seen


def regions_by_hand(size: tuple[int, int]) -> Tensor:
    return at_resolution(two_regions(IMAGES).masks, size)


def outgoing_norms(model: Chain) -> dict[str, list[float]]:
    consumers = {"conv1": model.conv2.weight, "conv2": model.linear.weight}
    return {
        name: [
            float(weight.detach()[:, c].double().square().sum().sqrt())
            for c in range(weight.shape[1])
        ]
        for name, weight in consumers.items()
    }


def thresholds_by_hand(maps: Tensor) -> tuple[list[float], list[float]]:
    """Means and thresholds, by the accumulator that has tests of its own."""
    accumulator = StatisticsAccumulator(maps.shape[1], 10_000)
    accumulator.update(maps)
    statistics = accumulator.compute(SETTINGS.quantile)
    return statistics.mean.tolist(), statistics.threshold.tolist()


def response_strengths(model: Chain, group: str) -> Iterator[tuple[int, list[float]]]:
    """The concept and the filters' strengths at each position of each region."""
    maps = maps_by_hand(model)[group]
    images, filters, height, width = maps.shape
    masks = regions_by_hand((height, width))
    mean = [float(maps[:, c].double().mean()) for c in range(filters)]
    norm = outgoing_norms(model)[group]
    for i in range(images):
        for region in range(2):
            for row in range(height):
                for column in range(width):
                    if masks[i, region, row, column]:
                        yield (
                            region,
                            [
                                ((float(maps[i, c, row, column]) - mean[c]) * norm[c]) ** 2
                                for c in range(filters)
                            ],
                        )


@pytest.mark.parametrize("group", GROUPS)
def test_shares_divide_a_vote_of_every_position(
    chain: Chain, dependencies: DependencyGraph, group: str
) -> None:
    scores = scores_of("vote-response", chain, dependencies)[group]
    expected = torch.zeros_like(scores)
    for _, strength in response_strengths(chain, group):
        expected += torch.tensor(strength, dtype=torch.float64) / sum(strength)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    size = {"conv1": (8, 8), "conv2": (4, 4)}[group]
    assert float(scores.sum()) == pytest.approx(int(regions_by_hand(size).sum()), abs=1e-2)


@pytest.mark.parametrize("vote_mode", ["top", "plurality"])
@pytest.mark.parametrize("group", GROUPS)
def test_winners_get_a_vote_of_every_position(
    chain: Chain, dependencies: DependencyGraph, group: str, vote_mode: str
) -> None:
    settings = SETTINGS.model_copy(update={"vote_mode": vote_mode})
    scores = scores_of("vote-response", chain, dependencies, settings)[group]
    votes = [0] * len(scores)
    top = math.ceil(SETTINGS.top_fraction * len(scores)) if vote_mode == "top" else 1
    for _, strength in response_strengths(chain, group):
        for c in sorted(range(len(scores)), key=lambda c: -strength[c])[:top]:
            votes[c] += 1
    assert scores.tolist() == votes


@pytest.mark.parametrize("group", GROUPS)
def test_weights_count_votes_by_concept(
    chain: Chain, dependencies: DependencyGraph, group: str
) -> None:
    weights = [0.25, 3.0]
    settings = SETTINGS.model_copy(update={"vote_mode": "plurality"})
    scores = scores_of("vote-response", chain, dependencies, settings, dict(enumerate(weights)))[
        group
    ]
    votes = [0.0] * len(scores)
    for concept, strength in response_strengths(chain, group):
        votes[max(range(len(scores)), key=lambda c: strength[c])] += weights[concept]
    assert scores.tolist() == votes


@pytest.mark.parametrize("group", GROUPS)
def test_regions_vote_once_each(chain: Chain, dependencies: DependencyGraph, group: str) -> None:
    settings = SETTINGS.model_copy(update={"voting_unit": "regions", "vote_mode": "plurality"})
    scores = scores_of("vote-response", chain, dependencies, settings)[group]
    assert int(scores.sum()) == 2 * len(IMAGES)
    maps = maps_by_hand(chain)[group]
    mean = maps.double().mean((0, 2, 3), keepdim=True)
    strength = (maps.double() - mean).square()
    norms = torch.tensor(outgoing_norms(chain)[group]).square()
    masks = regions_by_hand((maps.shape[2], maps.shape[3]))
    votes = [0] * len(scores)
    for i in range(len(IMAGES)):
        for region in range(2):
            total = strength[i][:, masks[i, region]].sum(1) * norms
            votes[int(total.argmax())] += 1
    assert scores.tolist() == votes


@pytest.mark.parametrize("group", GROUPS)
def test_iou_votes_are_those_of_every_region(
    chain: Chain, dependencies: DependencyGraph, group: str
) -> None:
    scores = scores_of("vote-iou", chain, dependencies)[group]
    maps = maps_by_hand(chain)[group]
    _, thresholds = thresholds_by_hand(maps)
    masks = regions_by_hand((maps.shape[2], maps.shape[3]))
    filters = maps.shape[1]
    votes = [0] * filters
    for i in range(len(IMAGES)):
        for region in range(2):
            inside = {tuple(p) for p in masks[i, region].nonzero().tolist()}
            iou = []
            for c in range(filters):
                active = {tuple(p) for p in (maps[i, c] > thresholds[c]).nonzero().tolist()}
                iou.append(len(active & inside) / max(1, len(active | inside)))
            order = sorted(range(filters), key=lambda c: (-iou[c], c))
            for c in order[: math.ceil(SETTINGS.top_fraction * filters)]:
                votes[c] += iou[c] > 0
    assert scores.tolist() == votes
    assert sum(votes) > 0


STRENGTHS = st.lists(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=4, max_size=4), min_size=1, max_size=5
)


@given(strengths=STRENGTHS, top=st.integers(1, 4))
def test_the_smaller_number_wins_between_equals(strengths: list[list[float]], top: int) -> None:
    cast = winners(torch.tensor(strengths), top)
    for row, strength in zip(cast.tolist(), strengths, strict=True):
        order = sorted(range(4), key=lambda c: (-strength[c], c))[:top]
        assert row == [float(c in order and strength[c] > 0) for c in range(4)]


@given(strengths=STRENGTHS)
def test_shares_make_up_one_vote(strengths: list[list[float]]) -> None:
    cast = shares(torch.tensor(strengths, dtype=torch.float64))
    for row, strength in zip(cast.tolist(), strengths, strict=True):
        total = sum(strength)
        assert row == pytest.approx([s / total if total else 0.0 for s in strength])


def test_an_absent_region_has_no_vote() -> None:
    rule = VoteSettings("share", "cells", 0.1, {1: 2.5, 2: 0.0})
    assert rule.weigh(torch.tensor([[0, 1, 2, UNLABELLED]])).tolist() == [[1.0, 2.5, 0.0, 0.0]]


# --- reconstruction ----------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    filters=st.integers(1, 5),
    taps=st.integers(1, 3),
    outputs=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    has_norm_weights=st.booleans(),
)
def test_filters_are_removed_in_the_order_of_their_loss(
    filters: int, taps: int, outputs: int, seed: int, has_norm_weights: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = filters * taps
    rows = torch.randn(60, values, generator=generator, dtype=torch.float64)
    rows = rows @ torch.randn(values, values, generator=generator, dtype=torch.float64)
    covariance = rows.T @ rows / len(rows)
    consumers = torch.randn(outputs, values, generator=generator, dtype=torch.float64)
    norm_weights = torch.rand(filters, generator=generator, dtype=torch.float64)
    norm_weights = norm_weights if has_norm_weights else torch.ones(filters, dtype=torch.float64)
    order = eliminate(covariance, consumers, filters, norm_weights if has_norm_weights else None)
    curve = error_curve(covariance, consumers, order[::-1])
    assert curve[0] == 0
    errors = curve[1:].tolist()
    ridged = covariance + RIDGE * covariance.diagonal().mean() * torch.eye(values)

    def missed(left: list[int]) -> float:
        """What the consumers can't get from some filters, by least squares from scratch."""
        whole = torch.trace(consumers @ ridged @ consumers.T)
        index = [tap * filters + number for number in left for tap in range(taps)]
        if not index:
            return float(whole)
        known = ridged[:, index] @ torch.linalg.inv(ridged[index][:, index]) @ ridged[index]
        return float(whole - torch.trace(consumers @ known @ consumers.T))

    left = list(range(filters))
    for going, error in zip(order, errors, strict=True):
        now = missed(left)
        costs = {
            number: (missed([n for n in left if n != number]) - now) * float(norm_weights[number])
            for number in left
        }
        assert costs[going] <= min(costs.values()) * (1 + 1e-6) + 1e-8 * missed([])
        left.remove(going)
        assert error == pytest.approx(missed(left), rel=1e-5, abs=1e-7 * missed([]))


@pytest.mark.parametrize(
    ("filters", "offsets", "outputs"), [(40, 9, 30), (300, 1, 20), (24, 1, 200)]
)
def test_many_filters_are_removed_in_the_order_of_a_plain_elimination(
    filters: int, offsets: int, outputs: int
) -> None:
    """With several at a time, and with more outputs than values; the arguments stay as they are."""
    values = filters * offsets
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(2 * values, values, generator=generator, dtype=torch.float64)
    rows = (rows @ torch.randn(values, values, generator=generator, dtype=torch.float64)).relu()
    covariance = rows.T @ rows / len(rows)
    consumers = torch.randn(outputs, values, generator=generator, dtype=torch.float64)
    before = covariance.clone(), consumers.clone()
    order = eliminate(covariance, consumers, filters)
    assert torch.equal(covariance, before[0])
    assert torch.equal(consumers, before[1])

    inverse = (covariance + RIDGE * covariance.diagonal().mean() * torch.eye(values)).inverse()
    weights, left, expected = consumers, list(range(filters)), []
    while left:
        votes = {}
        for number in left:
            mine = torch.arange(number, values, filters)
            carried = weights[:, mine]
            votes[number] = float((carried @ inverse[mine][:, mine].inverse() * carried).sum())
        removed = sorted(left, key=lambda n: (votes[n], -n))[: max(1, filters // ROUNDS)]
        expected += removed
        gone = torch.cat([torch.arange(number, values, filters) for number in removed])
        passed = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
        weights = weights - weights[:, gone] @ passed
        inverse = inverse - inverse[:, gone] @ passed
        left = [number for number in left if number not in removed]
    assert order == expected


@pytest.mark.parametrize("offsets", [1, 3])
def test_errors_on_other_images_are_those_of_least_squares_on_the_first(
    offsets: int, generator: torch.Generator
) -> None:
    filters, rows = 6, 40
    values = filters * offsets
    mixing = torch.randn(values, values, generator=generator, dtype=torch.float64)
    fitted, others = (
        torch.randn(rows, values, generator=generator, dtype=torch.float64) @ mixing
        for _ in range(2)
    )
    mean = fitted.mean(0)
    fitted, others = fitted - mean, others - mean
    covariance, held_out = (x.T @ x / rows for x in (fitted, others))
    consumers = torch.randn(4, values, generator=generator, dtype=torch.float64)
    ranking = torch.randperm(filters, generator=generator).tolist()
    curve = error_curve(covariance, consumers, ranking, held_out)
    ridged = covariance + RIDGE * covariance.diagonal().mean() * torch.eye(values)
    largest = 0.0
    for removed in range(filters + 1):
        kept = [o * filters + n for n in ranking[: filters - removed] for o in range(offsets)]
        gone = [o * filters + n for n in ranking[filters - removed :] for o in range(offsets)]
        predicted = others[:, kept] @ torch.linalg.solve(
            ridged[kept][:, kept], ridged[kept][:, gone]
        )
        missed = (others[:, gone] - predicted) @ consumers[:, gone].T
        largest = max(largest, float(missed.square().sum() / rows))
        assert float(curve[removed]) == pytest.approx(largest)
    in_sample = error_curve(covariance, consumers, ranking)
    same = error_curve(covariance, consumers, ranking, ridged)
    torch.testing.assert_close(same, in_sample)


def test_of_two_copies_only_one_stays() -> None:
    rows = torch.randn(200, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rows[:, 2] = 3 * rows[:, 0]
    covariance, consumers = rows.T @ rows / 200, torch.eye(4, dtype=torch.float64)
    order = eliminate(covariance, consumers, 4)
    assert order[0] in (0, 2)
    errors = error_curve(covariance, consumers, order[::-1])
    assert errors[1] < 1e-2 * errors[2]


def test_dead_filters_go_first_and_all_dead_ones_do_no_harm() -> None:
    rows = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rows[:, 1] = 0
    order = eliminate(rows.T @ rows, torch.ones(2, 4, dtype=torch.float64), 4)
    assert order[0] == 1
    nothing, consumers = torch.zeros(4, 4).double(), torch.ones(2, 4).double()
    order = eliminate(nothing, consumers, 4)
    assert sorted(order) == [0, 1, 2, 3]
    assert error_curve(nothing, consumers, order).isfinite().all()


def feature_batch_of(
    part: str, maps: Tensor, numbers: Tensor, kernels: Kernels, images: int = 0
) -> FeatureBatch:
    """Return a batch of a calibration set of `images`, by default of this batch alone."""
    accumulator = StatisticsAccumulator(maps.shape[1], 10_000)
    accumulator.update(maps)
    size = (maps.shape[2], maps.shape[3])
    return FeatureBatch(
        part, maps, numbers, kernels, accumulator.compute(0.1, images or len(maps)), size, None
    )


def test_products_are_those_of_patches_inside_the_regions() -> None:
    """Weighed by how many regions they lie in, position by position."""
    generator = torch.Generator().manual_seed(1)
    maps = torch.rand(3, 2, 5, 5, generator=generator)
    window = Window((3, 3), border=(1, 1, 1, 1))
    kernels = Kernels((), torch.arange(2), (ConsumerKernel(window, torch.ones(4, 9, 2)),), ())
    criterion = Reconstruction(VoteSettings("share", "cells", 0.1, {}))
    criterion.reset({"layer": kernels})
    numbers = torch.tensor([4, 0, 9])
    masks = torch.rand(3, 2, 5, 5, generator=generator) < 0.5
    # Enough images for patches, with all of their positions.
    vote = criterion.update(feature_batch_of("layer", maps, numbers, kernels, images=20))
    assert vote is not None

    concepts = torch.tensor([[0, 1], [0, UNLABELLED], [1, 1]])

    vote(Regions(ConceptMasks(masks, concepts)))
    accumulator = criterion._samples["layer"].votes._sums
    expected = torch.zeros(19, 19, dtype=torch.float64)
    unit = criterion._samples["layer"].units.double()[:2]  # the same at every tap
    padded = F.pad((maps.double() / unit[:, None, None]).round(), (1, 1, 1, 1))
    for i in range(3):
        for position in _spread(numbers, 5, 5, 25)[i].tolist():
            row, column = position // 5, position % 5
            weight = sum(
                bool(masks[i, r, row, column]) and int(concepts[i, r]) != UNLABELLED
                for r in range(2)
            )
            patch = padded[i, :, row : row + 3, column : column + 3].flatten(1).T.flatten()
            values = torch.cat([patch, torch.ones(1, dtype=torch.float64)])
            expected += WEIGHT_UNITS * weight * values.outer(values)
    assert torch.equal(accumulator, expected)


@pytest.mark.parametrize(
    ("images", "positions", "values"),
    [
        (6000, 16, 18),  # many images: patches, at the fewest positions of each
        (100, 41, 18),  # few: more positions of each
        (14, 293, 18),  # 14 * 16 positions are enough for 18 values
        (13, 316, 2),  # 13 * 16 are not
    ],
)
def test_filters_are_compared_in_patches_where_there_are_positions_enough(
    images: int, positions: int, values: int
) -> None:
    maps = torch.rand(3, 2, 5, 5, generator=torch.Generator().manual_seed(1))
    window = Window((3, 3), border=(1, 1, 1, 1))
    kernels = Kernels((), torch.arange(2), (ConsumerKernel(window, torch.ones(4, 9, 2)),), ())
    criterion = Reconstruction()
    criterion.reset({"layer": kernels})
    criterion.update(feature_batch_of("layer", maps, torch.arange(3), kernels, images=images))
    sample = criterion._samples["layer"]
    assert (sample.positions, len(sample.units)) == (positions, values)
    assert sample.covariance().shape == (values, values)
    assert int(sample.moments._count) == 3 * min(positions, 25)
    assert sorted(criterion.compute("layer").tolist()) == [0, 1]
    assert criterion.mean("layer").tolist() == pytest.approx(
        maps.mean((0, 2, 3)).tolist(), rel=0.5 if positions < 25 else 1e-2
    )


@pytest.mark.parametrize(
    ("is_written", "is_normed", "goes_first"),
    [(True, True, 1), (True, False, 0), (False, True, 0)],
)
def test_behind_a_norm_a_filter_with_a_large_kernel_of_its_own_has_more_votes(
    is_written: bool, is_normed: bool, goes_first: int
) -> None:
    """Filter 1 responds twice as strongly, but its kernel is a fifth as large."""
    generator = torch.Generator().manual_seed(1)
    maps = torch.rand(8, 2, 5, 5, generator=generator) * torch.tensor([1.0, 2.0])[:, None, None]
    writing = torch.tensor([[5.0, -5.0], [1.0, 1.0]])
    kernels = Kernels(
        ((writing, torch.arange(2)),) if is_written else (),
        torch.arange(2),
        (ConsumerKernel(Window((1, 1)), torch.ones(1, 1, 2)),),
        ((torch.ones(2), torch.arange(2)),) if is_normed else (),
    )
    criterion = Reconstruction(VoteSettings("share", "cells", 0.1, {}))
    criterion.reset({"layer": kernels})
    vote = criterion.update(feature_batch_of("layer", maps, torch.arange(8), kernels))
    assert vote is not None
    everywhere = ConceptMasks(torch.ones(8, 1, 5, 5).bool(), torch.zeros(8, 1).long())
    vote(Regions(everywhere))
    assert int(criterion.compute("layer").argmin()) == goes_first


@given(number=st.integers(0, 10**6), rows=st.integers(1, 60), columns=st.integers(1, 60))
def test_positions_lie_on_the_map_and_depend_on_the_image_alone(
    number: int, rows: int, columns: int
) -> None:
    positions = _spread(torch.tensor([7, number]), rows, columns, POSITIONS)
    assert positions.shape == (2, min(POSITIONS, rows * columns))
    assert 0 <= int(positions.min()) <= int(positions.max()) < rows * columns
    assert torch.equal(positions[1:], _spread(torch.tensor([number]), rows, columns, POSITIONS))


# --- baselines ---------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
def test_activation_std_is_that_of_every_position(
    chain: Chain, dependencies: DependencyGraph, group: str
) -> None:
    scores = scores_of("activation_std", chain, dependencies)[group]
    for c, score in enumerate(scores.tolist()):
        values = maps_by_hand(chain)[group][:, c].flatten().tolist()
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        assert score == pytest.approx(variance**0.5, rel=1e-5, abs=1e-7)


def test_activation_std_keeps_its_digits_far_from_zero() -> None:
    """The spread of a filter that responds with 1000 and a little more or less."""
    model = make_network("chain")
    assert isinstance(model, Chain)
    with torch.no_grad():
        model.bn1.bias[0] = 1000.0
    dependencies = build_dependency_graph(model, random_images(2))
    maps = maps_by_hand(model)["conv1"][:, 0].double()
    score = scores_of("activation_std", model, dependencies)["conv1"][0]
    assert float(score) == pytest.approx(float(maps.std(correction=0)), rel=1e-4)


@pytest.mark.parametrize("use_labels", [True, False])
def test_taylor_is_the_squared_change_of_each_image_by_autograd(
    chain: Chain, dependencies: DependencyGraph, use_labels: bool
) -> None:
    scores = scores_of(
        "taylor", chain, dependencies, SETTINGS.model_copy(update={"use_labels": use_labels})
    )
    expected = {group: torch.zeros(len(scores[group]), dtype=torch.float64) for group in GROUPS}
    for i in range(len(IMAGES)):
        first = F.relu(chain.bn1(chain.conv1(IMAGES[i : i + 1])))
        second = F.relu(chain.bn2(chain.conv2(first)))
        logits = chain.linear(second.mean((2, 3)))[0]
        label = int(LABELS[i]) if use_labels else int(logits.argmax())
        loss = logits.exp().sum().log() - logits[label]
        gradients = torch.autograd.grad(loss, (first, second))
        for group, maps, gradient in zip(GROUPS, (first, second), gradients, strict=True):
            for c in range(maps.shape[1]):
                change = float((maps[0, c] * gradient[0, c]).sum().detach())
                expected[group][c] += change**2
    for group in GROUPS:
        assert scores[group].max() > 0
        torch.testing.assert_close(scores[group], expected[group], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("name", "power"), [("l1", 1), ("l2", 2)])
def test_norms_are_those_of_each_kernel(
    chain: Chain, dependencies: DependencyGraph, name: str, power: int
) -> None:
    scores = scores_of(name, chain, dependencies)
    for group, weight in (("conv1", chain.conv1.weight), ("conv2", chain.conv2.weight)):
        for c, score in enumerate(scores[group].tolist()):
            values = [abs(value) for value in weight[c].flatten().tolist()]
            assert score == pytest.approx(sum(v**power for v in values) ** (1 / power), rel=1e-6)


@pytest.mark.parametrize("name", ["l1", "l2"])
def test_norms_of_tied_layers_are_summed(name: str) -> None:
    model = make_network("residual")
    dependencies = build_dependency_graph(model, random_images(2), prune_residual=True)
    scores = scores_of(name, model, dependencies)["stem.0"]
    total = torch.zeros(6, dtype=torch.float64)
    for layer in ("stem", "conv2", "conv4"):
        kernel = model.get_parameter(f"{layer}.0.weight").detach().double().flatten(1)
        total += kernel.abs().sum(1) if name == "l1" else kernel.square().sum(1).sqrt()
    torch.testing.assert_close(scores, total / 3)


@pytest.mark.parametrize("group", GROUPS)
def test_statistics_are_those_of_every_position(
    chain: Chain, dependencies: DependencyGraph, group: str
) -> None:
    maps = maps_by_hand(chain)[group]
    mean = scores_of("activation_mean", chain, dependencies)[group]
    share = scores_of("apoz", chain, dependencies)[group]
    rank = scores_of("hrank", chain, dependencies)[group]
    entropy = scores_of("activation_entropy", chain, dependencies)[group]
    means, _ = thresholds_by_hand(maps)
    for c in range(maps.shape[1]):
        values = maps[:, c].flatten().tolist()
        assert mean[c] == pytest.approx(sum(map(abs, values)) / len(values), rel=1e-5)
        assert share[c] == sum(value > 0 for value in values) / len(values)
        assert rank[c] == sum(int(torch.linalg.matrix_rank(maps[i, c])) for i in range(6))
        places = []
        for i in range(6):
            away = float(maps[i, c].mean()) - means[c]
            steps = round(4 * math.log2(1 + 8 * abs(away) / abs(means[c]))) if away else 0
            places.append(math.copysign(steps, away) if steps else 0)
        bins = [places.count(place) for place in set(places)]
        expected = -sum(n / 6 * math.log(n / 6) for n in bins)
        assert entropy[c] == pytest.approx(expected)


@pytest.mark.parametrize("group", GROUPS)
def test_independence_equals_the_drop_of_the_nuclear_norm(
    chain: Chain, dependencies: DependencyGraph, group: str
) -> None:
    maps = maps_by_hand(chain)[group].double()
    rows = maps.movedim(1, 0).flatten(1)  # at most 64 positions a map: all are taken
    scores = scores_of("chip", chain, dependencies)[group]
    whole = torch.linalg.svdvals(rows).sum()
    for c in range(len(rows)):
        without = rows.clone()
        without[c] = 0
        lost = (whole - torch.linalg.svdvals(without).sum()) / rows.shape[1] ** 0.5
        assert float(scores[c]) == pytest.approx(float(lost), rel=1e-4, abs=1e-5)


def independence_of(maps: Tensor) -> ChannelIndependence:
    """After one batch of maps."""
    filters = maps.shape[1]
    kernels = Kernels((), torch.arange(filters), (), ())
    criterion = ChannelIndependence()
    criterion.reset({"layer": kernels})
    criterion.update(feature_batch_of("layer", maps, torch.arange(len(maps)), kernels))
    return criterion


def shares_of_positions(criterion: ChannelIndependence) -> Tensor:
    """Mean square of each filter over the positions that were looked at."""
    return criterion._moments["layer"].raw(criterion._units["layer"]).diagonal()


@pytest.mark.parametrize("side", [14, 28, 32, 56, 112])
def test_independence_covers_many_columns(side: int) -> None:
    """Each filter is 1 in one column: at least half of the columns are met, none too often."""
    maps = torch.eye(side)[None, :, None].expand(1, side, side, side)
    share = shares_of_positions(independence_of(maps))
    assert (share > 0).double().mean() > 0.5
    assert share.max() < 0.1


def test_independence_samples_large_maps_evenly() -> None:
    """A map whose rows and columns are as often 1 as 0 keeps its mean."""
    side = 32
    stripes = (torch.arange(side) % 2).float()
    maps = torch.stack([stripes.expand(side, side), stripes[:, None].expand(side, side)])[None]
    share = shares_of_positions(independence_of(maps))
    assert side * side > dependence.POSITIONS
    assert 0.4 < float(share[0]) < 0.6
    assert 0.4 < float(share[1]) < 0.6


@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 7), rank=st.integers(1, 7), seed=st.integers(0, 2**31))
def test_nuclear_norms_with_repeated_and_missing_eigenvalues(
    size: int, rank: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, rank, generator=generator, dtype=torch.float64).round()
    losses = nuclear_norm_losses(rows @ rows.T)
    for row in range(size):
        without = rows.clone()
        without[row] = 0
        lost = torch.linalg.svdvals(rows).sum() - torch.linalg.svdvals(without).sum()
        assert float(losses[row]) == pytest.approx(float(lost), abs=1e-10)


def test_nuclear_norms_of_a_wide_layer_take_no_time() -> None:
    """Bisection of the secular equation takes half a minute here, and hours at 2,048 filters."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(256, 400, generator=generator, dtype=torch.float64).relu()
    losses = nuclear_norm_losses(rows @ rows.T)
    whole = torch.linalg.svdvals(rows).sum()
    for row in (0, 100, 255):
        without = rows.clone()
        without[row] = 0
        lost = float(whole - torch.linalg.svdvals(without).sum())
        assert float(losses[row]) == pytest.approx(lost, rel=1e-9)


def test_distances_are_those_to_every_other_kernel(
    chain: Chain, dependencies: DependencyGraph
) -> None:
    scores = scores_of("fpgm", chain, dependencies)
    for group, weight in (("conv1", chain.conv1.weight), ("conv2", chain.conv2.weight)):
        rows = weight.detach().double().flatten(1)
        for c in range(len(rows)):
            total = sum(float((rows[c] - other).square().sum().sqrt()) for other in rows)
            assert float(scores[group][c]) == pytest.approx(total, rel=1e-9)


def test_scales_are_those_of_the_batch_norm(chain: Chain, dependencies: DependencyGraph) -> None:
    scores = scores_of("bn_scale", chain, dependencies)
    assert torch.equal(scores["conv1"], chain.bn1.weight.detach().double().abs())
    assert torch.equal(scores["conv2"], chain.bn2.weight.detach().double().abs())


def test_without_a_batch_norm_there_is_no_scale() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(80, 5)
    ).eval()
    dependencies = build_dependency_graph(model, random_images(2))
    with pytest.raises(UsageError, match="'0' has no batch norm"):
        scores_of("bn_scale", model, dependencies)


def test_filters_without_a_batch_norm_or_a_kernel_are_not_guessed() -> None:
    regions = (torch.ones(2, 3), torch.tensor([0, 3]))
    scales = (torch.ones(2), torch.tensor([0, 3]))
    for criterion, what in (
        (make("bn_scale", SETTINGS, 0, {}), "batch norm whose scale could rank"),
        (KernelFunction(l2), "kernel that produces"),
    ):
        criterion.reset({"a": Kernels((regions,), torch.arange(4), (), (scales,))})
        with pytest.raises(UsageError, match=f"'a' has no {what} 2 of its 4 filters"):
            criterion.compute("a")
        criterion.reset({"a": Kernels((), torch.arange(5), (), ())})
        with pytest.raises(UsageError, match=f"'a' has no {what} 5 of its 5 filters"):
            criterion.compute("a")


def shown(maps: Tensor, statistics: ActivationStatistics | None = None) -> FeatureBatch:
    kernels = Kernels((), torch.arange(maps.shape[1]), (), ())
    return FeatureBatch("a", maps, torch.arange(len(maps)), kernels, statistics, (1, 1), None)


def score_of(
    criterion: Criterion, maps: Tensor, statistics: ActivationStatistics | None = None
) -> Tensor:
    criterion.reset({"a": Kernels((), torch.arange(maps.shape[1]), (), ())})
    for part in maps.split(3):
        criterion.update(shown(part, statistics))
    return criterion.compute("a")


@settings(deadline=None, max_examples=30)
@given(
    images=st.integers(1, 7),
    side=st.integers(1, 5),
    offset=st.sampled_from([0.0, 1.0, -1000.0, 1000.1]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    seed=st.integers(0, 2**31),
)
def test_spread_and_share_are_those_of_all_values(
    images: int,
    side: int,
    offset: float,
    dtype: torch.dtype,
    layout: torch.memory_format,
    seed: int,
) -> None:
    maps = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(seed))
    maps[:, 2] = 0.0
    maps = (maps + offset).to(dtype).contiguous(memory_format=layout)
    values = maps.double().movedim(1, 0).flatten(1)
    spread = score_of(ActivationStd(), maps)
    torch.testing.assert_close(spread, values.std(1, correction=0), rtol=1e-5, atol=1e-7)
    assert spread[2] == 0
    assert torch.equal(score_of(Apoz(), maps), (values > 0).double().mean(1))


def test_entropy_ranks_filters_of_either_sign_by_how_much_they_vary() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(500, generator=generator)
    pooled = torch.stack([noise, noise + 0.5, 1 + 0.1 * noise, 1 + 0.001 * noise, 0 * noise], 1)
    mean = pooled.mean(0)
    scores = score_of(
        ActivationEntropy(), pooled[:, :, None, None], ActivationStatistics(mean, mean, mean, 1)
    )
    assert scores[0] > 2.5
    assert scores[1] > 2.5
    assert scores[2] < scores[1]
    assert scores[3] == 0
    assert scores[4] == 0


def random_scores(seed: int, part: str, filters: int = 50) -> Tensor:
    criterion = make("random", SETTINGS, seed, {})
    criterion.reset({part: Kernels((), torch.arange(filters), (), ())})
    return criterion.compute(part)


def test_random_scores_depend_on_seed_and_group_alone() -> None:
    assert torch.equal(random_scores(1, "a"), random_scores(1, "a"))
    assert not torch.equal(random_scores(1, "a"), random_scores(2, "a"))
    assert not torch.equal(random_scores(1, "a"), random_scores(1, "b"))
    assert len(set(random_scores(1, "a").tolist())) == 50
    assert 0 <= random_scores(1, "a").min() < 0.2 < 0.8 < random_scores(1, "a").max() < 1


def test_random_scores_leave_torch_its_own_randomness(seed: int) -> None:
    random_scores(3, "a")
    drawn = torch.rand(3)
    torch.manual_seed(seed)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("vote-respons", "did you mean vote-response"),
        ("tailor", "did you mean taylor"),
        ("xyzzy", "known: activation_entropy, activation_mean, activation_std, apoz, bn_scale, "),
    ],
)
def test_an_unknown_criterion_names_the_near_match(asked: str, hint: str) -> None:
    with pytest.raises(UnknownName, match=f"unknown criterion '{asked}': {hint}"):
        make(asked, SETTINGS, 0, {})


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_scores_every_filter_and_leaves_the_network_alone(name: str) -> None:
    model = make_network("chain").train()
    model.get_submodule("bn2").eval()
    model.get_parameter("conv2.bias").requires_grad_(False)
    dependencies = build_dependency_graph(model, random_images(2))
    modes = [module.training for module in model.modules()]
    requires = [parameter.requires_grad for parameter in model.parameters()]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    scores = scores_of(name, model, dependencies)

    assert scores.keys() == dependencies.groups.keys()
    for group, score in scores.items():
        assert score.dtype == torch.float64
        assert score.shape == (len(dependencies.groups[group]),)
        assert torch.isfinite(score).all()
        assert not score.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == requires
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_says_what_it_needs(name: str) -> None:
    criterion: Criterion = make(name, SETTINGS, 0, {})
    needs: dict[str, set[Need]] = {"taylor": {"maps", "gradients"}}
    needs |= {name: set() for name in ("random", "l1", "l2", "fpgm", "bn_scale")}
    needs |= {
        name: {"maps", "statistics"} for name in ("activation_entropy", "chip", "reconstruction")
    }
    needs |= {name: {"maps", "statistics", "concepts"} for name in ("vote", "vote-response")}
    needs["vote-iou"] = {"maps", "thresholds", "concepts"}
    assert criterion.needs == needs.get(name, {"maps"})


def dead_filter(model: Chain) -> None:
    """Filter 2 of `conv1` is zero everywhere."""
    with torch.no_grad():
        model.bn1.weight[2] = 0.0
        model.bn1.bias[2] = -1.0


def unread_filter(model: Chain) -> None:
    """Nothing listens to filter 2 of `conv1`."""
    with torch.no_grad():
        model.conv2.weight[:, 2] = 0.0


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("vote-response", dead_filter),
        ("vote-response", unread_filter),
        ("vote-iou", dead_filter),
        ("vote", dead_filter),
        ("vote", unread_filter),
        ("reconstruction", dead_filter),
        ("activation_mean", dead_filter),
        ("apoz", dead_filter),
        ("hrank", dead_filter),
        ("chip", dead_filter),
        ("taylor", dead_filter),
        ("taylor", unread_filter),
        ("activation_std", dead_filter),
    ],
)
def test_a_filter_that_does_nothing_scores_nothing(
    name: str, harm: Callable[[Chain], None]
) -> None:
    model = make_network("chain")
    assert isinstance(model, Chain)
    harm(model)
    scores = scores_of(name, model, build_dependency_graph(model, random_images(2)))["conv1"]
    assert float(scores[2]) == pytest.approx(0, abs=1e-9)
    assert scores.max() > 0


@pytest.mark.parametrize("name", [n for n in CRITERIA if make(n, SETTINGS, 0, {}).needs])
def test_nan_is_an_error(name: str) -> None:
    model = make_network("chain")
    assert isinstance(model, Chain)
    with torch.no_grad():
        model.conv1.weight[2, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        scores_of(name, model, build_dependency_graph(model, random_images(2)))
