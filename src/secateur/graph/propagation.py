"""Propagates channel ids through the traced network.

Every dimension of every parameter gets new ids. Each operation has a rule (`rules`) that says how
the ids of its inputs become those of its value, which ids it couples and which it freezes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.fx.node import Node
from torch.utils.flop_counter import FlopCounterMode

from secateur.graph.call_sites import call_site
from secateur.graph.channel_ids import Axes, Consumer, Ids, Layer, Resize
from secateur.graph.groups import Reason
from secateur.graph.network_graph import NetworkGraph, operation_name
from secateur.graph.unknown_sizes import has_unknown_size
from secateur.graph.weight_norm import WeightNorm
from secateur.runtime.errors import UsageError
from secateur.runtime.torch_internals import is_pointwise

POINTWISE = "pointwise"
"""In a table of rules: operations without a rule that PyTorch tags as pointwise."""
UNKNOWN_SIZE = "of a size that depends on the values"
Rule = Callable[["ChannelPropagation", Node], Axes | list[Axes]]
"""Returns the ids along each dimension of an operation's value, or of each of its values."""


class ChannelPropagation:
    """The channel ids of every value, and what the rules have recorded about them."""

    def __init__(self, graph: NetworkGraph, rules: Mapping[str, Rule]) -> None:
        self.graph = graph
        self.axes: dict[Node, Axes] = {}
        self.multi_output_axes: dict[Node, list[Axes]] = {}
        """Axes of each value of an operation that has several."""
        self.layers: list[Layer] = []
        self.consumers: list[Consumer] = []
        self.residual_couplings: list[tuple[Ids, Ids]] = []
        """Channels that a skip connection adds to those that were computed from them."""
        self.mixing: set[Node] = set()
        """Operations over all channels, such as layer norm, whose values change if some go."""
        self.resizes: dict[Node, Resize] = {}
        """Operations whose arguments hold numbers of channels."""
        self.covers: list[Ids] = []
        """Channels along one dimension of some value: at least one of them must stay."""
        self.product_macs: int = 0
        """Multiply-accumulates per image in products of feature maps, which are never cut."""
        self._rules = rules
        self._id_count = 0
        self._couplings: list[tuple[Ids, Ids]] = []
        self._frozen: list[tuple[Ids, Reason]] = []
        self._copied_ids: set[int] = set()
        self._copies: list[Node] = []
        self._visited: Node | None = None
        self._order = {node: position for position, node in enumerate(graph.nodes)}
        self._ancestors: dict[Node, int] = {}
        """Node -> bit mask of the nodes that it is computed from, itself included."""
        self.weight_norms: list[WeightNorm] = []
        self._kernels = {
            node
            for node in _kernel_ancestors(graph, ("conv",))
            if node in graph.tensor_names and node.meta["val"].dim() > 2
        }
        """Parameters that are the kernel of a convolution, or that one is computed from."""
        self._kernel_ancestors = _kernel_ancestors(graph, ("conv", "linear"))
        self._needing_whole: dict[Node, str] = {}
        """Operations without a rule that compute kernels, with the reason to freeze these."""

    def visit_all(self) -> None:
        """Find the axes of every node's value, in the order of execution."""
        for node, position in self._order.items():
            ancestors = 1 << position
            for source in node.all_input_nodes:
                ancestors |= self._ancestors[source]
            self._ancestors[node] = ancestors
            self._visit(node)
        self._visited = None

    def _visit(self, node: Node) -> None:
        value = node.meta.get("val")
        self._visited = node
        if node in self.graph.tensor_names:
            assert isinstance(value, Tensor)
            tracked = 2 if node in self._kernels else value.dim()
            self.axes[node] = tuple(
                self.new_ids(int(size)) if dim < tracked else None
                for dim, size in enumerate(value.shape)
            )
        elif node.op == "call_function" and isinstance(value, Tensor | list | tuple):
            axes = self._rule_of(node)(self, node)
            self._check_rule(node, axes)
            if isinstance(axes, list):
                self.multi_output_axes[node] = axes
                self.covers.extend(ids for output in axes for ids in output if ids is not None)
            else:
                self.axes[node] = axes
        elif isinstance(value, Tensor):
            self.axes[node] = (None,) * value.dim()

    def _rule_of(self, node: Node) -> Rule:
        if has_unknown_size(node):
            return lambda propagation, node: propagation.freeze_inputs(node, UNKNOWN_SIZE)
        rule = self._rules.get(operation_name(node))
        if rule is None and is_pointwise(node.target):
            rule = self._rules[POINTWISE]
        return rule or ChannelPropagation._freeze_unknown

    def _check_rule(self, node: Node, axes: Axes | list[Axes]) -> None:
        """Raise `UsageError` if a rule does not return ids for every dimension of a value."""
        value = node.meta["val"]
        outputs = zip(axes, value, strict=False) if isinstance(axes, list) else [(axes, value)]
        for output_axes, output in outputs:
            shape = tuple(output.shape) if isinstance(output, Tensor) else ()
            if len(output_axes) != len(shape) or any(
                ids is not None and len(ids) != size
                for ids, size in zip(output_axes, shape, strict=True)
            ):
                sizes = [None if ids is None else len(ids) for ids in output_axes]
                raise UsageError(
                    f"the rule for {operation_name(node)!r} returns {sizes} channels along the "
                    f"dimensions of a value of shape {list(shape)}"
                )

    def new_ids(self, size: int) -> Ids:
        """Return new channel ids."""
        self._id_count += size
        return np.arange(self._id_count - size, self._id_count, dtype=np.int64)

    def new_frozen_ids(self, size: int, reason: str) -> Ids:
        """Return new channel ids that can't be cut."""
        ids = self.new_ids(size)
        self.freeze((ids,), reason)
        return ids

    def new_copied_ids(self, size: int) -> Ids:
        """Return new ids along a dimension that holds copies of one value, as after `expand`.

        So its size may follow that of any value which this one is combined with.
        """
        ids = self.new_ids(size)
        self._copied_ids.update(ids.tolist())
        assert self._visited is not None
        self._copies.append(self._visited)
        return ids

    def are_copies(self, ids: Ids) -> bool:
        """Return whether ids are of a dimension that holds copies of one value."""
        return len(ids) > 0 and int(ids[0]) in self._copied_ids

    def drop_idle_sizes(self, roots: Ids) -> None:
        """Forget sizes of dimensions with copies of one value that no channel is coupled to."""
        sizes = np.bincount(roots, minlength=len(roots))
        for node in self._copies:
            known = [ids for ids in self.axes[node] if ids is not None]
            if all(self.are_copies(ids) and (sizes[roots[ids]] == 1).all() for ids in known):
                self.resizes.pop(node, None)

    def couple(self, one: Ids | None, other: Ids | None, reason: str) -> None:
        """Record that two dimensions hold the same channels, index by index.

        If the size of one never changes (None), the other is frozen for `reason`.
        """
        if one is None or other is None:
            self.freeze((one, other), reason)
        elif one is not other:
            self._couplings.append((one, other))

    def couple_rows(self, ids: Ids) -> Ids:
        """Record that each row of `[channel, copy]` is one channel; return one id of each row."""
        first = np.ascontiguousarray(ids[:, 0])
        if ids.shape[1] > 1:
            self._couplings.append((np.repeat(first, ids.shape[1] - 1), ids[:, 1:].reshape(-1)))
        return first

    def freeze(self, axes: Iterable[Ids | None], reason: str, node: Node | None = None) -> None:
        """Record that no channel of these axes can be cut, because of an operation.

        That is the one whose rule is running, unless another one is passed.
        """
        known = [ids for ids in axes if ids is not None]
        if known:
            node = node or self._visited
            place = "" if node is None else call_site(node)
            why = Reason(reason, place)
            self._frozen.extend((ids, why) for ids in known)

    def keep_two(self, axes: Iterable[Ids], reason: str) -> None:
        """Record that of the channels along each of these axes at least two must stay."""
        for ids in axes:
            if len(ids) > 1:  # the frozen one, and one of its group
                self.freeze((ids[:1],), reason)
                self.covers.append(ids[1:])

    def freeze_inputs(self, node: Node, reason: str) -> Any:
        """Freeze all inputs of a node; return axes of fixed size for its value."""
        for source in node.all_input_nodes:
            for axes in self.multi_output_axes.get(source, [self.axes.get(source, ())]):
                self.freeze(axes, reason)
        return fixed_axes(node)

    def _freeze_unknown(self, node: Node) -> Any:
        reason = f"no rule for the operation {operation_name(node)!r}"
        if node in self._kernel_ancestors and not self.depends_on(node, self.graph.image):
            reason = f"{reason}, which computes the kernel{self._remedy(node)}"
            self._needing_whole[node] = reason
        return self.freeze_inputs(node, reason)

    def _remedy(self, node: Node) -> str:
        """Return how to make the kernel a plain parameter; empty if that is not known."""
        names = (self.graph.tensor_names.get(source, "") for source in _sources(node))
        for name in names:
            layer, is_parametrized, tensor = f".{name}".partition(".parametrizations.")
            function = "parametrize.remove_parametrizations"
            if not is_parametrized and name.endswith("_orig"):
                layer, _, tensor = f".{name.removesuffix('_orig')}".rpartition(".")
                function = "remove_spectral_norm"
            if tensor:
                place = f"model.get_submodule({layer[1:]!r})" if layer else "model"
                tensor = tensor.partition(".")[0]
                return f": call torch.nn.utils.{function}({place}, {tensor!r}) before pruning"
        return ""

    def kernel_source(self, weight: Node) -> Node:
        """Return the parameter that a kernel is, or is computed from; else a constant."""
        shape = weight.meta["val"].shape
        for source in _sources(weight):
            value = source.meta["val"]
            is_parameter = source in self.graph.tensor_names and isinstance(value, nn.Parameter)
            if is_parameter and value.shape == shape:
                return source
        source = weight
        while source not in self.graph.tensor_names and source.all_input_nodes:
            source = source.all_input_nodes[0]
        return source

    def why_kernel_is_whole(self, weight: Node) -> str:
        """Return why a kernel that is computed can't be cut; empty if it can."""
        known = self._needing_whole
        return next((known[source] for source in _sources(weight) if source in known), "")

    def count_product(self, node: Node) -> None:
        """Add the multiply-accumulates of an operation that is not a layer."""
        tensors: list[Node] = []

        def value_of(source: Node) -> Any:
            if isinstance(source.meta["val"], Tensor):
                tensors.append(source)
            return source.meta["val"]

        arguments = torch.fx.node.map_arg((node.args, node.kwargs), value_of)
        if len(tensors) < 2:
            return
        mode = tensors[0].meta["val"].fake_mode
        assert callable(node.target)
        with mode, torch.no_grad(), FlopCounterMode(display=False) as counter:
            node.target(*arguments[0], **arguments[1])
        self.product_macs += int(counter.get_total_flops()) // 2 // self.graph.images

    def depends_on(self, node: Node, source: Node) -> bool:
        """Return whether a value is computed from another one, or is that one."""
        return bool(self._ancestors[node] >> self._order[source] & 1)

    @property
    def id_count(self) -> int:
        """Number of channel ids so far."""
        return self._id_count

    def freeze_residual_channels(self, reason: str) -> None:
        """Freeze channels that are coupled by skip connections alone."""
        roots = self.roots(with_residual=False)
        for one, other in self.residual_couplings:
            differ = roots[one] != roots[other]
            self.freeze((one[differ], other[differ]), reason)

    def roots(self, *, with_residual: bool = True) -> Ids:
        """Return `[id]`: the smallest id that each is coupled to, directly or through others."""
        couplings = [*self._couplings, *(self.residual_couplings if with_residual else ())]
        nothing = np.zeros(0, dtype=np.int64)
        one = np.concatenate([nothing, *(ids for ids, _ in couplings)])
        other = np.concatenate([nothing, *(ids for _, ids in couplings)])
        edges = coo_array((np.ones(len(one)), (one, other)), shape=(self._id_count,) * 2)
        _, component = connected_components(edges, directed=False)
        _, smallest = np.unique(component, return_index=True)
        roots: Ids = smallest.astype(np.int64)[component]
        return roots

    def reasons(self, roots: Ids, frozen: Iterable[tuple[Ids, Reason]] = ()) -> dict[int, Reason]:
        """Return `{root: why the channel must stay}`, the first reason of each.

        `frozen` are further ids that must stay, with the reason.
        """
        reasons: dict[int, Reason] = {}
        for ids, reason in (*self._frozen, *frozen):
            for channel in np.unique(roots[ids]).tolist():
                reasons.setdefault(channel, reason)
        return reasons


