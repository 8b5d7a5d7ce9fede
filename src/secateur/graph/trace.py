"""Traces a network into a graph of ATen operations that runs with any set of parameters.

`interpreter` runs the graph with parameters that are passed in by name. So one graph serves the
original network, the same network with smaller kernels, and the network with masked channels.
"""

from __future__ import annotations

import gc
import inspect
import itertools
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.graph import Graph
from torch.fx.node import Node

from secateur.graph.branches import both_branches
from secateur.graph.call_sites import RecordCallSites, call_site, note_module, raised_at
from secateur.graph.constant_values import ConstantReadingMode
from secateur.graph.module_state import copy_of, evaluating, tensors_of
from secateur.graph.network_graph import NetworkGraph
from secateur.graph.products import products_as_layers
from secateur.graph.rules import RULES
from secateur.graph.unknown_sizes import replace_unknown_sizes
from secateur.graph.writes import remove_writes
from secateur.runtime.errors import TraceError
from secateur.runtime.torch_internals import (
    VALUES_NEEDED,
    FakeTensor,
    OpOverload,
    ShapeEnv,
    composite_operations,
    fake_of,
    is_composite,
    is_pointwise,
    make_fx,
    preserve_node_meta,
    schema_of,
    set_module_stack,
    share_parameters_with_recurrent_layer,
    tracing_quietly,
    tree_leaves,
)

READS_VALUES = "its code reads a number, or branches, on values computed from the images"
NO_VALUES = "choose by torch.where or torch.cond, or pass a forward= that leaves this out"
BATCH_SIZES = (7919, 7907, 7901, 7883, 7879, 7877)
"""Batch sizes to trace with: primes, so that hardly any other size is a multiple."""


def trace(
    model: nn.Module,
    example: Tensor,
    whole: Iterable[str] = RULES.keys(),
    *,
    records_modules: bool = True,
) -> NetworkGraph:
    """Return the graph of `model` in evaluation mode, for batches of any size.

    `example` is a batch `[image, channel, …]`; only the shape of an image matters. Operations that
    torch composes of others are replaced by these, unless they are among `whole`: those that have a
    rule. Without `records_modules` the graph does not say in which module an operation is called.
    Raises `TraceError` if the network can't be traced.

    The operations are those of `torch.export`; this is its tracer without the rest of an export,
    which takes longer than the tracing. Instead of a symbol, the batch has a size that divides no
    other one (`NetworkGraph.images`): sizes that depend on the batch are its multiples.
    """
    whole = frozenset(whole)
    images = _batch_size(model, example)
    try:
        with _without_collection():
            record = partial(_record, model, example, images, records_modules)
            module, names = _recorded(record, whole)
    except TraceError:
        raise
    except Exception as error:  # the network is the user's: it may raise anything
        raise _trace_error(error) from error
    graph = module.graph
    _drop_context_switches(graph)
    replace_unknown_sizes(graph)
    remove_writes(graph)
    *placeholders, image = (node for node in graph.nodes if node.op == "placeholder")
    products_as_layers(graph, image)
    _open_batch(graph, image, images)
    nodes = tuple(graph.nodes)
    constants: dict[Node, Tensor] = {}
    for node in nodes:
        if node.op == "get_attr":
            constants[node] = getattr(module, str(node.target))
            if isinstance(constants[node], FakeTensor):
                raise TraceError(
                    "the network makes a tensor of values that the graph can't hold, and reads it "
                    f"in {call_site(next(iter(node.users), node))}"
                )
            _check_is_outside(constants[node], model)
            node.meta.setdefault("val", constants[node])  # torch 2.6 records none
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
    return NetworkGraph(nodes, tensor_names, constants, image, outputs, last_use, images, whole)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Inside the block, cyclic garbage is not collected.

    A trace makes many objects that stay; to look through all of them again and again took a quarter
    of its time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _is_pointwise(packet: Any) -> bool:
    overloads = (getattr(packet, overload) for overload in packet.overloads())
    return any(is_pointwise(operation) for operation in overloads)


