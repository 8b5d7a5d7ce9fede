"""Removes writes in place from a traced graph: every operation returns a new value instead."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.graph import Graph
from torch.fx.node import Node, map_arg

from secateur.graph.graph_edits import call_like
from secateur.graph.network_graph import (
    argument,
    first_input,
    gives_its_input,
    operation_name,
    schema_of_node,
)
from secateur.runtime.errors import TraceError
from secateur.runtime.torch_internals import OpOverload, schema_of

_ATEN = torch.ops.aten


def remove_writes(graph: Graph) -> None:
    """Turn `x.relu_()` into `y = x.relu()`, and use `y` in place of `x` from there on.

    A write into a view, such as `x[:, 0] = 0`, becomes a new value of the whole tensor, from which
    its views are taken again. Raises `TraceError` if that value can't be put together.
    """
    written: set[Node] = set()
    position = {node: number for number, node in enumerate(graph.nodes)}
    has_new_views = False
    for node in list(graph.nodes):
        target = node.target
        if not isinstance(target, OpOverload) or not schema_of(target).is_mutable:
            continue
        changed = _changed_values(node)
        for value, new in zip(changed, _new_values(graph, node, changed), strict=True):
            written.add(new)
            new = _with_type_of(graph, new, value)
            if torch.Tag.inplace_view not in target.tags:  # such as squeeze_(): another shape
                new = _with_memory_of(value, new)
            written.add(new)
            others = _views_of(_base_of(value, written), written)
            others = [view for view in others if position.get(view, -1) < position[node]]
            if any(_is_read_after(node, view, position) for view in others if view is not value):
                result = _replace_all_views(graph, node, value, new, written)
                has_new_views = True
                position = {n: number for number, n in enumerate(graph.nodes)}
            else:
                result = new
                _replace_after(node, value, new, position)
            if len(changed) == 1 and node.target is not target and result is not node:
                # What the operation itself returned.
                for user in [user for user in node.users if user in position]:
                    if position[user] > position.get(result, position[node]):
                        user.replace_input_with(node, result)
    if has_new_views:
        graph.eliminate_dead_code()


def _changed_values(node: Node) -> list[Node]:
    """Return the values that an operation writes into, in the order of what it returns."""
    changed: list[Node] = []
    for index, parameter in enumerate(schema_of_node(node).arguments):
        value = node.kwargs.get(parameter.name)
        if value is None and index < len(node.args):
            value = node.args[index]
        if _is_written(parameter) and isinstance(value, Node):
            changed.append(value)
    return changed


def _is_written(parameter: Any) -> bool:
    return parameter.alias_info is not None and parameter.alias_info.is_write


def _new_values(graph: Graph, node: Node, changed: list[Node]) -> list[Node]:
    """Return what an operation makes of the values that it writes into, and leave these alone.

    The operation is replaced by the one that returns what this one writes. If there is none, it
    writes into copies.
    """
    schema = schema_of_node(node)
    name = schema.name.split("::")[1]
    outs = {p.name for p in schema.arguments if _is_written(p) and p.kwarg_only}
    packet = getattr(torch.ops.aten, name if outs else name.removesuffix("_"), None)
    # Only the types: `dropout_(self, …)` is `dropout(input, …)` elsewhere.
    wanted = [str(p.type) for p in schema.arguments if p.name not in outs]
    overloads = [schema.overload_name or "default", *(packet.overloads() if packet else [])]
    for overload in overloads:
        variant = getattr(packet, overload, None)
        if variant is None or schema_of(variant).is_mutable:
            continue
        if [str(parameter.type) for parameter in schema_of(variant).arguments] == wanted:
            node.target = variant
            node.kwargs = {name: v for name, v in node.kwargs.items() if name not in outs}
            count = len(changed)
            return [node] if count == 1 else [_item_of(graph, node, i) for i in range(count)]
    with graph.inserting_before(node):
        copies = {value: call_like(graph, node, _ATEN.clone.default, value) for value in changed}
    for value, copied in copies.items():
        node.replace_input_with(value, copied)
    return list(copies.values())


def _item_of(graph: Graph, node: Node, number: int) -> Node:
    with graph.inserting_after(node):
        item = graph.call_function(operator.getitem, (node, number))
    item.meta = {**node.meta, "val": node.meta["val"][number]}
    return item


_BOOLEAN = frozenset({"eq", "ne", "gt", "ge", "lt", "le"})


def _with_type_of(graph: Graph, new: Node, value: Node) -> Node:
    """Return a new value in the type of the tensor that it was written into."""
    tensors = [source.meta["val"] for source in new.all_input_nodes]
    types = {tensor.dtype for tensor in tensors if isinstance(tensor, Tensor)}
    dtype = value.meta["val"].dtype
    name = operation_name(new)
    if types <= {dtype} and name not in _BOOLEAN and "logical" not in name:
        return new
    if new.target is operator.getitem:
        return new
    args, kwargs = map_arg((new.args, new.kwargs), lambda source: source.meta["val"])
    with value.meta["val"].fake_mode, torch.no_grad():
        new.meta["val"] = new.target(*args, **kwargs)  # type: ignore[operator]
    if new.meta["val"].dtype == dtype:
        return new
    with graph.inserting_after(new):
        return call_like(graph, new, _ATEN.to.dtype, new, dtype)


def _viewed(node: Node, written: set[Node]) -> Node | None:
    """Return the value that a node's value is a view of."""
    if node in written or node.op != "call_function" or not node.args:
        return None
    source = node.args[0]
    if node.target is operator.getitem:
        source = source.args[0] if isinstance(source, Node) and source.args else None
    if not isinstance(source, Node):
        return None
    if gives_its_input(node):
        return source
    value, before = node.meta.get("val"), source.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(before, Tensor):
        return None
    return source if value.untyped_storage() is before.untyped_storage() else None


