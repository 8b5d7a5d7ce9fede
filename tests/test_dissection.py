"""Dissection: the best concept of each filter, and the images it responds to most."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from networks import make_network, random_images
from secateur.data.concept_masks import ConceptMasks, at_resolution
from secateur.graph.build import build_dependency_graph
from secateur.graph.module_state import tensors_of
from secateur.graph.taps import Kernels, kernels_of
from secateur.runtime import distributed
from secateur.scoring.criteria import FeatureBatch, Regions
from secateur.scoring.dissection import DETECTOR_IOU, Dissection, FilterConcept, TopImages
from secateur.scoring.thresholds import ActivationStatistics


def kernels(filters: int) -> Kernels:
    return Kernels((), torch.arange(filters), (), ())


def features(maps: Tensor, numbers: Tensor | None = None) -> FeatureBatch:
    filters = maps.shape[1]
    zeros = torch.zeros(filters)
    return FeatureBatch(
        tap="layer",
        maps=maps,
        indices=torch.arange(len(maps)) if numbers is None else numbers,
        kernels=kernels(filters),
        statistics=ActivationStatistics(zeros, zeros + 0.5, zeros + 1, 1),
        grid=(maps.shape[2], maps.shape[3]),
        gradients=None,
    )


def regions(masks: Tensor, concepts: Tensor) -> Regions:
    return Regions(ConceptMasks(masks, concepts))


def dissected(names: tuple[str, ...], *concept_inputs: tuple[Tensor, Tensor, Tensor]) -> Dissection:
    """What is found in batches of maps, masks and concepts."""
    dissection = Dissection(names)
    dissection.reset({"layer": kernels(concept_inputs[0][0].shape[1])})
    for maps, masks, concepts in concept_inputs:
        dissection.update(features(maps))(regions(masks, concepts))
    return dissection


def test_filters_are_identified_by_the_concepts_they_lie_on() -> None:
    top = torch.zeros(4, 4, dtype=torch.bool)
    top[:2] = True
    # Filter 0 lies on the first concept, filter 1 on the second, filter 2 nowhere.
    maps = torch.stack([top.float(), (~top).float(), torch.zeros(4, 4)])[None]
    masks = torch.stack([top, ~top])[None]
    dissection = dissected(("sky", "road"), (maps, masks, torch.tensor([[0, 1]])))
    assert dissection.best(dissection.iou("layer")) == [
        FilterConcept("sky", 1.0),
        FilterConcept("road", 1.0),
        FilterConcept("sky", 0.0),
    ]
    assert [seen.is_detector for seen in dissection.best(dissection.iou("layer"))] == [
        True,
        True,
        False,
    ]
    assert dissection.iou("layer").tolist() == [[1, 0], [0, 1], [0, 0]]
    assert dissection.thresholds["layer"].tolist() == [0.5, 0.5, 0.5]


def test_a_detector_is_above_the_bound_not_at_it() -> None:
    assert not FilterConcept("sky", DETECTOR_IOU).is_detector
    assert FilterConcept("sky", DETECTOR_IOU + 1e-9).is_detector


def test_batches_are_summed(generator: torch.Generator) -> None:
    maps = torch.rand(6, 3, 4, 4, generator=generator)
    masks = torch.rand(6, 2, 4, 4, generator=generator) < 0.4
    concepts = torch.randint(0, 3, (6, 2), generator=generator)
    names = ("a", "b", "c")
    whole = dissected(names, (maps, masks, concepts))
    chunks = (slice(4, 6), slice(0, 1), slice(1, 4))
    parts = dissected(names, *((maps[part], masks[part], concepts[part]) for part in chunks))
    assert whole.best(whole.iou("layer")) == parts.best(parts.iou("layer"))
    for one, other in zip(whole.state(), parts.state(), strict=True):
        assert one.dtype == torch.int64
        assert torch.equal(one, other)


def test_masks_are_brought_to_the_maps() -> None:
    """Masks come at the resolution of the image and are compared at that of the maps."""
    fine = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    fine[..., :4, :] = True
    coarse = at_resolution(fine, (2, 2))
    dissection = dissected(("sky",), (coarse.float(), fine, torch.tensor([[0]])))
    assert dissection.best(dissection.iou("layer")) == [FilterConcept("sky", 1.0)]


def test_a_channel_is_described_by_the_best_of_its_filters() -> None:
    model = make_network("grouped")
    dependencies = build_dependency_graph(model, random_images(2))
    group = dependencies.groups["stem.0"]
    parts = kernels_of(dependencies, tensors_of(model))
    assert parts["stem.0"].channel.tolist() == [0, 1, 2, 0, 1, 2]
    dissection = Dissection(("sky", "road"))
    dissection.reset(parts)
    masks = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    masks[:, 0, 0], masks[:, 1, 1] = True, True
    maps = torch.zeros(1, 6, 2, 2)
    maps[:, :2, 0, 0] = 1.0  # half of the first concept
    maps[:, 4, 1] = 1.0  # the second concept, whole; filters 2 and 5 see nothing
    seen = replace(features(maps), tap="stem.0", kernels=parts["stem.0"])
    dissection.update(seen)(regions(masks, torch.tensor([[0, 1]])))
    assert dissection.best(dissection.iou_by_channel(group)) == [
        FilterConcept("sky", 0.5),
        FilterConcept("road", 1.0),
        FilterConcept("sky", 0.0),
    ]


# Top images


def maps_with(largest: Tensor) -> Tensor:
    """`[image, filter, 2, 2]` maps whose largest activations are `[image, filter]`."""
    maps = largest[:, :, None, None] - torch.arange(4.0).reshape(2, 2)
    return maps.flip(3)


def top_of(count: int, *batches: tuple[Tensor, Tensor]) -> TopImages:
    """What is found in batches of largest activations and numbers."""
    top = TopImages(count)
    top.reset({"layer": kernels(batches[0][0].shape[1])})
    for largest, numbers in batches:
        top.update(features(maps_with(largest), numbers))
    return top


def best_by_sorting(largest: Tensor, numbers: Tensor, count: int) -> list[list[int]]:
    """A slow reference: by activation, the largest first, then by number."""
    return [
        [n for _, n in sorted(zip((-values).tolist(), numbers.tolist(), strict=True))][:count]
        for values in largest.T
    ]


@pytest.mark.parametrize("count", [1, 3, 20])
def test_top_images_are_those_of_a_sort(count: int, generator: torch.Generator) -> None:
    largest = torch.randint(-3, 4, (12, 5), generator=generator).float()  # with many ties
    numbers = torch.randperm(40, generator=generator)[:12]
    top = top_of(count, (largest, numbers)).top("layer").indices
    assert top.tolist() == best_by_sorting(largest, numbers, count)
    assert top.shape == (5, min(count, 12))


def test_between_equal_activations_the_smaller_number_is_kept() -> None:
    ones = torch.ones(4, 1)
    top = top_of(2, (ones, torch.tensor([7, 3, 9, 5]))).top("layer").indices
    assert top.tolist() == [[3, 5]]
    later = top_of(2, (ones[:2], torch.tensor([7, 9])), (ones[:2], torch.tensor([3, 5])))
    assert later.top("layer").indices.tolist() == [[3, 5]]


@pytest.mark.parametrize("sizes", [(12,), (1,) * 12, (5, 7), (2, 9, 1)])
def test_top_images_do_not_depend_on_batches_or_their_order(
    sizes: tuple[int, ...], generator: torch.Generator
) -> None:
    largest = torch.randint(0, 4, (12, 5), generator=generator).float()
    numbers = torch.arange(12)
    expected = top_of(4, (largest, numbers)).top("layer").indices
    order = torch.randperm(12, generator=generator)
    parts = [(largest[chunk], numbers[chunk]) for chunk in order.split(list(sizes))]
    assert torch.equal(top_of(4, *parts).top("layer").indices, expected)


def gathers(others: list[TopImages]) -> Callable[[object], list[object]]:
    """Return a fake `all_gather` over several processes."""
    return lambda local: [local, *(other._top for other in others)]


def test_merging_keeps_the_best_of_all_processes(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = torch.randint(0, 4, (12, 5), generator=generator).float()
    numbers = torch.arange(12)
    expected = top_of(4, (largest, numbers)).top("layer").indices
    for order in itertools.permutations(range(3)):
        local, *others = (top_of(4, (largest[i::3], numbers[i::3])) for i in order)
        monkeypatch.setattr(distributed, "all_gather", gathers(others))
        local.merge()
        assert torch.equal(local.top("layer").indices, expected)


def test_where_a_filter_is_active_comes_along(generator: torch.Generator) -> None:
    largest, numbers = torch.rand(12, 5, generator=generator), torch.arange(12)
    maps = maps_with(largest)
    for parts in ([12], [5, 7]):
        chunks = zip(largest.split(parts), numbers.split(parts), strict=True)
        top = top_of(3, *chunks).top("layer")
        for filter_, images in enumerate(top.indices.tolist()):
            assert torch.equal(top.regions[filter_], maps[images, filter_] > 0.5)
            assert top.values[filter_].tolist() == largest[images, filter_].tolist()


def test_merging_alone_changes_nothing(generator: torch.Generator) -> None:
    top = top_of(4, (torch.rand(6, 3, generator=generator), torch.arange(6)))
    before = top.top("layer").indices
    top.merge()
    assert torch.equal(top.top("layer").indices, before)
    assert list(top.state()) == []
