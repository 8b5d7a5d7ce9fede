"""Which sizes follow a cut by themselves, and which attributes of modules must be changed.

The traced graph holds sizes as plain numbers, and does not say where they come from: a view to
`[-1, 2, 58, 28, 28]` may be computed from the input's shape, taken from an attribute of a module,
or written in the code. So trial cuts are made and traced (`trial`): if every operation is what was
predicted the sizes follow by themselves. If not, attributes of the modules concerned that hold the
old number are given the new one, and it is tried again. What still does not come out right is
frozen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.fx.node import Node

from secateur.graph.assemble import assemble
from secateur.graph.channel_ids import Count, Ids, Resize
from secateur.graph.dependency import DependencyGraph, SizedAttribute
from secateur.graph.network_graph import Forward, operation_name, position_of
from secateur.graph.propagation import ChannelPropagation
from secateur.graph.verify import is_predicted, test_cuts

CONSTANT_SIZE = "sized by a number in the network's code ({operation} in {module})"
SIZE_ATTRIBUTE = "with fewer channels the network's code does something else"

_Frozen = tuple[Ids, str]


@dataclass(frozen=True, eq=False)
class _SizeUse:
    """The n-th operation with a size of its own in every module of one class."""

    kind: tuple[str, str, int]
    nodes: tuple[Node, ...]


def resolve_sizes(
    model: nn.Module, example: Tensor, forward: Forward | None, spread: ChannelPropagation
) -> DependencyGraph:
    """The dependency graph with every channel frozen whose sizes don't follow a cut."""
    known, places = _size_uses(model, spread)

    def works(candidate: DependencyGraph) -> bool:
        return is_predicted(model, example, forward, candidate, thorough=bool(places))

    dependencies = assemble(model, spread, attributes=known)
    if works(dependencies):
        return dependencies
    active = _active(dependencies, places)
    guesses = {place.kind: _candidate_attributes(model, dependencies, place) for place in active}
    together = tuple(a for options in guesses.values() for a in (options[:1] or [()])[0])
    if together:
        dependencies = assemble(model, spread, attributes=(*known, *together))
        if works(dependencies):
            return dependencies
    everywhere = [pair for place in active for pair in _channels_at(spread, place)]
    steered = _resolve_attributes(model, spread, everywhere, known, works)
    accepted = known
    rejected: list[_SizeUse] = []
    for number, place in enumerate(active):
        waiting = [*rejected, *active[number + 1 :]]
        for guess in [(), *guesses[place.kind]]:
            held = [*steered, *(pair for other in waiting for pair in _channels_at(spread, other))]
            candidate = assemble(model, spread, held, (*accepted, *guess))
            if works(candidate):
                accepted = (*accepted, *guess)
                break
        else:
            rejected.append(place)
    held = [*steered, *(pair for place in rejected for pair in _channels_at(spread, place))]
    return assemble(model, spread, held, accepted)


