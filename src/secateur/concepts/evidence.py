"""Class evidence: where the network itself finds what speaks for a class.

Where the head is global average pooling and one linear layer this is the class activation map
(Zhou et al., CVPR 2016, eq. 2), which needs no gradient; elsewhere Grad-CAM (Selvaraju et al.,
ICCV 2017, eqs. 1 and 2, without the final ReLU, which equals CAM where both exist).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.fx.node import Node

from secateur.concepts import Concept, ConceptMasks
from secateur.errors import TraceError
from secateur.graph import NetworkGraph, State, operation_name, run

REGION_FRACTION = 0.25
"""Share of an image's positions that counts as evidence (design note: the top quarter)."""

_HEAD = {"flatten", "view", "reshape", "mean", "adaptive_avg_pool2d", "avg_pool2d", "dropout"}


class Evidence:
    """The quarter of each image that speaks most for its class.

    The class is the label where one is given, else the network's own prediction.
    """

    def __init__(self, graph: NetworkGraph, state: State, class_names: tuple[str, ...]) -> None:
        self._graph = graph
        self._state = state
        outputs = int(graph.output.meta["val"].shape[1])
        unnamed = (f"class {number}" for number in range(len(class_names), outputs))
        self._classes = (*class_names, *unnamed)
        self._map = last_map(graph)
        self._kernel = _linear_head(graph, self._map)

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """One concept a class of the network's head, named where the data names it."""
        return tuple(Concept(name, "class evidence") for name in self._classes)

    def find(
        self,
        images: Float[Tensor, "image rgb height width"],
        labels: Int[Tensor, "image"] | None,
    ) -> ConceptMasks:
        """One region an image; see `ConceptSource.find`."""
        heat, classes = self.heat(images, labels)
        fine = F.interpolate(
            heat[:, None], images.shape[-2:], mode="bilinear", align_corners=False
        )  # [image, 1, height, width]
        ranked = fine.flatten(2)
        count = max(1, round(REGION_FRACTION * ranked.shape[2]))
        threshold = ranked.topk(count, dim=2).values[:, :, -1]
        return ConceptMasks(fine >= threshold[..., None, None], classes[:, None])

    def heat(
        self,
        images: Float[Tensor, "image rgb height width"],
        labels: Int[Tensor, "image"] | None,
    ) -> tuple[Float[Tensor, "image h w"], Int[Tensor, "image"]]:
        """Evidence for the class at each position of the last feature map, and the class."""
        seen: dict[str, Tensor] = {}

        def keep(value: Tensor) -> Tensor:
            seen["map"] = value.detach().clone().requires_grad_(self._kernel is None)
            return seen["map"]

        with torch.set_grad_enabled(self._kernel is None):
            logits = run(self._graph, self._state, images, after={self._map: keep})
            classes = logits.detach().argmax(1) if labels is None else labels
            if self._kernel is not None:
                weights = self._state[self._kernel][classes]  # [image, channel]
            else:
                chosen = logits.gather(1, classes[:, None]).sum()
                (gradient,) = torch.autograd.grad(chosen, seen["map"])
                weights = gradient.mean(dim=(2, 3))
        return torch.einsum("nchw,nc->nhw", seen["map"].detach(), weights), classes


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
