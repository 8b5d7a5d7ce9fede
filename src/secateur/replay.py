"""Whether a cut network is what its wiring says: it is traced again and compared.

The traced graph holds sizes as plain numbers, and does not say where they come from: a view to
`[-1, 2, 58, 28, 28]` may be computed from the input's shape, taken from an attribute of a module,
or written in the code. So a trial cut is made and traced: if every operation gives the size that
was foretold the sizes follow by themselves. If not, attributes of the modules concerned that hold
the old number are given the new one, and it is tried again. What still does not come out right is
frozen.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.node import Node

from secateur.channels import ChannelSpread, Count, Ids, Resize, position_of
from secateur.errors import TraceError
from secateur.graph import Forward, operation_name, trace
from secateur.surgery import SizeConflict, attribute_values, cut
from secateur.wiring import SizedAttribute, Wiring, assemble

BAKED = "sized by a number in the network's code ({operation} in {module})"

@dataclass(frozen=True, eq=False)
class _Place:
    """The n-th operation with a size of its own in every module of one class."""

    kind: tuple[str, str, int]
    nodes: tuple[Node, ...]


def settle(
    model: nn.Module, example: Tensor, forward: Forward | None, spread: ChannelSpread
) -> Wiring:
    """The wiring with every channel frozen whose sizes don't follow a cut."""
    known, places = _sized_places(model, spread)
    wiring = assemble(model, spread, attributes=known)

    def works(candidate: Wiring) -> bool:
        return _is_foretold(model, example, forward, candidate)

    active = [place for place in places if _changes(wiring, place)]
    if not active or works(wiring):
        return wiring
    guesses = {place.kind: _guesses(model, wiring, place) for place in active}
    together = tuple(a for options in guesses.values() for a in (options[:1] or [()])[0])
    wiring = assemble(model, spread, attributes=(*known, *together))
    if works(wiring):
        return wiring
    accepted = known
    rejected: list[_Place] = []
    for number, place in enumerate(active):
        waiting = [*rejected, *active[number + 1 :]]
        for guess in [(), *guesses[place.kind]]:
            held = [pair for other in waiting for pair in _channels_at(spread, other)]
            candidate = assemble(model, spread, held, (*accepted, *guess))
            if works(candidate):
                accepted = (*accepted, *guess)
                break
        else:
            rejected.append(place)
    held = [pair for place in rejected for pair in _channels_at(spread, place)]
    return assemble(model, spread, held, accepted)


def _sized_places(
    model: nn.Module, spread: ChannelSpread
) -> tuple[tuple[SizedAttribute, ...], list[_Place]]:
    """Attributes that are known to hold a size, and the places that are not understood yet."""
    known: list[SizedAttribute] = []
    places: dict[tuple[str, str, int], list[Node]] = {}
    ordinal: dict[tuple[str, str], itertools.count[int]] = {}
    for node in spread.graph.nodes:
        if node.op != "call_function":
            continue
        path, module = _owner(model, node)
        own = _own_sizes(spread, node, path, module)
        known += own
        if node in spread.resizes and not own:
            name = operation_name(node)
            call = f"{path}:{_call_number(node)}"
            number = next(ordinal.setdefault((call, name), itertools.count()))
            places.setdefault((type(module).__qualname__, name, number), []).append(node)
    return tuple(known), [_Place(kind, tuple(nodes)) for kind, nodes in places.items()]


def _own_sizes(
    spread: ChannelSpread, node: Node, path: str, module: nn.Module
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
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        if type(module) not in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
            found = (path, module)
    return found


def _call_number(node: Node) -> str:
    """Tells several calls of one module apart."""
    return ",".join((node.meta.get("nn_module_stack") or {}))


def _trial(wiring: Wiring) -> dict[str, tuple[int, ...]]:
    """A cut of about half of the channels of each group, always the same."""
    generator = np.random.default_rng(0)
    removed: dict[str, tuple[int, ...]] = {}
    gone: set[int] = set()
    covers: dict[int, list[set[int]]] = {}
    for cover in wiring.covers:
        members = set(cover.tolist())
        for channel in members:
            covers.setdefault(channel, []).append(members)
    for name, group in wiring.groups.items():
        chosen: list[int] = []
        for place in generator.permutation(len(group)).tolist():
            channel = int(group.channels[place])
            if len(chosen) < len(group) // 2 and not any(
                cover <= gone | {channel} for cover in covers.get(channel, ())
            ):
                gone.add(channel)
                chosen.append(place)
        if chosen:
            removed[name] = tuple(sorted(chosen))
    return removed