def fixed_axes(node: Node) -> Any:
    """Return axes for an operation's value, or each of several, whose sizes never change."""
    value: Any = node.meta["val"]
    if isinstance(value, Tensor):
        return (None,) * value.dim()
    return [(None,) * v.dim() if isinstance(v, Tensor) else () for v in value]


def _sources(node: Node) -> Iterator[Node]:
    """Yield a node and all that it is computed from, the first input of each operation first."""
    seen: set[Node] = set()
    pending = [node]
    while pending:
        source = pending.pop()
        if source not in seen:
            seen.add(source)
            yield source
            pending.extend(reversed(source.all_input_nodes))


def _kernel_ancestors(graph: NetworkGraph, kinds: tuple[str, ...]) -> set[Node]:
    """Return the kernels of layers of some kinds, and all values that these are computed from."""
    pending = [
        node.args[1]
        for node in graph.nodes
        if operation_name(node).startswith(kinds) and len(node.args) > 1
    ]
    ancestors: set[Node] = set()
    while pending:
        node = pending.pop()
        if isinstance(node, Node) and node not in ancestors:
            ancestors.add(node)
            pending.extend(node.all_input_nodes)
    return ancestors


def positions_per_image(propagation: ChannelPropagation, *sizes: Sequence[int]) -> int:
    """Return the number of positions per image in dimensions of these sizes, batch included."""
    return math.prod(size for part in sizes for size in part) // propagation.graph.images