_Names = dict[str, tuple[str, ...]]
"""Name of a parameter or buffer -> all its names, in the order of the graph's placeholders."""


def _recorded(
    record: Callable[[dict[OpOverload, Callable[..., Any]], bool], tuple[GraphModule, _Names]],
    whole: frozenset[str],
) -> tuple[GraphModule, _Names]:
    """Return what `record` does, with composite operations composed of others."""

    def is_replaced(operation: object) -> bool:
        if not isinstance(operation, OpOverload) or is_pointwise(operation):
            return False
        written = schema_of(operation).name.removeprefix("aten::")
        name = written if written.startswith("__") else written.removesuffix("_")
        if name != written:
            # What writes in place and has no other form would be composed by memory addresses.
            form = getattr(torch.ops.aten, name, None)
            if form is None or _is_pointwise(form):
                return False
        return name not in whole and is_composite(operation)

    def attempt(composed: dict[OpOverload, Callable[..., Any]]) -> tuple[GraphModule, _Names]:
        # Sizes that depend on values are rare, and to expect them takes longer.
        try:
            return record(composed, False)
        except VALUES_NEEDED:
            return record(composed, True)

    recorded = attempt({})
    # Most networks have none, and listing all that there are takes longer than a look for them.
    if any(is_replaced(node.target) for node in recorded[0].graph.nodes):
        return attempt({op: make for op, make in composite_operations().items() if is_replaced(op)})
    return recorded


def _record(
    model: nn.Module,
    example: Tensor,
    images: int,
    records_modules: bool,
    composed: dict[OpOverload, Callable[..., Any]],
    has_unknown_sizes: bool,
) -> tuple[GraphModule, _Names]:
    """Return what a network computes as a graph, and the names of the tensors that it reads."""
    # A copy, since a network may keep values that it computed, and here these are fake.
    model = copy_of(model, share_tensors=True)
    mode = ConstantReadingMode(images, ShapeEnv() if has_unknown_sizes else None)
    names, fakes, batch = _fake_inputs(model, example, images, mode)
    real_tensors = tensors_of(model)

    def body(tensors: list[Tensor], batch: Tensor) -> tuple[object, ...]:
        for name, tensor in zip(names, tensors, strict=True):
            mode.add(tensor, real_tensors[name])
        state = {
            alias: tensor
            for aliases, tensor in zip(names.values(), tensors, strict=True)
            for alias in aliases
        }
        with mode.reading_arrays(), RecordCallSites():
            output = torch.func.functional_call(model, state, (batch,), tie_weights=False)
        return tuple(tree_leaves(output))

    try:
        with (
            evaluating(model),
            torch.no_grad(),
            both_branches(),
            _recurrent_layers_sharing(model),
            _recording_modules(model) if records_modules else nullcontext(),
            tracing_quietly(),
            mode,
        ):
            # The tensors are fake already; in the mode "fake" each would be copied.
            module = make_fx(
                body,
                decomposition_table=composed,
                tracing_mode="real",
                pre_dispatch=True,
                _error_on_data_dependent_ops=False,
            )(fakes, batch)
    except Exception as error:  # the network is the user's: it may raise anything
        note_module(error, model)
        raise
    finally:
        mode.forget_constants()
    return module, names


def _check_is_outside(constant: Tensor, model: nn.Module) -> None:
    """Raise `TraceError` if a constant is a kernel of the network that was copied for the trace."""
    for name, tensor in model.named_parameters():
        if tensor is constant and tensor.dim() > 1:
            raise TraceError(
                f"the network's code reads {name} of another object than the network that it is "
                "called for: a function that was assigned to .forward, or a hook, holds "
                "the network itself: make it a method of the class"
            )