def _changes(wiring: Wiring, place: _Place) -> bool:
    count, whole = wiring.count_after(_trial(wiring)), wiring.count_after({})
    return any(wiring.resizes[n](count) != wiring.resizes[n](whole) for n in place.nodes)


def _is_foretold(
    model: nn.Module, example: Tensor, forward: Forward | None, wiring: Wiring
) -> bool:
    """Whether a trial cut, traced again, gives the same operations with the foretold sizes."""
    removed = _trial(wiring)
    try:
        graph = trace(cut(model, wiring, removed), example, forward)
    except (TraceError, SizeConflict):
        return False
    count, sizes = wiring.count_after(removed), wiring.sizes_after(removed)
    before = [node for node in wiring.graph.nodes if node.op == "call_function"]
    after = [node for node in graph.nodes if node.op == "call_function"]
    if len(before) != len(after):
        return False
    for node, twin in zip(before, after, strict=True):
        if node.target is not twin.target:
            return False
        found = twin.meta.get("val")
        if isinstance(found, Tensor) and node in wiring.axes:
            shape = node.meta["val"].shape
            expected = [
                count(ids, size) if ids is not None else size
                for ids, size in zip(wiring.axes[node], shape, strict=True)
            ]
            if [str(size) for size in found.shape] != [str(size) for size in expected]:
                return False
        for position, value in sizes.get(node, {}).items():
            if position < len(twin.args) and not _is_same(twin.args[position], value):
                return False
    return True


def _is_same(found: object, expected: object) -> bool:
    """Whether two arguments hold the same numbers; symbols and open ends are not compared."""
    if isinstance(found, Sequence) and isinstance(expected, Sequence):
        return len(found) == len(expected) and all(map(_is_same, found, expected))
    if isinstance(found, int) and isinstance(expected, int):
        return found == expected or found == -1 or found >= 2**31
    return True


def _guesses(
    model: nn.Module, wiring: Wiring, place: _Place
) -> list[tuple[SizedAttribute, ...]]:
    """Which attributes may hold the sizes of a place's operations: all that fit, then each alone."""
    found: dict[tuple[str, int | None], list[SizedAttribute]] = {}
    for node in place.nodes:
        sizes = wiring.resizes[node](wiring.count_after({}))
        for position, value in sizes.items():
            wanted = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
            for element, size in wanted:
                if isinstance(size, int):
                    for attribute in _holding(model, wiring, node, position, element, size):
                        key = (attribute.name, attribute.index)
                        found.setdefault(key, []).append(attribute)
    if not found:
        return []
    everything = tuple(a for attributes in found.values() for a in attributes)
    single = [tuple(attributes) for attributes in found.values()]
    return [everything, *single] if len(single) > 1 else [everything]


def _holding(
    model: nn.Module, wiring: Wiring, node: Node, position: int, element: int | None, size: int
) -> list[SizedAttribute]:
    """Attributes of the operation's module, or of those around it, that hold a number."""
    path, _ = _owner(model, node)
    resize = wiring.resizes[node]
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


def _channels_at(spread: ChannelSpread, place: _Place) -> list[tuple[Ids, str]]:
    """The channels that a place's operations read, with the reason to hold them."""
    class_name, operation, _ = place.kind
    reason = BAKED.format(operation=operation, module=class_name)
    return [
        (ids, reason)
        for node in place.nodes
        for source in node.all_input_nodes
        for ids in spread.axes.get(source, ())
        if ids is not None
    ]
