"""Traces a network into a graph of ATen operations that runs with any set of parameters.

`interpreter` runs the graph with parameters that are passed in by name. So one graph serves the
original network, the same network with smaller kernels, and the network with masked channels.
"""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import Graph
from torch.fx.node import Node
from torch.utils._pytree import tree_leaves

from secateur.graph.module_state import copy_of, evaluating, tensors_of
from secateur.graph.network_graph import NetworkGraph, is_view
from secateur.runtime.errors import TraceError

BATCH_SIZES = (7919, 7907, 7901, 7883, 7879, 7877)
"""Batch sizes to trace with: primes, so that hardly any other size is a multiple."""


def trace(model: nn.Module, example: Tensor) -> NetworkGraph:
    """Return the graph of `model` in evaluation mode, for batches of any size.

    `example` is a batch `[image, channel, …]`; only the shape of an image matters. Raises
    `TraceError` if the network can't be traced.

    The operations are those of `torch.export`; this is its tracer without the rest of an export,
    which takes longer than the tracing. Instead of a symbol, the batch has a size that divides no
    other one (`NetworkGraph.images`): sizes that depend on the batch are its multiples.
    """
    # A copy, since a network may keep values that it computed, and here these are fake.
    model = copy_of(model, share_tensors=True)
    images = _batch_size(model, example)
    names, fakes, batch = _fake_inputs(model, example, images)

    def body(tensors: list[Tensor], batch: Tensor) -> tuple[object, ...]:
        state = {
            alias: tensor
            for aliases, tensor in zip(names.values(), tensors, strict=True)
            for alias in aliases
        }
        output = torch.func.functional_call(model, state, (batch,), tie_weights=False)
        return tuple(tree_leaves(output))

    try:
        with evaluating(model), torch.no_grad(), _recording_modules(model), _tracing_quietly():
            module = make_fx(body, tracing_mode="fake", pre_dispatch=True)(fakes, batch)
    except Exception as error:  # the network is the user's: it may raise anything
        raise _trace_error(error) from error
    graph = module.graph
    _drop_context_switches(graph)
    _replace_in_place_operations(graph)
    *placeholders, image = (node for node in graph.nodes if node.op == "placeholder")
    _open_batch(graph, image, images)
    nodes = tuple(graph.nodes)
    constants: dict[Node, Tensor] = {}
    for node in nodes:
        if node.op == "get_attr":
            constants[node] = getattr(module, str(node.target))
            if isinstance(constants[node], FakeTensor):
                raise TraceError("the network makes a tensor of values that the graph can't hold")
        elif node.op == "call_function":
            _name_arguments_by_position(node)
    returned = nodes[-1].args[0]
    assert isinstance(returned, list | tuple)
    outputs = tuple(node for node in returned if isinstance(node, Node))
    if not outputs:
        raise TraceError("the network must return tensors")
    last_use: dict[Node, Node] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            last_use[source] = node
    tensor_names = dict(zip(placeholders, names, strict=True))
    return NetworkGraph(nodes, tensor_names, constants, image, outputs, last_use, images)


def _batch_size(model: nn.Module, example: Tensor) -> int:
    """Return a prime that divides no size of the network or of its images."""
    shapes = [example.shape[1:], *(tensor.shape for tensor in tensors_of(model).values())]
    sizes = {size for shape in shapes for size in shape}
    for prime in BATCH_SIZES:
        if not any(size and size % prime == 0 for size in sizes):
            return prime
    raise TraceError(f"every batch size of {BATCH_SIZES} divides some size of the network")


def _fake_inputs(
    model: nn.Module, example: Tensor, images: int
) -> tuple[dict[str, tuple[str, ...]], list[Tensor], Tensor]:
    """Return the aliases of each parameter and buffer by its first name, fakes of them, a batch."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    named = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    aliases: dict[int, list[str]] = {}
    seen: set[tuple[int, str]] = set()
    for name, tensor in named.items():
        path, _, attribute = name.rpartition(".")
        owner = (id(model.get_submodule(path)), attribute)
        if owner not in seen:  # a module under two names counts once
            seen.add(owner)
            aliases.setdefault(id(tensor), []).append(name)
    names = {same_tensor[0]: tuple(same_tensor) for same_tensor in aliases.values()}
    fakes: list[Tensor] = []
    with mode:
        for tensor in (named[name] for name in names):
            fake = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )
            is_parameter = isinstance(tensor, nn.Parameter)
            fakes.append(nn.Parameter(fake, requires_grad=False) if is_parameter else fake)
        batch = torch.empty(images, *example.shape[1:], dtype=example.dtype, device=example.device)
    return names, fakes, batch


@contextmanager
def _tracing_quietly() -> Iterator[None]:
    """Inside the block, run compiled parts uncompiled, and don't log errors that are raised."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        with torch._dynamo.config.patch(error_on_nested_fx_trace=False):
            yield
    finally:
        logger.disabled = was_disabled


