"""Dissection: the best concept of each filter."""

from __future__ import annotations

import torch

from secateur.criteria import Kernels, Sight
from secateur.dissection import Dissection, FilterConcept
from secateur.thresholds import Usual


def sight(maps: torch.Tensor, masks: torch.Tensor, concepts: torch.Tensor) -> Sight:
    filters = maps.shape[1]
    zeros = torch.zeros(filters)
    return Sight(
        group="layer",
        maps=maps,
        kernels=Kernels((), torch.arange(filters), zeros),
        usual=Usual(zeros, zeros + 0.5),
        masks=masks,
        concepts=concepts,
        gradients=None,
    )


def test_filters_are_told_by_what_they_lie_on() -> None:
    top = torch.zeros(4, 4, dtype=torch.bool)
    top[:2] = True
    # Filter 0 lies on the first concept, filter 1 on the second, filter 2 nowhere.
    maps = torch.stack([top.float(), (~top).float(), torch.zeros(4, 4)])[None]
    dissection = Dissection(("sky", "road"))
    dissection.observe(sight(maps, torch.stack([top, ~top])[None], torch.tensor([[0, 1]])))
    assert dissection.best("layer") == [
        FilterConcept("sky", 1.0),
        FilterConcept("road", 1.0),
        FilterConcept("sky", 0.0),
    ]
    assert [seen.is_detector for seen in dissection.best("layer")] == [True, True, False]


def test_batches_add_up(generator: torch.Generator) -> None:
    maps = torch.rand(6, 3, 4, 4, generator=generator)
    masks = torch.rand(6, 2, 4, 4, generator=generator) < 0.4
    concepts = torch.randint(0, 3, (6, 2), generator=generator)
    whole, parts = Dissection(("a", "b", "c")), Dissection(("a", "b", "c"))
    whole.observe(sight(maps, masks, concepts))
    for part in (slice(4, 6), slice(0, 1), slice(1, 4)):
        parts.observe(sight(maps[part], masks[part], concepts[part]))
    assert whole.best("layer") == parts.best("layer")
