"""The outputs of a dense network: where it sees which class, an object or a key point.

- Segmentation: the positions that the network gives each class.
- Detection: the positions where a class's probability reaches `CONFIDENT`, over all levels of the
  pyramid. If one channel is the probability of any object, as YOLOX's, those of the classes are
  multiplied by it. The strongest quarter of the map of objects is one more concept, which every
  image shows.
- Heat maps and other values: the strongest quarter of each channel's map.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secateur.data.concept_masks import UNLABELLED, Concept, ConceptMasks
from secateur.graph.network_graph import NetworkGraph
from secateur.graph.output_values import OutputPart, Transform, floating_leaves
from secateur.graph.taps import as_maps
from secateur.models.task import Task
from secateur.runtime.errors import UsageError
from secateur.scoring.concepts import ConceptInput, ConceptSource, SourceContext
from secateur.scoring.concepts.evidence import strongest_quarter

CONFIDENT = 0.25
"""Probability from which a detector is said to see a class: from there YOLO's detectors draw their
boxes."""
OF_ANY: tuple[Transform, ...] = ("sigmoid", "probabilities")
"""Transforms of maps that say at each position whether there is an object."""
FINEST_STRIDES = (4, 8, 16, 32)
MOST_LEVELS = 5
Sides = tuple[int, ...]
Maps = Float[Tensor, "image _ _ _"]


class Outputs(ConceptSource):
    """The maps that a network returns, as regions of concepts; labels are not used."""

    def __init__(self, context: SourceContext) -> None:
        self._task = context.task
        self._groups: tuple[_Group, ...] = ()
        if context.task.kind == "segmentation":
            count = context.task.concept_count(context.graph.outputs[0])
            names = _names(count, context.class_names, "class")
            self._concepts = tuple(Concept(name, "class map") for name in names)
            return
        self._groups = _groups(context.task, context.graph)
        if not self._groups:
            raise UsageError(
                "concepts = 'outputs' needs a network that returns maps of classes, objects or "
                "other values: take saliency"
            )
        self._concepts = tuple(_concepts(self._groups, context.class_names))

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """One concept for each class or channel, named if the data names it, and the objects."""
        return self._concepts

    def find(self, concept_input: ConceptInput) -> ConceptMasks:
        """Return the regions that each image shows, at the resolution of the finest map."""
        if self._task.kind == "segmentation":
            leaves = concept_input.outputs
            maps = self._task.read_maps(leaves[0] if len(leaves) == 1 else leaves)
            return _class_regions(as_maps(maps.detach().argmax(1, keepdim=True))[:, 0])
        leaves = tuple(floating_leaves(concept_input.outputs, len(concept_input.images)))
        masks = list(_regions(self._groups, leaves))
        size = max((mask.shape[2:] for mask in masks), key=math.prod)
        return _shown(torch.cat([_resized(mask.float(), size) > 0 for mask in masks], dim=1))


@dataclass(frozen=True)
class _Map:
    """One map of an output: a part of it, whose positions may be those of several levels."""

    part: OutputPart
    levels: tuple[Sides, ...]
    """Sides of each level; none if the part has the sides already."""

    def read(self, leaves: Sequence[Tensor]) -> list[Maps]:
        """Return the map of each level, as probabilities where the part has any."""
        values = self.part.select(leaves).movedim(self.part.dim, 1).detach().float()
        if not self.levels:
            return [as_maps(values)]
        parts = values.split([math.prod(sides) for sides in self.levels], dim=2)
        return [
            as_maps(part.reshape(*part.shape[:2], *sides))
            for part, sides in zip(parts, self.levels, strict=True)
        ]


@dataclass(frozen=True)
class _Group:
    """Maps with the same concepts: the levels of a pyramid."""

    transform: Transform
    channels: int
    maps: tuple[_Map, ...]

    def read(self, leaves: Sequence[Tensor]) -> Maps:
        """Return the largest value at each position of the finest level."""
        levels = [level for one in self.maps for level in one.read(leaves)]
        size = max((level.shape[2:] for level in levels), key=math.prod)
        return torch.stack([_resized(level, size) for level in levels]).amax(0)


def has_maps(task: Task, graph: NetworkGraph) -> bool:
    """Return whether a network returns maps of classes or objects."""
    if task.kind == "segmentation":
        return True
    return any(group.transform != "values" for group in _groups(task, graph))


def _groups(task: Task, graph: NetworkGraph) -> tuple[_Group, ...]:
    """Return the maps among the parts of an output that are compared, without those of boxes."""
    shapes = [
        tuple(int(side) for side in node.meta["val"].shape)
        for node in graph.outputs
        if node.meta["val"].is_floating_point() and node.meta["val"].shape[:1] == (graph.images,)
    ]
    sides = tuple(int(side) for side in graph.image.meta["val"].shape[2:])
    groups: dict[tuple[Transform, int, int], list[_Map]] = {}
    for part in task.parts:
        shape = shapes[part.leaf]
        if part.dim >= len(shape):
            continue
        stop = shape[part.dim] if part.stop is None else part.stop
        others = tuple(side for dim, side in enumerate(shape) if dim not in (0, part.dim))
        levels = _levels(others, sides)
        is_alone = part.transform == "softmax" and stop - part.start == 1
        if levels is not None and not is_alone:
            key = (part.transform, part.start, stop - part.start)
            groups.setdefault(key, []).append(_Map(part, levels))
    made = [_Group(key[0], key[2], tuple(maps)) for key, maps in groups.items()]
    probable = [group for group in made if group.transform != "values"]
    return tuple(probable or made)


def _levels(positions: Sides, sides: Sides) -> tuple[Sides, ...] | None:
    """Return the sides of the levels that the positions of an output are of; None if unknown.

    None are needed where the output has them itself. Otherwise strides double from level to level,
    and each level's positions follow those of the finer one, row by row.
    """
    if math.prod(positions) <= 1:
        return None
    if len(positions) == len(sides):
        return ()
    if len(positions) != 1:
        return None
    for finest in FINEST_STRIDES:
        levels: list[Sides] = []
        for level in range(MOST_LEVELS):
            levels.append(tuple(-(-side // (finest << level)) for side in sides))
            if sum(map(math.prod, levels)) == positions[0]:
                return tuple(levels)
    return None


def _concepts(groups: Sequence[_Group], class_names: tuple[str, ...]) -> Iterator[Concept]:
    for group in groups:
        if group.transform == "values":
            yield from (Concept(name, "output") for name in _names(group.channels, (), "output"))
        elif group.channels > 1:
            names = class_names if len(class_names) == group.channels else ()
            yield from (
                Concept(name, "class map") for name in _names(group.channels, names, "class")
            )
    if any(group.transform in OF_ANY for group in groups):
        yield Concept("any object", "objectness")


def _names(count: int, names: tuple[str, ...], kind: str) -> tuple[str, ...]:
    return (*names[:count], *(f"{kind} {number}" for number in range(len(names), count)))


def _regions(
    groups: Sequence[_Group], leaves: Sequence[Tensor]
) -> Iterator[Bool[Tensor, "image concept h w"]]:
    """Yield the regions of each group's concepts, in the order of `_concepts`."""
    objects: list[Maps] = []
    objectness = next((g for g in groups if g.transform in OF_ANY and g.channels == 1), None)
    for group in groups:
        maps = group.read(leaves)
        if group.transform == "values":
            yield strongest_quarter(maps)
        elif group.transform == "softmax":
            yield F.one_hot(maps.argmax(1), group.channels).movedim(-1, 1).bool()
        elif group is objectness:
            objects.append(maps)
        else:
            if objectness is not None:
                maps = maps * _resized(objectness.read(leaves), maps.shape[2:])
            objects.append(maps.amax(1, keepdim=True))
            yield maps >= CONFIDENT
    if objects:
        size = max((maps.shape[2:] for maps in objects), key=math.prod)
        yield strongest_quarter(torch.cat([_resized(m, size) for m in objects], 1).amax(1, True))


def _resized(maps: Maps, size: Sequence[int]) -> Maps:
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    return F.interpolate(maps, tuple(size), mode="nearest-exact")


def _class_regions(classes: Int[Tensor, "image h w"]) -> ConceptMasks:
    """Return the region of each class that an image has positions of."""
    shown = [part.unique() for part in classes]
    concepts = classes.new_full((len(classes), max(map(len, shown))), UNLABELLED)
    for row, numbers in zip(concepts, shown, strict=True):
        row[: len(numbers)] = numbers
    return ConceptMasks(classes[:, None] == concepts[:, :, None, None], concepts)


def _shown(masks: Bool[Tensor, "image concept h w"]) -> ConceptMasks:
    """Return the regions that aren't empty, by concept."""
    is_shown = masks.flatten(2).any(2)
    most = max(1, int(is_shown.sum(1).max()))
    order = is_shown.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
    concepts = torch.where(is_shown.gather(1, order), order, UNLABELLED)
    index = order[:, :, None, None].expand(-1, -1, *masks.shape[2:])
    return ConceptMasks(masks.gather(1, index), concepts)