def _base_of(node: Node, written: set[Node]) -> Node:
    while (source := _viewed(node, written)) is not None:
        node = source
    return node


def _views_of(base: Node, written: set[Node]) -> list[Node]:
    """Return a value and all views of it, each behind what it is a view of."""
    views, pending = [base], [base]
    while pending:
        source = pending.pop(0)
        users = list(source.users)
        users += [item for user in users for item in user.users if item.target is operator.getitem]
        new = [user for user in users if _viewed(user, written) is source and user not in views]
        views += new
        pending += new
    return views


def _is_read_after(write: Node, value: Node, position: dict[Node, int]) -> bool:
    return any(position.get(user, -1) > position[write] for user in value.users)


def _replace_after(write: Node, value: Node, new: Node, position: dict[Node, int]) -> None:
    for user in list(value.users):
        if user is not new and position.get(user, -1) > position[write]:
            user.replace_input_with(value, new)


def _replace_all_views(
    graph: Graph, write: Node, value: Node, new: Node, written: set[Node]
) -> Node:
    """Use new values of a tensor and of all its views behind a write into one of them.

    Returns the view that was written into, taken from the new value.
    """
    position = {node: number for number, node in enumerate(graph.nodes)}
    base = _base_of(value, written)
    views = [view for view in _views_of(base, written) if position[view] <= position[write]]
    last, current, whole = max(new, write, key=position.__getitem__), value, new
    added: list[Node] = []

    def add(target: Any, *args: Any) -> Node:
        nonlocal last
        with graph.inserting_after(last):
            last = call_like(graph, write, target, *args)
        added.append(last)
        return last

    while (source := _viewed(current, written)) is not None:
        whole = _put_back(add, current, source, whole)
        written.add(whole)
        current = source
    replacements = {base: _with_memory_of(base, whole)}

    def replacement(view: Node) -> Node:
        """Return a view, taken from the new value."""
        if view not in replacements:
            source = _viewed(view, written)
            assert source is not None
            new = replacement(source)
            if view.target is operator.getitem:
                pieces = first_input(view)
                new = add(operator.getitem, add(pieces.target, new, *pieces.args[1:]), view.args[1])
            elif not gives_its_input(view):
                new = add(view.target, new, *view.args[1:])
            replacements[view] = _with_memory_of(view, new)
        return replacements[view]

    for view in views:
        users = [user for user in view.users if position.get(user, -1) > position[write]]
        for user in users:
            user.replace_input_with(view, replacement(view))
    return replacement(value)


def _with_memory_of(node: Node, new: Node) -> Node:
    """Return a new node with another one's value, whose memory tells what its views are."""
    new.meta["val"] = node.meta["val"]
    return new


def _put_back(add: Callable[..., Node], view: Node, source: Node, new: Node) -> Node:
    """Return the source of a view with a new value of the view in it."""
    name = operation_name(view)
    if view.target is operator.getitem:
        return _put_back_piece(add, view, source, new)
    if gives_its_input(view) or name in ("alias", "detach", "contiguous", "to", "lift_fresh"):
        return new
    if name in ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view"):
        return add(_ATEN.reshape_as.default, new, source)
    if name in ("view_as", "reshape_as"):
        return add(_ATEN.reshape_as.default, new, source)
    if name == "transpose":
        return add(_ATEN.transpose.int, new, *view.args[1:])
    if name == "t":
        return add(_ATEN.t.default, new)
    if name == "permute":
        order = np.argsort([dim % len(argument(view, "dims")) for dim in argument(view, "dims")])
        return add(_ATEN.permute.default, new, order.tolist())
    if name in _SCATTERS:
        return add(_SCATTERS[name], source, new, *view.args[1:])
    if name == "view_as_real":
        return add(_ATEN.view_as_complex.default, new)
    raise TraceError(f"the network writes in place into what {name!r} returns")


_SCATTERS: dict[str, Callable[..., Any]] = {
    "slice": _ATEN.slice_scatter.default,
    "select": _ATEN.select_scatter.default,
    "diagonal": _ATEN.diagonal_scatter.default,
    "as_strided": _ATEN.as_strided_scatter.default,
}


def _put_back_piece(add: Callable[..., Node], view: Node, source: Node, new: Node) -> Node:
    """Return the source of one of an operation's several views with a new value in its place."""
    pieces, number = first_input(view), view.args[1]
    assert isinstance(number, int)
    dim = argument(pieces, "dim", 0)
    if operation_name(pieces) == "unbind":
        return add(_ATEN.select_scatter.default, source, new, dim, number)
    sizes = [int(piece.shape[dim]) for piece in pieces.meta["val"]]
    start = sum(sizes[:number])
    return add(_ATEN.slice_scatter.default, source, new, dim, start, start + sizes[number])
