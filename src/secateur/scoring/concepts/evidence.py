"""Class-evidence maps: where in an image the network finds evidence for a class.

If the head is global average pooling and one linear layer, or a 1×1 convolution that makes the map
of a segmentation, this is the class activation map (Zhou et al., CVPR 2016, eq. 2), which needs no
gradient; elsewhere Grad-CAM (Selvaraju et al.,
ICCV 2017, eqs. 1 and 2, without the final ReLU, which equals CAM if both exist).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.fx.node import Node

from secateur.data.concept_masks import Concept, ConceptMasks
from secateur.graph.network_graph import NetworkGraph, argument, first_input, operation_name
from secateur.graph.taps import as_maps
from secateur.runtime.errors import TraceError
from secateur.scoring.concepts import ConceptInput, ConceptSource, SourceContext

REGION_FRACTION = 0.25
"""Fraction of an image's positions that counts as evidence."""

_HEAD = {"flatten", "view", "reshape", "dropout"}
_RESIZING = ("upsample", "_upsample", "dropout")
"""How the names of operations begin that a class map may pass on its way to the output."""
_LAYERS = frozenset(
    {"linear", *(f"conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3))}
)


class Evidence(ConceptSource):
    """The quarter of the last feature map's cells that is the strongest evidence for the class.

    The class is the label if there is one, else the network's prediction; of several labels it is
    the surest, see `Task.evidence`.
    """

    def __init__(self, context: SourceContext) -> None:
        outputs = context.task.concept_count(context.graph.outputs[0])
        names = context.class_names
        unnamed = (f"class {number}" for number in range(len(names), outputs))
        self._task = context.task
        self._classes = (*names, *unnamed)
        self._map = last_map(context.graph)
        is_dense = context.task.kind == "segmentation"
        head = _convolution_head if is_dense else _linear_head
        kernel = head(context.graph, self._map)
        self._rows = (
            None
            if kernel is None
            else context.task.concept_rows(context.state[kernel].float().flatten(1))
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
        return ConceptMasks(strongest_quarter(heat[:, None]), classes[:, None])

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


def strongest_quarter(
    maps: Float[Tensor, "image region h w"],
) -> Bool[Tensor, "image region h w"]:
    """Return the quarter of each map's cells with the largest values, and all that tie with it."""
    cells = maps.flatten(2)
    count = max(1, round(REGION_FRACTION * cells.shape[2]))
    threshold = cells.topk(count, dim=2).values[..., -1]
    return maps >= threshold[..., None, None]


def last_map(graph: NetworkGraph) -> Node:
    """Return the last feature map before the output that has more than one position.

    Of a network that returns maps it is what the last layer reads, whose outputs can't be removed.
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


def _positions(node: Node) -> int:
    return math.prod(int(size) for size in node.meta["val"].shape[2:])


def _last_map_before(output: Node, graph: NetworkGraph, ranks: set[int]) -> Node | None:
    """Return the last feature map that an output is made from, with so many dimensions."""
    node = output
    is_map = _rank(output) > 2
    inner = _read_by_last_layer(output) if is_map and _positions(output) > 1 else None
    if inner is not None:
        node = inner
    elif is_map and output.args and isinstance(output.args[0], Node):
        node = output.args[0]
    while isinstance(node, Node) and node is not graph.image:
        shape: Sequence[int] = getattr(node.meta["val"], "shape", ())
        has_images = len(shape) in ranks and int(shape[0]) == graph.images
        if has_images and _positions(node) > 1:
            return node
        if not node.args or not isinstance(node.args[0], Node):
            break
        node = node.args[0]
    return None


def _read_by_last_layer(output: Node) -> Node | None:
    """Return what the last convolution or linear layer reads, before a map of the output.

    Of several that are joined it is the map with the most channels, of those the finest.
    """
    read: list[Node] = []
    waiting, seen = [output], {output}
    while waiting:
        node = waiting.pop()
        if operation_name(node) in _LAYERS:
            read.append(first_input(node))
            continue
        following = [source for source in node.all_input_nodes if source not in seen]
        seen.update(following)
        waiting += following
    maps = [tuple(node.meta["val"].shape[1:]) for node in read if _rank(node) > 2]
    best = max(maps, key=lambda shape: (shape[0], math.prod(shape)), default=None)
    return next((node for node in read if tuple(node.meta["val"].shape[1:]) == best), None)


def _last_map_of_branches(graph: NetworkGraph) -> Node | None:
    """Return the last feature map, of any branch, that the output depends on."""
    needed = set(graph.outputs)
    for node in reversed(graph.nodes):
        if node not in needed or node.op != "call_function":
            continue
        shape: tuple[int, ...] = tuple(getattr(node.meta["val"], "shape", ()))
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


def _convolution_head(graph: NetworkGraph, feature_map: Node) -> str | None:
    """Return the name of the weight of a 1×1 convolution whose maps are at most resized."""
    node = graph.outputs[0]
    while operation_name(node).startswith(_RESIZING):
        node = first_input(node)
    if operation_name(node) not in _LAYERS or "transpose" in operation_name(node):
        return None
    weight = node.args[1]
    if node.args[0] is not feature_map or not isinstance(weight, Node):
        return None
    sides = weight.meta["val"].shape[2:]
    is_single = math.prod(sides) == 1 and argument(node, "groups", 1) == 1
    return graph.tensor_names.get(weight) if is_single and len(sides) else None


def _is_over_positions(mean: Node, rank: int) -> bool:
    dims = mean.args[1] if len(mean.args) > 1 else None
    if not isinstance(dims, list | tuple):
        return False
    return {dim % rank for dim in dims if isinstance(dim, int)} == set(range(2, rank))
