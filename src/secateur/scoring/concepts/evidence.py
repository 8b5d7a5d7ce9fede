"""Class evidence: where the network itself finds what speaks for a class.

Where the head is global average pooling and one linear layer this is the class activation map
(Zhou et al., CVPR 2016, eq. 2), which needs no gradient; elsewhere Grad-CAM (Selvaraju et al.,
ICCV 2017, eqs. 1 and 2, without the final ReLU, which equals CAM where both exist).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.fx.node import Node

from secateur.data.batches import check_labels
from secateur.data.concept_masks import Concept, ConceptMasks
from secateur.errors import TraceError
from secateur.graph.network_graph import NetworkGraph, operation_name
from secateur.scoring.concepts import ConceptInput, ConceptSource, SourceContext

REGION_FRACTION = 0.25
"""Share of an image's positions that counts as evidence (design note: the top quarter)."""

_HEAD = {"flatten", "view", "reshape", "mean", "adaptive_avg_pool2d", "avg_pool2d", "dropout"}


class Evidence(ConceptSource):
    """The quarter of the last feature map's cells that speaks most for the image's class.

    The class is the label where one is given, else the network's own prediction.
    """

    def __init__(self, context: SourceContext) -> None:
        outputs = int(context.graph.output.meta["val"].shape[1])
        names = context.class_names
        unnamed = (f"class {number}" for number in range(len(names), outputs))
        self._classes = (*names, *unnamed)
        self._map = last_map(context.graph)
        kernel = _linear_head(context.graph, self._map)
        self._rows = None if kernel is None else context.state[kernel].float()

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """One concept a class of the network's head, named where the data names it."""
        return tuple(Concept(name, "class evidence") for name in self._classes)

    @property
    def node(self) -> Node:
        """The last feature map."""
        return self._map

    @property
    def needs_gradient(self) -> bool:
        """Not where the classifier's rows are the weights."""
        return self._rows is None

    def find(self, scene: ConceptInput) -> ConceptMasks:
        """One region an image, on the grid of the last feature map; see `ConceptSource.find`.

        A quarter of the cells, rounded to the next number and at least one; cells that tie with
        the last of them are inside, too.
        """
        heat, classes = self.heat(scene)
        count = max(1, round(REGION_FRACTION * heat[0].numel()))
        threshold = heat.flatten(1).topk(count, dim=1).values[:, -1]
        return ConceptMasks((heat >= threshold[:, None, None])[:, None], classes[:, None])

    def heat(self, scene: ConceptInput) -> tuple[Float[Tensor, "image h w"], Int[Tensor, "image"]]:
        """Evidence for the class at each position of the last feature map, and the class.

        Raises `DataError` where a label is no class of the network's.
        """
        assert scene.value is not None
        classes = scene.logits.detach().argmax(1) if scene.labels is None else scene.labels
        check_labels(classes, scene.logits.shape[1])
        if self._rows is not None:
            weights = self._rows[classes]  # [image, channel]
        else:
            chosen = scene.logits.gather(1, classes[:, None]).sum()
            (gradient,) = torch.autograd.grad(chosen, scene.value, retain_graph=True)
            weights = gradient.float().mean(dim=(2, 3))
        # Not a matrix product, which may round differently in batches of another size.
        heat = (scene.value.detach().float() * weights[:, :, None, None]).sum(1)
        return heat, classes


def last_map(graph: NetworkGraph) -> Node:
    """The last value with a height and a width above one on the way to the output.

    Raises `TraceError` where there is none.
    """
    node = graph.output
    while isinstance(node, Node) and node is not graph.image:
        shape = getattr(node.meta["val"], "shape", ())
        if len(shape) == 4 and math.prod(int(size) for size in shape[2:]) > 1:
            return node
        if not node.args or not isinstance(node.args[0], Node):
            break
        node = node.args[0]
    raise TraceError("the network has no feature map to look for class evidence in")


def _linear_head(graph: NetworkGraph, feature_map: Node) -> str | None:
    """Name of the classifier's weight where the head is global average pooling and linear."""
    node = graph.output
    if operation_name(node) != "linear" or not isinstance(node.args[1], Node):
        return None
    weight = graph.tensor_names.get(node.args[1])
    averaged = False
    source = node.args[0]
    while isinstance(source, Node) and source is not feature_map:
        name = operation_name(source)
        if name not in _HEAD or (name == "mean" and not _is_over_positions(source)):
            return None
        averaged |= name in ("mean", "adaptive_avg_pool2d", "avg_pool2d")
        source = source.args[0]
    channels = feature_map.meta["val"].shape[1]
    fits = node.args[1].meta["val"].shape[1] == channels
    return weight if averaged and fits else None


def _is_over_positions(mean: Node) -> bool:
    dims = mean.args[1] if len(mean.args) > 1 else None
    if not isinstance(dims, list | tuple):
        return False
    return {dim % 4 for dim in dims if isinstance(dim, int)} == {2, 3}
