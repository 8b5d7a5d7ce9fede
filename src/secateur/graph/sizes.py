"""Resolves sizes: which follow a cut on their own, and which module attributes a cut must change.

The traced graph holds sizes as plain numbers and does not say where they come from: the shape of a
view to `[-1, 2, 58, 28, 28]` may be computed from the input's shape, taken from an attribute of a
module, or written in the code. So test cuts are made and traced again (`verify`). If every
operation is as predicted, all sizes follow. If not, attributes of the modules concerned that hold
the old number get the new one, and the cut is tested again. Channels whose sizes still differ are
frozen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.fx.node import Node

from secateur.graph.call_sites import call_site
from secateur.graph.channel_ids import Count, Ids, Resize
from secateur.graph.coupling import CoupledChannels, assemble
from secateur.graph.cut import SizeConflict, attribute_values
from secateur.graph.dependency import DependencyGraph, SizedAttribute
from secateur.graph.groups import Reason
from secateur.graph.network_graph import operation_name, position_of
from secateur.graph.propagation import ChannelPropagation
from secateur.graph.verify import choose_test_cuts, find_difference
from secateur.runtime.torch_internals import BatchOrInstanceNorm, Convolution

CONSTANT_SIZE = "sized by a number in the network's code ({operation} in {module})"
SIZE_ATTRIBUTE = "with fewer channels the network's code does something else"

_Frozen = tuple[Ids, Reason]
"""Ids to freeze, and the reason."""
_Attributes = tuple[SizedAttribute, ...]


@dataclass(frozen=True, eq=False)
class _SizeUse:
    """The n-th operation with a size among its arguments, in every module of one class."""

    kind: tuple[str, str, int]
    """Class of the module, operation, n."""
    nodes: tuple[Node, ...]


def resolve_sizes(coupled: CoupledChannels, example: Tensor) -> DependencyGraph:
    """Return the dependency graph, with channels frozen if their sizes don't follow a cut."""
    model, propagation = coupled.model, coupled.propagation
    known, uses = _size_uses(model, propagation)

    def difference(candidate: DependencyGraph) -> str | None:
        return find_difference(model, example, candidate, thorough=bool(uses))

    dependencies = assemble(coupled, attributes=known)
    if difference(dependencies) is None:
        return dependencies
    active = _active_uses(dependencies, uses)
    candidates = {use.kind: _candidate_attributes(model, dependencies, use) for use in active}
    likeliest = tuple(a for options in candidates.values() for a in (options[:1] or [()])[0])
    if likeliest:
        dependencies = assemble(coupled, attributes=(*known, *likeliest))
        if difference(dependencies) is None:
            return dependencies
        coupled = _couple_equal_pieces(coupled, dependencies, active, candidates)
        dependencies = assemble(coupled, attributes=(*known, *likeliest))
        if difference(dependencies) is None:
            return dependencies
    return _resolve_one_by_one(coupled, known, active, candidates, difference)


def _couple_equal_pieces(
    coupled: CoupledChannels,
    dependencies: DependencyGraph,
    uses: list[_SizeUse],
    candidates: dict[tuple[str, str, int], list[_Attributes]],
) -> CoupledChannels:
    """Return the channels with the pieces of a split coupled whose sizes are one attribute.

    After `x.split((self.c, self.c), 1)` both pieces must lose as many channels.
    """
    propagation = coupled.propagation
    for use in uses:
        attributes = (candidates[use.kind][:1] or [()])[0]
        if not _is_in_conflict(replace(dependencies, attributes=attributes)):
            continue
        for node in use.nodes:
            for pieces in zip(*propagation.multi_output_axes.get(node, []), strict=True):
                known = [ids for ids in pieces if ids is not None]
                for one, other in itertools.combinations(known, 2):
                    if len(one) == len(other):
                        propagation.couple(one, other, "pieces of a split")
    return replace(coupled, roots=propagation.roots())


def _is_in_conflict(dependencies: DependencyGraph) -> bool:
    """Return whether a test cut would give an attribute two values."""
    try:
        for removed in choose_test_cuts(dependencies, thorough=True):
            attribute_values(dependencies, removed)
    except SizeConflict:
        return True
    return False


