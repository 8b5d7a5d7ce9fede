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
from torch import Tensor, nn
from torch.fx.node import Node

from secateur.channels import ChannelSpread, Count, Ids, position_of
from secateur.errors import TraceError
from secateur.graph import Forward, Sizes, operation_name, trace
from secateur.surgery import SizeConflict, cut
from secateur.wiring import SizedAttribute, Wiring, assemble

BAKED = "sized by a number in the network's code ({operation} in {module})"

MAX_HIDDEN = 8
"""How many classes of modules may work out sizes in a way that is not understood."""

_OWN_SIZES = (
    nn.modules.conv._ConvNd,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
)
"""Modules whose sizes `surgery` knows how to correct."""


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
    active = [place for place in places if _changes(wiring, place)]
    if not active and not any(map(_has_own_sizes, spread.graph.nodes)):
        return wiring

    def failure(candidate: Wiring) -> _Failure | None:
        return _try_out(model, example, forward, candidate)

    if failure(wiring) is None:
        return wiring
    guesses = {place.kind: _guesses(model, wiring, place) for place in active}
    together = tuple(a for options in guesses.values() for a in (options[:1] or [()])[0])
    hidden: list[tuple[Ids, str]] = []
    if together:
        wiring = assemble(model, spread, attributes=(*known, *together))
        if failure(wiring) is None:
            return wiring
    all_held = [pair for place in active for pair in _channels_at(spread, place)]
    for _ in range(MAX_HIDDEN):
        failed = failure(assemble(model, spread, [*all_held, *hidden], known))
        if failed is None:
            break
        hidden += _channels_in(model, spread, failed.module)
    if hidden:
        wiring = assemble(model, spread, hidden, (*known, *together))
        if failure(wiring) is None:
            return wiring
    accepted = known
    rejected: list[_Place] = []
    for number, place in enumerate(active):
        waiting = [*rejected, *active[number + 1 :]]
        for guess in [(), *guesses[place.kind]]:
            held = [pair for other in waiting for pair in _channels_at(spread, other)]
            candidate = assemble(model, spread, [*hidden, *held], (*accepted, *guess))
            if failure(candidate) is None:
                accepted = (*accepted, *guess)
                break
        else:
            rejected.append(place)
    held = [pair for place in rejected for pair in _channels_at(spread, place)]
    return assemble(model, spread, [*hidden, *held], accepted)


def _has_own_sizes(node: Node) -> bool:
    """Whether an operation takes a size from a plain number, which may depend on channels."""
    name = operation_name(node) if node.op == "call_function" else ""
    if name in _MAKING:
        return True
    return name in _RESHAPING and any(
        isinstance(size, int) and size > 1
        for argument in node.args[1:]
        if isinstance(argument, list | tuple)
        for size in argument
    )


_MAKING = {"zeros", "ones", "full", "empty", "arange", "eye", "new_zeros", "new_ones", "new_full"}
_RESHAPING = {"view", "reshape", "expand", "repeat", "tile", "unflatten", "_unsafe_view"}


def _sized_places(
    model: nn.Module, spread: ChannelSpread
) -> tuple[tuple[SizedAttribute, ...], list[_Place]]:
    """Attributes that are known to hold a size, and the places that are not understood yet."""
    known: list[SizedAttribute] = []
    places: dict[tuple[str, str, int], list[Node]] = {}
    ordinal: dict[tuple[str, str], itertools.count[int]] = {}
    for node in spread.resizes:
        path, module = _owner(model, node)
        name = operation_name(node)
        if isinstance(module, _OWN_SIZES):
            attribute = "num_groups" if name == "group_norm" else "groups"
            if name == "group_norm" or name.startswith("conv"):
                position = 1 if name == "group_norm" else position_of(node, "groups")
                known.append(SizedAttribute(path, attribute, None, node, position, None))
            continue
        call = f"{path}:{_call_number(node)}"
        number = next(ordinal.setdefault((call, name), itertools.count()))
        places.setdefault((type(module).__qualname__, name, number), []).append(node)
    return tuple(known), [_Place(kind, tuple(nodes)) for kind, nodes in places.items()]


def _owner(model: nn.Module, node: Node) -> tuple[str, nn.Module]:
    """The innermost module that an operation was called in, containers left out."""
    found: tuple[str, nn.Module] = ("", model)
    for path in _modules_of(node):
        module = _submodule(model, path)
        if module is not None and type(module) not in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
            found = (path, module)
    return found


def _modules_of(node: Node) -> Iterable[str]:
    """Dotted names of the modules that an operation was called in, the outermost first."""
    stack: dict[str, str] = node.meta.get("nn_module_stack", {})
    return stack.values()