@contextmanager
def _recording_modules(model: nn.Module) -> Iterator[None]:
    """Inside the block, record with every traced operation the modules that it is called in.

    `node.meta["nn_module_stack"]` is `{call: dotted name}`, the outermost module first.
    """
    stack: dict[str, str] = {}
    calls = itertools.count()
    hooks = []

    def enter(name: str, *_: object) -> None:
        stack[f"{name}@{next(calls)}"] = name
        traceback.current_meta["nn_module_stack"] = dict(stack)

    def leave(*_: object) -> None:
        stack.popitem()
        traceback.current_meta["nn_module_stack"] = dict(stack)

    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(partial(enter, name)))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        with traceback.preserve_node_meta():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _drop_context_switches(graph: Graph) -> None:
    """Remove operations that switch gradients or switch mixed precision off.

    Raises `TraceError` if the network switches mixed precision on by itself.
    """
    for node in reversed(graph.nodes):
        name = getattr(node.target, "__name__", "")
        if name == "_enter_autocast" and node.args[2]:
            raise TraceError("the network switches automatic mixed precision on by itself")
        if name in ("_enter_autocast", "_exit_autocast", "_set_grad_enabled"):
            graph.erase_node(node)


def _open_batch(graph: Graph, image: Node, images: int) -> None:
    """Replace every number that is a multiple of the traced batch size by the actual multiple."""
    with graph.inserting_after(image):
        size = graph.call_function(torch.ops.aten.sym_size.int, (image, 0))
    size.meta["val"] = images

    def opened(value: Any, before: Node) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(opened(item, before) for item in value)
        if type(value) is not int or value == 0 or value % images:
            return value
        if value == images:
            return size
        with graph.inserting_before(before):
            multiple = graph.call_function(operator.mul, (size, value // images))
        multiple.meta["val"] = value
        return multiple

    for node in list(graph.nodes):
        if node.op != "call_function" or node is size:
            continue
        node.args = tuple(opened(argument, node) for argument in node.args)
        node.kwargs = {name: opened(argument, node) for name, argument in node.kwargs.items()}
    if not size.users:
        graph.erase_node(size)


def export_program(model: nn.Module, example: Tensor) -> ExportedProgram:
    """Return the `torch.export` program of `model` in evaluation mode, for batches of any size.

    Of `example` only the shape of an image matters. Raises `TraceError` with the cause.
    """
    images = example[:1].expand(2, *example.shape[1:])
    try:
        with evaluating(model):
            return torch.export.export(
                model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
            )
    except Exception as error:  # the network is the user's: it may raise anything
        raise _trace_error(error) from error


def _trace_error(error: Exception) -> TraceError:
    cause = str(error).strip().splitlines() or [type(error).__name__]
    return TraceError(f"the network can't be traced with an open batch dimension: {cause[0]}")


def _name_arguments_by_position(node: Node) -> None:
    """Move arguments that were passed by name to their position in the operation's schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    args, kwargs = list(node.args), dict(node.kwargs)
    for argument in node.target._schema.arguments[len(args) :]:
        if argument.kwarg_only or not kwargs:
            break
        args.append(kwargs.pop(argument.name, argument.default_value))
    node.args, node.kwargs = tuple(args), kwargs


def _replace_in_place_operations(graph: Graph) -> None:
    """Turn `x.relu_()` into `y = x.relu()`, and use `y` in place of `x` from there on.

    Raises `TraceError` if another view of `x` would have to show the change, or if an operation has
    no variant that leaves its input alone.
    """
    position = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
            continue
        name = target._schema.name.split("::")[1]
        packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
        variant = getattr(packet, target._overloadname, None)
        changed = node.args[0]
        if not name.endswith("_") or variant is None or not isinstance(changed, Node):
            raise TraceError(f"the operation {name!r} writes in place and has no other form")
        others = _sharing_memory(changed) - {changed}
        if any(position[user] > position[node] for value in others for user in value.users):
            raise TraceError(f"the operation {name!r} writes into a view of a value still in use")
        node.target = variant
        for user in list(changed.users):
            if position[user] > position[node]:
                user.replace_input_with(changed, node)


def _sharing_memory(node: Node) -> set[Node]:
    """Return the values that share memory with a node's: its base, and all views of that."""
    while is_view(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    sharing, pending = {node}, [node]
    while pending:
        views = [user for user in pending.pop().users if is_view(user)]
        pending += views
        sharing.update(views)
    return sharing