def _resolve_one_by_one(
    coupled: CoupledChannels,
    known: _Attributes,
    uses: list[_SizeUse],
    candidates: dict[tuple[str, str, int], list[_Attributes]],
    difference: Callable[[DependencyGraph], str | None],
) -> DependencyGraph:
    """Return the dependency graph with the channels of every use frozen that no candidate fits."""
    at_uses = [pair for use in uses for pair in _channels_at(coupled.propagation, use)]
    not_cuttable = _uncuttable_groups(coupled, at_uses, known, difference)
    accepted = known
    rejected: list[_SizeUse] = []
    for number, use in enumerate(uses):
        unresolved = [*rejected, *uses[number + 1 :]]
        frozen = [
            *not_cuttable,
            *(pair for other in unresolved for pair in _channels_at(coupled.propagation, other)),
        ]
        for attributes in [(), *candidates[use.kind]]:
            if difference(assemble(coupled, frozen, (*accepted, *attributes))) is None:
                accepted = (*accepted, *attributes)
                break
        else:
            rejected.append(use)
    frozen = [
        *not_cuttable,
        *(pair for use in rejected for pair in _channels_at(coupled.propagation, use)),
    ]
    return assemble(coupled, frozen, accepted)


def _uncuttable_groups(
    coupled: CoupledChannels,
    frozen: list[_Frozen],
    attributes: _Attributes,
    difference: Callable[[DependencyGraph], str | None],
) -> list[_Frozen]:
    """Return the channels of groups that can't be cut even while those at every use are frozen.

    Bisects: freezes one half of the groups and tests the other.
    """

    def search(names: list[str], others: list[_Frozen]) -> list[_Frozen]:
        place = difference(assemble(coupled, [*frozen, *others], attributes))
        if place is None:
            return []
        if len(names) == 1:
            return [(channels[names[0]], Reason(SIZE_ATTRIBUTE, place))]
        first_half, second_half = names[: len(names) // 2], names[len(names) // 2 :]
        untested = [(channels[name], Reason(SIZE_ATTRIBUTE)) for name in second_half]
        in_first = search(first_half, [*others, *untested])
        return [*in_first, *search(second_half, [*others, *in_first])]

    groups = assemble(coupled, frozen, attributes).groups
    channels = {name: group.channels for name, group in groups.items()}
    return search(list(groups), []) if groups else []


def _size_uses(
    model: nn.Module, propagation: ChannelPropagation
) -> tuple[_Attributes, list[_SizeUse]]:
    """Return attributes that are known to hold a size, and uses of sizes of unknown origin."""
    known: list[SizedAttribute] = []
    nodes_by_kind: dict[tuple[str, str, int], list[Node]] = {}
    counters: dict[tuple[str, str], itertools.count[int]] = {}
    for node in propagation.graph.nodes:
        if node.op != "call_function":
            continue
        path, module = _owner(model, node)
        attributes = _sizes_in_module(propagation, node, path, module)
        known += attributes
        if node in propagation.resizes and not attributes:
            name = operation_name(node)
            call = f"{path}:{_call_id(node)}"
            number = next(counters.setdefault((call, name), itertools.count()))
            kind = (type(module).__qualname__, name, number)
            nodes_by_kind.setdefault(kind, []).append(node)
    return tuple(known), [_SizeUse(kind, tuple(nodes)) for kind, nodes in nodes_by_kind.items()]


def _sizes_in_module(
    propagation: ChannelPropagation, node: Node, path: str, module: nn.Module
) -> list[SizedAttribute]:
    """Return the attributes of one of torch's own modules that hold its operation's sizes."""
    name, resize = operation_name(node), propagation.resizes.get(node)
    if isinstance(module, BatchOrInstanceNorm):
        ids = propagation.axes[node][1] if name in ("batch_norm", "instance_norm") else None
        if ids is not None:
            return [_channel_count(path, "num_features", ids)]
    elif resize is not None:
        if isinstance(module, Convolution) and name.startswith("conv"):
            return [_argument(path, "groups", None, resize, position_of(node, "groups"), None)]
        if isinstance(module, nn.GroupNorm) and name == "group_norm":
            position = position_of(node, "num_groups")
            return [_argument(path, "num_groups", None, resize, position, None)]
        if isinstance(module, nn.LayerNorm | nn.RMSNorm) and name in ("layer_norm", "rms_norm"):
            position = position_of(node, "normalized_shape")
            return [
                _argument(path, "normalized_shape", index, resize, position, index)
                for index in range(len(module.normalized_shape))
            ]
    return []


def _channel_count(path: str, name: str, ids: Ids) -> SizedAttribute:
    return SizedAttribute(path, name, None, lambda count: count(ids, len(ids)))


def _argument(
    path: str, name: str, index: int | None, resize: Resize, position: int, element: int | None
) -> SizedAttribute:
    """Return an attribute that holds an operation's argument, or an element of it."""

    def size(count: Count) -> int:
        value = resize(count)[position]
        return int(value if element is None else value[element])

    return SizedAttribute(path, name, index, size)


def _owner(model: nn.Module, node: Node) -> tuple[str, nn.Module]:
    """Return the innermost module that an operation was called in, other than containers."""
    owner: tuple[str, nn.Module] = ("", model)
    for path in _modules_of(node):
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        if type(module) not in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
            owner = (path, module)
    return owner


def _modules_of(node: Node) -> Iterable[str]:
    """Return the dotted names of the modules that an operation was called in, outermost first."""
    stack: dict[str, str] = node.meta.get("nn_module_stack", {})
    return stack.values()


def _call_id(node: Node) -> str:
    """Return an id that differs between calls of the same module."""
    return ",".join(node.meta.get("nn_module_stack", {}))


def _active_uses(dependencies: DependencyGraph, uses: list[_SizeUse]) -> list[_SizeUse]:
    """Return the uses whose sizes a test cut changes."""
    before = dependencies.sizes_after({})
    after = [
        dependencies.sizes_after(removed)
        for removed in choose_test_cuts(dependencies, thorough=True)
    ]
    return [
        use
        for use in uses
        if any(sizes[node] != before[node] for node in use.nodes for sizes in after)
    ]


def _candidate_attributes(
    model: nn.Module, dependencies: DependencyGraph, use: _SizeUse
) -> list[_Attributes]:
    """Return attributes that may hold the sizes of a use: all that fit, then each alone."""
    candidates: dict[tuple[str, int | None], list[SizedAttribute]] = {}
    for node in use.nodes:
        sizes = dependencies.resizes[node](dependencies.count_after({}))
        for position, value in sizes.items():
            for element, size in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(size, int):
                    for attribute in _attributes_with_size(
                        model, dependencies, node, position, element, size
                    ):
                        key = (attribute.name, attribute.index)
                        candidates.setdefault(key, []).append(attribute)
    if not candidates:
        return []
    everything = tuple(a for attributes in candidates.values() for a in attributes)
    single = [tuple(attributes) for attributes in candidates.values()]
    return [everything, *single] if len(single) > 1 else [everything]


def _attributes_with_size(
    model: nn.Module,
    dependencies: DependencyGraph,
    node: Node,
    position: int,
    element: int | None,
    size: int,
) -> list[SizedAttribute]:
    """Return attributes of the operation's module, or of the next one around it, with this size."""
    path, _ = _owner(model, node)
    resize = dependencies.resizes[node]
    while True:
        module = model.get_submodule(path)
        attributes = [
            _argument(path, name, index, resize, position, element)
            for name, value in vars(module).items()
            if not name.startswith("_") and name != "training"
            for index, number in _numbers(value)
            if number == size and (element is None or index is None or index == element)
        ]
        if attributes or not path:
            return attributes
        path = path.rpartition(".")[0]


def _numbers(value: object) -> Iterable[tuple[int | None, int]]:
    """Return the whole numbers in an attribute, each with its index if it is a tuple or list."""
    items: list[tuple[int | None, Any]] = (
        list(enumerate(value)) if isinstance(value, list | tuple) else [(None, value)]
    )
    return [
        (index, number)
        for index, number in items
        if isinstance(number, int) and not isinstance(number, bool)
    ]


def _channels_at(propagation: ChannelPropagation, use: _SizeUse) -> list[_Frozen]:
    """Return the input channels of a use's operations, with the reason to freeze them."""
    class_name, operation, _ = use.kind
    cause = CONSTANT_SIZE.format(operation=operation, module=class_name)
    return [
        (ids, Reason(cause, call_site(node)))
        for node in use.nodes
        for value in (*node.all_input_nodes, node)
        for ids in propagation.axes.get(value, ())
        if ids is not None and (value is not node or propagation.are_copies(ids))
    ]