def _call_number(node: Node) -> str:
    """Tells several calls of one module apart."""
    return ",".join(node.meta.get("nn_module_stack", {}))


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


@dataclass(frozen=True)
class _Failure:
    """A trial cut that did not give what was foretold."""

    module: str
    """Dotted name of the module in which the first difference, or an error, came up."""


def _try_out(
    model: nn.Module, example: Tensor, forward: Forward | None, wiring: Wiring
) -> _Failure | None:
    """Whether a trial cut, traced again, gives the same operations with the foretold sizes."""
    removed = _trial(wiring)
    try:
        smaller = cut(model, wiring, removed)
        graph = trace(smaller, example, forward)
    except SizeConflict:
        return _Failure("")
    except TraceError as error:
        return _Failure(_module_of(error, smaller))
    before = [node for node in wiring.graph.nodes if node.op == "call_function"]
    after = [node for node in graph.nodes if node.op == "call_function"]
    count, sizes = wiring.count_after(removed), wiring.sizes_after(removed)
    for node, twin in itertools.zip_longest(before, after):
        if node is None or twin is None or not _is_twin(node, twin, wiring, count, sizes):
            return _Failure(_owner(model, node or twin)[0])
    return None


def _is_twin(node: Node, twin: Node, wiring: Wiring, count: Count, sizes: Sizes) -> bool:
    """Whether an operation of the cut network is the original's with the foretold sizes."""
    if node.target is not twin.target:
        return False
    found = twin.meta.get("val")
    if isinstance(found, Tensor) and node in wiring.axes:
        expected = map(count, wiring.axes[node], node.meta["val"].shape)
        if [str(size) for size in found.shape] != [str(size) for size in expected]:
            return False
    changed = sizes.get(node, {}).items()
    return all(
        position >= len(twin.args) or _is_same(twin.args[position], value)
        for position, value in changed
    )


def _module_of(error: TraceError, model: nn.Module) -> str:
    """The innermost module of the network's own code in which an error came up."""
    names = {id(module): name for name, module in model.named_modules()}
    cause = error.__cause__
    traceback = None if cause is None else cause.__traceback__
    found = ""
    while traceback is not None:
        module = traceback.tb_frame.f_locals.get("self")
        if id(module) in names and not type(module).__module__.startswith("torch.nn."):
            found = names[id(module)]
        traceback = traceback.tb_next
    return found


def _is_same(found: object, expected: object) -> bool:
    """Whether two arguments hold the same numbers; symbols and open ends are not compared."""
    if isinstance(found, Sequence) and isinstance(expected, Sequence):
        return len(found) == len(expected) and all(map(_is_same, found, expected))
    if isinstance(found, int) and isinstance(expected, int):
        return found == expected or found == -1 or found >= 2**31
    return True


def _guesses(model: nn.Module, wiring: Wiring, place: _Place) -> list[tuple[SizedAttribute, ...]]:
    """Attributes that may hold the sizes of a place's operations: all that fit, then each alone."""
    found: dict[tuple[str, int | None], list[SizedAttribute]] = {}
    for node in place.nodes:
        sizes = wiring.resizes[node](wiring.count_after({}))
        for position, value in sizes.items():
            wanted = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
            for element, size in wanted:
                if isinstance(size, int):
                    for attribute in _holding(model, node, position, element, size):
                        key = (attribute.name, attribute.index)
                        found.setdefault(key, []).append(attribute)
    if not found:
        return []
    everything = tuple(a for attributes in found.values() for a in attributes)
    single = [tuple(attributes) for attributes in found.values()]
    return [everything, *single] if len(single) > 1 else [everything]


def _holding(
    model: nn.Module, node: Node, position: int, element: int | None, size: int
) -> list[SizedAttribute]:
    """Attributes of the operation's module, or of those around it, that hold a number."""
    path, _ = _owner(model, node)
    while True:
        module = model.get_submodule(path)
        found = [
            SizedAttribute(path, name, index, node, position, element)
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


def _channels_in(model: nn.Module, spread: ChannelSpread, name: str) -> list[tuple[Ids, str]]:
    """The channels that all modules of one class read or compute, with the reason to hold them."""
    kind = type(model.get_submodule(name))
    reason = f"sizes that the code of {kind.__qualname__} works out in a way of its own"
    inside = [
        node
        for node in spread.graph.nodes
        if node.op == "call_function"
        and any(type(_submodule(model, path)) is kind for path in _modules_of(node))
    ]
    return [
        (ids, reason)
        for node in inside
        for value in (node, *node.all_input_nodes)
        for ids in spread.axes.get(value, ())
        if ids is not None and value not in spread.graph.tensor_names
    ]


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
