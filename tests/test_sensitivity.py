from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from networks import wired
from secateur.config import ScoreSection
from secateur.data import Batch
from secateur.graph.build import build_dependency_graph
from secateur.graph.dependency import DependencyGraph
from secateur.graph.input_edit import ChannelReconstruction, InputEdit
from secateur.graph.interpreter import GraphInterpreter
from secateur.graph.module_state import tensors_of
from secateur.models.divergence import TEMPERATURE, output_error
from secateur.pruning import sensitivity
from secateur.pruning.ranking import Ranking, rank
from secateur.pruning.sensitivity import is_read_apart, measure_sensitivity
from secateur.scoring import criteria
from secateur.scoring.criteria.reconstruction import (
    Reconstruction,
    group_error_curve,
    reconstruct_channels,
)
from secateur.scoring.scores import score_filters

SETTINGS = ScoreSection()
IMAGES = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def batches(size: int = 32) -> Iterable[Batch]:
    for start in range(0, len(IMAGES), size):
        images = IMAGES[start : start + size]
        numbers = torch.arange(start, start + len(images))
        yield Batch(images, torch.zeros(len(images), dtype=torch.int64), numbers)


def moments_and_ranking(name: str) -> tuple[nn.Module, DependencyGraph, Reconstruction, Ranking]:
    model, dependencies = wired(name, True)
    moments = Reconstruction()
    criterion = criteria.make("l2", SETTINGS, 0, {})
    filter_scores = score_filters(
        model, dependencies, batches, {"l2": criterion}, None, SETTINGS, observers=(moments,)
    )["l2"]
    return model, dependencies, moments, rank(filter_scores.scores, dependencies, "l2")


NAMES = ["chain", "residual", "concat", "depthwise", "flattened", "gated", "grouped"]


@pytest.mark.parametrize("name", NAMES)
def test_sensitivity_grows_with_the_number_of_removed_channels(name: str) -> None:
    model, dependencies, moments, ranking = moments_and_ranking(name)
    measured = measure_sensitivity(tensors_of(model), dependencies, moments, ranking, batches())
    assert measured.keys() == dependencies.groups.keys()
    for group, curve in measured.items():
        assert len(curve) == len(dependencies.groups[group]) + 1
        assert curve[0] == 0
        assert all(one <= other + 1e-12 for one, other in itertools.pairwise(curve))
    assert any(curve[-1] > 0 for curve in measured.values())


def test_batches_do_not_change_the_error_gains() -> None:
    model, dependencies, moments, ranking = moments_and_ranking("residual")
    state = tensors_of(model)
    few_batches = measure_sensitivity(state, dependencies, moments, ranking, batches(96))
    many_batches = measure_sensitivity(state, dependencies, moments, ranking, batches(11))
    for name, curve in few_batches.items():
        assert curve[-1] > 0
        assert many_batches[name] == pytest.approx(curve, rel=1e-3)


def test_the_error_curve_is_the_consumers_squared_error(generator: torch.Generator) -> None:
    """Least squares of the images that are fitted to, and the error on those that are not."""
    model, dependencies, moments, ranking = moments_and_ranking("chain")
    group = dependencies.groups["conv2"]  # read by the linear layer, after pooling
    curve = group_error_curve(group, moments, ranking.order["conv2"])
    assert isinstance(model, nn.Module)
    kernel = tensors_of(model)["linear.weight"].double()
    sample = moments._samples["conv2"]
    fitted = sample.moments.without(sample.held_out)
    covariance = fitted.covariance(sample.units)
    others = sample.held_out.about(fitted.mean(sample.units), sample.units)
    for removed in (1, 3, 6):
        kept = ranking.order["conv2"][:-removed]
        missed = torch.eye(len(covariance), dtype=torch.float64)
        missed[:, kept] -= covariance[:, kept] @ torch.linalg.pinv(covariance[kept][:, kept])
        error = float((kernel @ (missed @ others @ missed.T) * kernel).sum())
        assert float(curve[removed]) == pytest.approx(error, rel=0.05, abs=1e-3 * float(curve[-1]))


def test_a_copy_of_a_channel_reconstructs_it() -> None:
    model, dependencies = wired("chain", True)
    state = tensors_of(model)
    for name in ("conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"):
        state[name][4] = state[name][2]
    moments = Reconstruction()
    score_filters(model, dependencies, batches, {"reconstruction": moments}, None, SETTINGS)
    kept = [0, 1, 2, 3, 5]
    estimate = reconstruct_channels(dependencies.groups["conv1"], moments, kept)
    assert float((estimate.matrix[4] - estimate.matrix[2]).abs().max()) < 0.05
    assert torch.equal(estimate.matrix[kept], torch.eye(6)[kept])
    assert float(estimate.offset[kept].abs().max()) < 1e-6


