"""Class-evidence maps: where in an image the network finds evidence for a class.

If the head is global average pooling and one linear layer this is the class activation map
(Zhou et al., CVPR 2016, eq. 2), which needs no gradient; elsewhere Grad-CAM (Selvaraju et al.,
ICCV 2017, eqs. 1 and 2, without the final ReLU, which equals CAM if both exist).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.fx.node import Node

from secateur.data.concept_masks import Concept, ConceptMasks
from secateur.graph.network_graph import NetworkGraph, operation_name
from secateur.graph.taps import as_maps
from secateur.runtime.errors import TraceError
from secateur.scoring.concepts import ConceptInput, ConceptSource, SourceContext

REGION_FRACTION = 0.25
"""Fraction of an image's positions that counts as evidence."""

_HEAD = {"flatten", "view", "reshape", "dropout"}


class Evidence(ConceptSource):
    """The quarter of the last feature map's cells that is the strongest evidence for the class.

    The class is the label if there is one, else the network's prediction; of several labels it is
    the surest, see `Task.evidence`.
    """

    def __init__(self, context: SourceContext) -> None:
        outputs = context.task.concept_count(context.graph.output)
        names = context.class_names
        unnamed = (f"class {number}" for number in range(len(names), outputs))
        self._task = context.task
        self._classes = (*names, *unnamed)
        self._map = last_map(context.graph)
        kernel = _linear_head(context.graph, self._map)
        self._rows = (
            None if kernel is None else context.task.concept_rows(context.state[kernel].float())
        )

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """One concept for each class of the network's head, named if the data names it."""
        return tuple(Concept(name, "class evidence") for name in self._classes)

    @property
    def node(self) -> Node:
        """The last feature map."""
        return self._map

    @property
    def needs_gradient(self) -> bool:
        """False if the classifier's rows are the weights of the map."""
        return self._rows is None

    def find(self, concept_input: ConceptInput) -> ConceptMasks:
        """Return one region for each image, on the grid of the last feature map.

        It holds a quarter of the cells, rounded and at least one, and the cells that tie with the
        last of them.
        """
        heat, classes = self.heat(concept_input)
        count = max(1, round(REGION_FRACTION * heat[0].numel()))
        threshold = heat.flatten(1).topk(count, dim=1).values[:, -1]
        return ConceptMasks((heat >= threshold[:, None, None])[:, None], classes[:, None])

    def heat(
        self, concept_input: ConceptInput
    ) -> tuple[Float[Tensor, "image h w"], Int[Tensor, "image"]]:
        """Return the evidence for the class at each position of the last map, and the class.

        Raises `DataError` if a label is not one of the network's classes.
        """
        assert concept_input.value is not None
        logits, classes = self._task.evidence(concept_input.logits, concept_input.labels)
        if self._rows is not None:
            weights = self._rows[classes]  # [image, channel]
        else:
            (gradient,) = torch.autograd.grad(logits.sum(), concept_input.value, retain_graph=True)
            weights = as_maps(gradient).float().mean(dim=(2, 3))
        value = as_maps(concept_input.value.detach())
        # A matrix product may round differently in batches of another size.
        heat = (value.float() * weights[:, :, None, None]).sum(1)
        return heat, classes


def last_map(graph: NetworkGraph) -> Node:
    """Return the last feature map before the output that has more than one position.

    It has as many dimensions as the images, if there is such a map. Where a network joins several
    branches it is the last that any of them computes. Raises `TraceError` if there is none.
    """
    for ranks in ({_rank(graph.image)}, {3, 4, 5}):
        for output in graph.outputs:
            feature_map = _last_map_before(output, graph, ranks)
            if feature_map is not None:
                return feature_map
    feature_map = _last_map_of_branches(graph)
    if feature_map is not None:
        return feature_map
    raise TraceError("the network has no feature map to look for class evidence in")


def _rank(node: Node) -> int:
    return len(node.meta["val"].shape)


def _last_map_before(output: Node, graph: NetworkGraph, ranks: set[int]) -> Node | None:
    """Return the last feature map that an output is made from, with so many dimensions."""
    node = output
    if _rank(output) > 2 and output.args and isinstance(output.args[0], Node):
        node = output.args[0]  # the output is a map itself
    while isinstance(node, Node) and node is not graph.image:
        shape = getattr(node.meta["val"], "shape", ())
        if len(shape) in ranks and math.prod(int(size) for size in shape[2:]) > 1:
            return node
        if not node.args or not isinstance(node.args[0], Node):
            break
        node = node.args[0]
    return None


def _last_map_of_branches(graph: NetworkGraph) -> Node | None:
    """Return the last feature map, of any branch, that the output depends on."""
    needed = set(graph.outputs)
    for node in reversed(graph.nodes):
        if node not in needed or node.op != "call_function":
            continue
        shape = getattr(node.meta["val"], "shape", ())
        if len(shape) in (3, 4, 5) and shape[0] == graph.images and math.prod(shape[2:]) > 1:
            return node
        needed.update(node.all_input_nodes)
    return None


def _linear_head(graph: NetworkGraph, feature_map: Node) -> str | None:
    """Return the name of the classifier's weight if the head is average pooling and one linear."""
    node = graph.output
    if operation_name(node) != "linear" or not isinstance(node.args[1], Node):
        return None
    weight = graph.tensor_names.get(node.args[1])
    averaged = False
    rank = _rank(graph.image)
    pooling = {"mean", f"adaptive_avg_pool{rank - 2}d", f"avg_pool{rank - 2}d"}
    source = node.args[0]
    while isinstance(source, Node) and source is not feature_map:
        name = operation_name(source)
        if name not in _HEAD | pooling or (name == "mean" and not _is_over_positions(source, rank)):
            return None
        averaged |= name in pooling
        source = source.args[0]
    channels = feature_map.meta["val"].shape[1]
    fits = node.args[1].meta["val"].shape[1] == channels
    return weight if averaged and fits else None


def _is_over_positions(mean: Node, rank: int) -> bool:
    dims = mean.args[1] if len(mean.args) > 1 else None
    if not isinstance(dims, list | tuple):
        return False
    return {dim % rank for dim in dims if isinstance(dim, int)} == set(range(2, rank))