def _batch_size(model: nn.Module, example: Tensor) -> int:
    """Return a prime that divides no size of the network or of its images."""
    shapes = [example.shape[1:], *(tensor.shape for tensor in tensors_of(model).values())]
    sizes = {size for shape in shapes for size in shape}
    for prime in BATCH_SIZES:
        if not any(size and size % prime == 0 for size in sizes):
            return prime
    raise TraceError(f"every batch size of {BATCH_SIZES} divides some size of the network")


def _fake_inputs(
    model: nn.Module, example: Tensor, images: int, mode: ConstantReadingMode
) -> tuple[dict[str, tuple[str, ...]], list[Tensor], Tensor]:
    """Return the aliases of each parameter and buffer by its first name, fakes of them, a batch."""
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
    fakes: list[Tensor] = [fake_of(named[name], mode) for name in names]
    with mode:
        batch = torch.empty(images, *example.shape[1:], dtype=example.dtype, device=example.device)
    return names, fakes, batch


@contextmanager
def _recurrent_layers_sharing(model: nn.Module) -> Iterator[None]:
    """Inside the block, recurrent layers read the parameters that they are called with."""
    hooks = [
        module.register_forward_pre_hook(
            lambda layer, _: share_parameters_with_recurrent_layer(layer)
        )
        for module in model.modules()
        if isinstance(module, nn.RNNBase)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
        set_module_stack(stack)

    def leave(*_: object) -> None:
        stack.popitem()
        set_module_stack(stack)

    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(partial(enter, name)))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        with preserve_node_meta():
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
            raise TraceError(
                "the network switches automatic mixed precision on by itself: take torch.autocast "
                "out of its forward (accelerate: unwrap_model(model, keep_fp32_wrapper=False))"
            )
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


def export_program(model: nn.Module, example: Sequence[Tensor]) -> ExportedProgram:
    """Return the `torch.export` program of `model` in evaluation mode, for batches of any size.

    Of `example`, the network's inputs, only the shape of an image matters. Raises `TraceError` with
    the cause.
    """
    # In memory of their own: compiled ahead of time, a program reads every batch as these lie.
    images = tuple(tensor[:1].expand(2, *tensor.shape[1:]).clone() for tensor in example)
    try:
        with evaluating(model), warnings.catch_warnings():
            # torch 2.6 says it of a network that runs through a user's function; newer ones log it.
            warnings.filterwarnings("ignore", "Unable to find the path of the module")
            return torch.export.export(
                model,
                images,
                dynamic_shapes=open_batch(model, torch.export.Dim.DYNAMIC, len(images)),
                strict=False,
            )
    except Exception as error:  # the network is the user's: it may raise anything
        raise _trace_error(error) from error


def open_batch(model: nn.Module, size: Any, count: int = 1) -> tuple[object, ...]:
    """Return the `dynamic_shapes` of `torch.export` for a network with so many inputs."""
    first = next(iter(inspect.signature(model.forward).parameters.values()))
    shapes = tuple({0: size} for _ in range(count))
    return (shapes,) if first.kind is first.VAR_POSITIONAL else shapes


def _trace_error(error: Exception) -> TraceError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    needs_values = isinstance(error, VALUES_NEEDED)
    cause = READS_VALUES if needs_values else lines[0]
    message = f"the network can't be traced with an open batch dimension: {cause}{raised_at(error)}"
    return TraceError(f"{message}: {NO_VALUES}" if needs_values else message)


def _name_arguments_by_position(node: Node) -> None:
    """Move arguments that were passed by name to their position in the operation's schema."""
    if not isinstance(node.target, OpOverload):
        return
    args, kwargs = list(node.args), dict(node.kwargs)
    for argument in schema_of(node.target).arguments[len(args) :]:
        if argument.kwarg_only or not kwargs:
            break
        args.append(kwargs.pop(argument.name, argument.default_value))
    node.args, node.kwargs = tuple(args), kwargs