def _resolve_attributes(
    model: nn.Module,
    spread: ChannelPropagation,
    held: list[_Frozen],
    attributes: tuple[SizedAttribute, ...],
    works: Callable[[DependencyGraph], bool],
) -> list[_Frozen]:
    """The groups that can't be cut although every place with a size of its own is held.

    Found by halves: with one half of the groups held the other is tried.
    """

    def among(names: list[str], others: list[_Frozen]) -> list[_Frozen]:
        if works(assemble(model, spread, [*held, *others], attributes)):
            return []
        if len(names) == 1:
            return channels[names[0]]
        one, other = names[: len(names) // 2], names[len(names) // 2 :]
        behind = [pair for name in other for pair in channels[name]]
        found = among(one, [*others, *behind])
        return [*found, *among(other, [*others, *found])]

    groups = assemble(model, spread, held, attributes).groups
    channels = {name: [(group.channels, SIZE_ATTRIBUTE)] for name, group in groups.items()}
    return among(list(groups), []) if groups else []


def _size_uses(
    model: nn.Module, spread: ChannelPropagation
) -> tuple[tuple[SizedAttribute, ...], list[_SizeUse]]:
    """Attributes that are known to hold a size, and the places that are not understood yet."""
    known: list[SizedAttribute] = []
    places: dict[tuple[str, str, int], list[Node]] = {}
    ordinal: dict[tuple[str, str], itertools.count[int]] = {}
    for node in spread.graph.nodes:
        if node.op != "call_function":
            continue
        path, module = _owner(model, node)
        own = _sizes_in_module(spread, node, path, module)
        known += own
        if node in spread.resizes and not own:
            name = operation_name(node)
            call = f"{path}:{_call_number(node)}"
            number = next(ordinal.setdefault((call, name), itertools.count()))
            places.setdefault((type(module).__qualname__, name, number), []).append(node)
    return tuple(known), [_SizeUse(kind, tuple(nodes)) for kind, nodes in places.items()]


def _sizes_in_module(
    spread: ChannelPropagation, node: Node, path: str, module: nn.Module
) -> list[SizedAttribute]:
    """The attributes of one of torch's own modules that its operation takes sizes from."""
    name, resize = operation_name(node), spread.resizes.get(node)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        ids = spread.axes[node][1] if name in ("batch_norm", "instance_norm") else None
        if ids is not None:
            return [_counted(path, "num_features", ids)]
    elif resize is not None:
        if isinstance(module, nn.modules.conv._ConvNd) and name.startswith("conv"):
            return [_argument(path, "groups", None, resize, position_of(node, "groups"), None)]
        if isinstance(module, nn.GroupNorm) and name == "group_norm":
            position = position_of(node, "num_groups")
            return [_argument(path, "num_groups", None, resize, position, None)]
        if isinstance(module, nn.LayerNorm | nn.RMSNorm) and name in ("layer_norm", "rms_norm"):
            position = position_of(node, "normalized_shape")
            return [
                _argument(path, "normalized_shape", place, resize, position, place)
                for place in range(len(module.normalized_shape))
            ]
    return []


def _counted(path: str, name: str, ids: Ids) -> SizedAttribute:
    return SizedAttribute(path, name, None, lambda count: count(ids, len(ids)))


def _argument(
    path: str, name: str, index: int | None, resize: Resize, position: int, element: int | None
) -> SizedAttribute:
    """An attribute that holds an operation's argument, or an element of it."""

    def size(count: Count) -> int:
        value = resize(count)[position]
        return int(value if element is None else value[element])

    return SizedAttribute(path, name, index, size)


def _owner(model: nn.Module, node: Node) -> tuple[str, nn.Module]:
    """The innermost module that an operation was called in, containers left out."""
    found: tuple[str, nn.Module] = ("", model)
    for path in _modules_of(node):
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        if type(module) not in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
            found = (path, module)
    return found


def _modules_of(node: Node) -> Iterable[str]:
    """Dotted names of the modules that an operation was called in, the outermost first."""
    stack: dict[str, str] = node.meta.get("nn_module_stack", {})
    return stack.values()


def _call_number(node: Node) -> str:
    """Tells several calls of one module apart."""
    return ",".join(node.meta.get("nn_module_stack", {}))


def _active(dependencies: DependencyGraph, places: list[_SizeUse]) -> list[_SizeUse]:
    """The places whose sizes a trial cut changes."""
    whole = dependencies.sizes_after({})
    after = [
        dependencies.sizes_after(removed) for removed in test_cuts(dependencies, thorough=True)
    ]
    return [
        place
        for place in places
        if any(sizes[node] != whole[node] for node in place.nodes for sizes in after)
    ]


def _candidate_attributes(
    model: nn.Module, dependencies: DependencyGraph, place: _SizeUse
) -> list[tuple[SizedAttribute, ...]]:
    """Attributes that may hold the sizes of a place's operations: all that fit, then each alone."""
    found: dict[tuple[str, int | None], list[SizedAttribute]] = {}
    for node in place.nodes:
        sizes = dependencies.resizes[node](dependencies.count_after({}))
        for position, value in sizes.items():
            wanted = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
            for element, size in wanted:
                if isinstance(size, int):
                    for attribute in _freezing(model, dependencies, node, position, element, size):
                        key = (attribute.name, attribute.index)
                        found.setdefault(key, []).append(attribute)
    if not found:
        return []
    everything = tuple(a for attributes in found.values() for a in attributes)
    single = [tuple(attributes) for attributes in found.values()]
    return [everything, *single] if len(single) > 1 else [everything]


def _freezing(
    model: nn.Module,
    dependencies: DependencyGraph,
    node: Node,
    position: int,
    element: int | None,
    size: int,
) -> list[SizedAttribute]:
    """Attributes of the operation's module, or of those around it, that hold a number."""
    path, _ = _owner(model, node)
    resize = dependencies.resizes[node]
    while True:
        module = model.get_submodule(path)
        found = [
            _argument(path, name, index, resize, position, element)
            for name, held in vars(module).items()
            if not name.startswith("_") and name != "training"
            for index, number in _numbers(held)
            if number == size and (element is None or index is None or index == element)
        ]
        if found or not path:
            return found
        path = path.rpartition(".")[0]


def _numbers(held: object) -> Iterable[tuple[int | None, int]]:
    if isinstance(held, int) and not isinstance(held, bool):
        return [(None, held)]
    if isinstance(held, list | tuple):
        return [
            (index, each)
            for index, each in enumerate(held)
            if isinstance(each, int) and not isinstance(each, bool)
        ]
    return []


def _channels_at(spread: ChannelPropagation, place: _SizeUse) -> list[_Frozen]:
    """The channels that a place's operations read, with the reason to hold them."""
    class_name, operation, _ = place.kind
    reason = CONSTANT_SIZE.format(operation=operation, module=class_name)
    return [
        (ids, reason)
        for node in place.nodes
        for source in node.all_input_nodes
        for ids in spread.axes.get(source, ())
        if ids is not None
    ]
