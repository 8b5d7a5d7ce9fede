"""Export a network as a program: the operations of `torch.export`, translated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.node import Node

from secateur.experiments.program import (
    ARITHMETIC,
    DEVICE,
    OPERATIONS,
    Operation,
    Program,
    ProgramNetwork,
)
from secateur.graph.module_state import evaluating
from secateur.graph.trace import export_program
from secateur.models.divergence import relative_error
from secateur.runtime.errors import TraceError
from secateur.runtime.torch_internals import OpOverload, schema_of

TOLERANCE = 1e-5
"""Largest relative difference between the outputs of a program and of its network."""
CHECKED_BATCHES = (1, 2, 3)
CHECKS = frozenset({"_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size"})
"""Operations that only check assumptions; a program leaves them out."""

Images = Float[Tensor, "image channel *position"]


def make_program(model: nn.Module, example: Images) -> Program:
    """Return the program of `model` in evaluation mode, for any number of images like `example`.

    Raises:
        TraceError: `torch.export` can't trace the network, an operation is not in the table, or the
            outputs for 1, 2 or 3 images of noise differ from the network's.
    """
    exported = export_program(model, example)
    program = _program_of(exported, tuple(example.shape[1:]))
    _check_outputs(model, program, example)
    return program


def _program_of(exported: ExportedProgram, image_shape: tuple[int, ...]) -> Program:
    tables: dict[InputKind, dict[str, str]] = {kind: {} for kind in InputKind}
    for spec in exported.graph_signature.input_specs:
        assert spec.arg.name is not None
        tables[spec.kind][spec.arg.name] = spec.target or spec.arg.name
    *nodes, last = exported.graph.nodes
    outputs = last.args[0]
    images = list(tables[InputKind.USER_INPUT])
    if len(images) != 1 or not isinstance(outputs, tuple) or len(outputs) != 1:
        raise TraceError("the network must take one batch of images and return one tensor")
    if tables[InputKind.CUSTOM_OBJ] or tables[InputKind.TOKEN]:
        raise TraceError("the network holds objects that are not tensors")
    (output,) = outputs
    if not isinstance(output, Node):
        raise TraceError("the network returns something that does not depend on the images")
    used = {node.name for node in nodes if node.users}
    buffers = {**tables[InputKind.BUFFER], **tables[InputKind.CONSTANT_TENSOR]}
    program = Program(
        image=images[0],
        image_shape=image_shape,
        parameters={v: n for v, n in tables[InputKind.PARAMETER].items() if v in used},
        buffers={value: name for value, name in buffers.items() if value in used},
        operations=tuple(_operations(nodes)),
        output=output.name,
    )
    stored = exported.state_dict
    for name in program.buffers.values():
        if name not in stored:
            program.constants[name] = exported.constants[name]
    return program


def _operations(nodes: list[Node]) -> Iterator[Operation]:
    for node in nodes:
        if node.op == "placeholder":
            continue
        call = _call_of(node)
        if call is None:
            continue
        args = [_encode(argument, node) for argument in node.args]
        kwargs = {name: _encode(argument, node) for name, argument in node.kwargs.items()}
        yield Operation(node.name, call, args, kwargs)


def _call_of(node: Node) -> str | None:
    """Return the name of the node's operation in a program; None for a check."""
    target = node.target
    if isinstance(target, OpOverload):
        space, _, name = schema_of(target).name.partition("::")
        if space == "aten" and name in CHECKS:
            return None
        if space == "aten" and name.removesuffix("_") in OPERATIONS:
            return f"aten.{name}.{schema_of(target).overload_name or 'default'}"
        raise TraceError(f"the operation {space}.{name} can't be part of a program")
    for name, function in ARITHMETIC.items():
        if target is function:
            return f"python.{name}"
    raise TraceError(f"the operation {target} can't be part of a program")


def _encode(argument: Any, node: Node) -> Any:
    """Return an argument as JSON."""
    if isinstance(argument, Node):
        return {"value": argument.name}
    if isinstance(argument, torch.device):
        return {"value": DEVICE}
    if isinstance(argument, torch.dtype | torch.layout | torch.memory_format):
        return {"torch": str(argument).removeprefix("torch.")}
    if isinstance(argument, list | tuple):
        return [_encode(part, node) for part in argument]
    if isinstance(argument, float) and not math.isfinite(argument):
        return {"float": str(argument)}
    if argument is None or isinstance(argument, bool | int | float | str):
        return argument
    raise TraceError(f"{node.name} takes a {type(argument).__name__}, which JSON can't hold")


def _check_outputs(model: nn.Module, program: Program, example: Images) -> None:
    """Raise `TraceError` if the outputs of program and network differ."""
    generator = torch.Generator().manual_seed(0)
    for count in CHECKED_BATCHES:
        images = torch.randn(count, *program.image_shape, generator=generator).to(example)
        try:
            error = _difference(model, program, images)
        except Exception as failure:  # the network is the user's: it may raise anything
            raise TraceError(
                f"exported, the network can't take a batch of {count}: {failure}"
            ) from failure
        if not error <= TOLERANCE:
            raise TraceError(
                f"exported, the network has other outputs for a batch of {count}: "
                f"relative difference {error:.1e}"
            )


def _difference(model: nn.Module, program: Program, images: Images) -> float:
    """Return the largest difference between the outputs, over the largest absolute output."""
    tensors = {**program.constants, **model.state_dict()}
    network = ProgramNetwork(program, {name: t.contiguous() for name, t in tensors.items()})
    with evaluating(model), torch.no_grad():
        return relative_error(network(images), model(images))