def test_divergence_of_logits_and_of_maps() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]])
    assert output_error([logits], [logits]) == 0
    other = logits + torch.tensor([[0.3, 0.0, 0.0], [0.0, 1.0, 0.0]])
    p, q = ((values.double() / TEMPERATURE).softmax(1) for values in (logits, other))
    expected = TEMPERATURE**2 * float((p * (p / q).log()).sum() / 2)
    assert output_error([logits], [other]) == pytest.approx(expected)
    maps: Tensor = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert output_error([maps], [maps + 2]) == pytest.approx(4 / float(maps.double().var()))


def test_channels_with_uneven_copies_are_reconstructed() -> None:
    """A consumer may read one channel once and another twice."""
    edit = InputEdit.__new__(InputEdit)
    edit._dim, edit._copies = 1, 0
    edit._channels = np.arange(2)
    edit._counts = torch.tensor([1, 2])
    edit._number = torch.tensor([0, 1, 1])
    edit._table = torch.tensor([0, 1, 3])  # the third place belongs to another group
    value = torch.tensor([[1.0, 2.0, 9.0, 4.0]])
    first_stays = ChannelReconstruction(
        torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([0.0, 0.5])
    )
    assert edit._reconstructed(value, first_stays).tolist() == [[1.0, 2.5, 9.0, 2.5]]
    other_stays = ChannelReconstruction(
        torch.tensor([[0.0, 2.0], [0.0, 1.0]]), torch.tensor([0.5, 0.0])
    )
    assert edit._reconstructed(value, other_stays).tolist() == [[6.5, 2.0, 9.0, 4.0]]


class ReadApart(nn.Module):
    """Channels of a stem that two consumers read, each behind its own depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.one, self.other = nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        stem = self.stem(images).relu()
        one, other = self.one(self.first(stem).relu()), self.other(self.second(stem).relu())
        return torch.mean(one + other, dim=(2, 3))


def test_channels_that_are_read_apart_are_measured_at_the_output() -> None:
    torch.manual_seed(0)
    model = ReadApart().eval()
    dependencies = build_dependency_graph(model, IMAGES[:2])
    group = dependencies.groups["stem"]
    assert is_read_apart(group)
    assert not any(map(is_read_apart, wired("chain", True)[1].groups.values()))
    moments = Reconstruction()
    scores = score_filters(model, dependencies, batches, {"r": moments}, None, SETTINGS)["r"]
    ranking = rank(scores.scores, dependencies, "r")
    state = tensors_of(model)
    measured = measure_sensitivity(state, dependencies, moments, ranking, batches(96))["stem"]
    # The gain turns the curve into what the output loses, on average over the counts removed.
    curve = group_error_curve(group, moments, ranking.order["stem"])
    logs = []
    with torch.inference_mode():
        for turn, removed in enumerate((1, 2, 4, 6)):  # every fourth image has one of them
            images = IMAGES[turn::4]
            expected = model(images)
            kept = ranking.order["stem"][:-removed]
            snapshot = reconstruct_channels(group, moments, kept)
            interpreter = GraphInterpreter(dependencies.graph, state, images)
            edits = [InputEdit(dependencies, consumer, group) for consumer in group.consumers]
            overrides = {edit.node: edit.reconstructed_inputs(snapshot) for edit in edits}
            (output,) = interpreter.finish(overrides=overrides)
            logs.append(math.log(output_error([expected], [output]) / float(curve[removed])))
    gain = math.exp(sum(logs) / len(logs))
    assert measured == pytest.approx((gain * curve).tolist(), rel=1e-3)


@pytest.mark.parametrize(("images", "turns"), [(1, 4), (3, 4), (4, 4), (8, 2), (16, 1), (50, 1)])
def test_every_snapshot_is_measured_however_few_images_there_are(images: int, turns: int) -> None:
    sample = torch.arange(float(images)).reshape(-1, 1, 1, 1)
    snapshots = [
        (int(image), number)
        for number, part in sensitivity._by_snapshot(sample)
        for image in part.flatten()
    ]
    assert sorted(snapshots) == sorted(
        (image, (image + more) % 4) for image in range(images) for more in range(turns)
    )
